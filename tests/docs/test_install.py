"""Every document installs from a clone, in the words of install.py; versions and addresses have one place."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from nest_runtime import __version__
from nest_runtime.doctor.machine import OLDEST_PYTHON
from nest_runtime.install import SOURCE, extra, from_clone, in_clone, install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TWO = (  # README's: the main job and the tests, each in one line
    "pip install -c constraints.txt -e . && nest-runtime serve --patch v3",
    "pip install -c constraints.txt -e '.[test]' && pytest",
)
BEGINS = {"README.md": "", "tutorial.md": "plot,sign", "first-patch.md": "gguf", "demo.md": "demo"}
APART = "pip install '.[vllm]'"  # without the tested versions: vLLM wants older ones
CPU = "pip install torch=={} --index-url https://download.pytorch.org/whl/cpu"


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", BEGINS)
def test_documents_that_begin_somewhere_begin_with_a_clone(name: str) -> None:
    page = next(page for page in PAGES if page.name == name)
    lines, wanted = commands(page), from_clone(BEGINS[name])
    if name == "README.md":
        wanted = (*wanted[:-1], *TWO)
    start = lines.index(wanted[0])
    assert tuple(lines[start : start + len(wanted)]) == wanted


def test_no_document_assumes_a_release() -> None:
    known = {in_clone(",".join(names)) for names in ([], *([name] for name in PROJECT["optional-dependencies"]))}
    known |= {in_clone(extras) for extras in BEGINS.values()} | {*TWO, APART, CPU.format(pinned("torch"))}
    for page in PAGES:
        for line in commands(page):
            if "--no-deps" in line or "--require-hashes" in line:
                continue  # the verified install, whose lines tests/abuse/test_packages.py knows, and torchao beside
            if line.startswith("pip install") and ("nest-runtime" not in line or line in TWO):
                assert line in known, (page.name, line)
        assert not re.search(r"pip install '?nest-runtime[\s\[']", page.read_text(encoding="utf-8")), page.name


def test_addresses_and_versions_are_the_projects() -> None:
    assert PROJECT["urls"]["Source"] == SOURCE
    assert install("sign") == f"pip install 'nest-runtime[sign] @ git+{SOURCE}'"
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", __version__)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    assert PROJECT["requires-python"] == f">={oldest}"
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## ({re.escape(__version__)}|Unreleased)\b", changes, re.MULTILINE)


def test_an_extra_is_named_by_its_packages() -> None:
    assert extra("plot") == "pip install 'matplotlib>=3.10'"
    assert "model-signing" in extra("sign")


def test_an_old_python_is_told_so() -> None:
    """The package itself says it, where somebody runs a checkout without installing it."""
    kept = sorted((Path.home() / ".pyenv" / "versions").glob("3.10*/bin/python"))
    old = kept[0] if kept else shutil.which("python3.10")
    if old is None or subprocess.run([old, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("no older Python is at hand")
    done = subprocess.run([old, "-m", "nest_runtime"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nest-runtime needs Python 3.11 or newer")
