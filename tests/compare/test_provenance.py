"""What makes old results stale: the code that decides figures, found by its imports and not by a list."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nest_runtime.compare.provenance import PACKAGE, code_digest, deciding_files

LOADED = """
import importlib, pkgutil, sys
import nest_runtime.prompts.generate
for name in ("train", "compare.methods", "runtime"):
    package = importlib.import_module(f"nest_runtime.{name}")
    for found in pkgutil.walk_packages(package.__path__, f"nest_runtime.{name}."):
        importlib.import_module(found.name)
for name, module in sys.modules.items():
    if name.split(".")[0] == "nest_runtime" and getattr(module, "__file__", None):
        print(module.__file__)
"""


def test_everything_that_is_loaded_with_the_methods_decides() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=300)
    loaded = {Path(line) for line in done.stdout.splitlines()}
    assert loaded
    assert loaded <= set(deciding_files())


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("model/anatomy.py", True),
        ("model/rows.py", True),
        ("model/projection.py", True),
        ("train/tune.py", True),
        ("compare/methods/defaults.json", True),
        ("cli/commands/store.py", False),
        ("serve/app.py", False),
        ("prompts/refusals.py", True),  # training leaves out what the base refuses
        ("demo/app.py", False),
    ],
)
def test_a_change_makes_results_stale_where_it_may_change_them(tmp_path: Path, name: str, decides: bool) -> None:
    package = tmp_path / "nest_runtime"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("model.safetensors", "__pycache__", "_patches"))
    before = code_digest(package)
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    with (package / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    code_digest.cache_clear()
    assert (code_digest(package) != before) is decides
