"""The script that writes the reference pages, as a module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def reference() -> ModuleType:
    """``docs/make_reference.py``."""
    path = Path(__file__).parents[2] / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
