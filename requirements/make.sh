#!/usr/bin/env bash
# Makes lock.txt and torch-cuda.txt from pyproject.toml and constraints.txt, with the hashes that PyPI states, and
# apps/requirements.txt with the same versions. Needs uv (pip install uv) and PyPI; downloads no packages.
#
# torch-cpu.txt is kept by hand: the CPU build is on download.pytorch.org/whl/cpu, not on PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep -v '^torch==' constraints.txt > "$work/constraints.txt"
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
echo "torch==$torch" >> "$work/constraints.txt"
printf 'hatchling\neditables\n' > "$work/build.in"

compile() {
  uv pip compile -q --no-config --python-platform x86_64-manylinux_2_28 --python-version 3.11.7 \
    --no-header --no-annotate --no-strip-extras -c "$work/constraints.txt" "$@"
}
compile pyproject.toml --extra test --extra docs --extra eval "$work/build.in" --generate-hashes -o "$work/all.txt"
compile pyproject.toml --extra demo -o "$work/demo.txt"

source=$(sed -n 's/^Source = "\(.*\)"$/\1/p' pyproject.toml)
python3 - "$work" "$torch" "$source" <<'PYTHON'
import re
import sys
from pathlib import Path

work, torch, source = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
blocks = re.findall(r"^[A-Za-z0-9].*(?:\n +--hash=.*)*", (work / "all.txt").read_text(), re.M)
# pip (23.2 does) may want a pin for a package with its extras, and one for it without: pydantic[email], pydantic.
blocks = [b for block in blocks for b in dict.fromkeys([re.sub(r"^([\w.-]+)\[[^]]*\]", r"\1", block), block])]
of_torch = [b for b in blocks if re.match(r"torch==|triton==|nvidia-|cuda-", b)]
about = "# Made by requirements/make.sh: Linux on x86-64, Python 3.11. docs/guide/operations.md says how it is used.\n"
Path("requirements/lock.txt").write_text(about + "\n".join(b for b in blocks if b not in of_torch) + "\n")
Path("requirements/torch-cuda.txt").write_text(about + "\n".join(of_torch) + "\n")
pins = [line for line in (work / "demo.txt").read_text().splitlines() if re.match(r"[A-Za-z0-9]", line)]
kept = [line for line in pins if not re.match(r"torch==|triton==|nvidia-|cuda-", line)]
Path("apps/requirements.txt").write_text(
    "# What a Space installs, CPU only, in the versions that were tested (requirements/make.sh wrote them). Without hashes: the\n"
    "# Space's builder adds packages of its own to the same command. README.md says how to take a wheel of your checkout.\n"
    "--extra-index-url https://download.pytorch.org/whl/cpu\n"
    + "\n".join([f"torch=={torch}+cpu", *kept, f"nest-runtime[demo] @ git+{source}"]) + "\n"
)
PYTHON
