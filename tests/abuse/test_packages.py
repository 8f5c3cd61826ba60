"""What is installed by hash: every package of the lock has one, and the lock is that of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from nest_runtime.install import install

ROOT = Path(__file__).parents[2]
LOCKS = ("lock.txt", "torch-cpu.txt", "torch-cuda.txt")
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[a-z0-9, -]+\])?==([^\s;\\]+)")


def pins(path: Path) -> dict[str, str]:
    found = (PIN.match(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def locked() -> dict[str, str]:
    return {name: version for file in LOCKS[:2] for name, version in pins(ROOT / "requirements" / file).items()}


def test_every_package_of_a_lock_has_a_hash() -> None:
    for file in LOCKS:
        text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
        blocks = [block for block in re.split(r"\n(?=\S)", text) if not block.startswith("#")]
        assert blocks
        for block in blocks:
            assert PIN.match(block), block
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block


def test_the_lock_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: rows for name, rows in project["optional-dependencies"].items() if name != "vllm"}
    wanted = [
        Requirement(text) for text in (*project["dependencies"], *(row for rows in extras.values() for row in rows))
    ]
    versions = locked()
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name != "nest-runtime":
            assert name in versions, f"run requirements/make.sh: {name} is not locked"
            assert requirement.specifier.contains(Version(versions[name]).public), name


def test_all_lists_name_the_same_versions() -> None:
    versions = {name: Version(version).public for name, version in locked().items()}
    for path in (
        ROOT / "constraints.txt",
        ROOT / "apps" / "requirements.txt",
        ROOT / "requirements" / "torch-cuda.txt",
    ):
        others = {name: Version(version).public for name, version in pins(path).items()}
        assert {name: version for name, version in others.items() if versions.get(name, version) != version} == {}


def test_a_space_pins_all_that_it_installs() -> None:
    lines = (ROOT / "apps" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line and not line.startswith(("#", "--"))]
    (own,) = (line for line in rows if "==" not in line)
    assert install("demo") == f"pip install '{own}'"  # never a package of that name from an index
    assert len(rows) > 50


def test_ci_installs_by_hash_and_from_nowhere_else() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in script.splitlines() if "pip install" in line and "$venv/torchao" not in line]
    assert lines
    assert all("--require-hashes" in line or "--no-deps --no-build-isolation -e ." in line for line in lines)
