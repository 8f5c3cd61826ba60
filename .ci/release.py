"""Builds what a release consists of, into dist/, and looks at it: versions, metadata, and that a wheel holds its data.

pip install build twine && python .ci/release.py [--tag v0.2.0]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
WHEEL = (
    "nest_runtime/py.typed",
    "nest_runtime/_patches/v3.safetensors",
    "nest_runtime/reference/model/model.safetensors",
)
SDIST = ("pyproject.toml", "CHANGELOG.md", "constraints.txt", "patches/v3.safetensors", "tests/conftest.py")


def version() -> str:
    """The version, from the one place where it stands."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "nest_runtime/__init__.py").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def main() -> int:
    """Build and check; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the tag that is released: v and the version")
    tag, wanted = parser.parse_args().tag, version()
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if tag is not None and tag != f"v{wanted}":
        sys.exit(f"error: the tag is {tag}, and nest_runtime.__version__ is {wanted}")
    if tag is not None and not re.search(rf"^## {re.escape(wanted)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.MULTILINE):
        sys.exit(f"error: CHANGELOG.md has no section '## {wanted} (YYYY-MM-DD)'")
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", DIST, ROOT], check=True)
    files = sorted(DIST.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    wheel = DIST / f"nest_runtime-{wanted}-py3-none-any.whl"
    source = DIST / f"nest_runtime-{wanted}.tar.gz"
    assert files == sorted([wheel, source]), files
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in WHEEL if name not in held] + [name for name in SDIST if name not in packed]
    if missing:
        sys.exit(f"error: not in the archives: {', '.join(missing)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB; {source.name}: {source.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
