"""The alternatives to a NeST patch, each behind one protocol (base.py), for a fair comparison.

    method = make_methods(["lora"])[0]                      # registry.py finds them all
    fitted = method.fit(target, data, recipe, value=3e-3)   # trains; the model is bare again afterwards
    with fitted.applied():                                  # the model with the method on it
        ...

compare/compare.py runs them side by side. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "FitData": "nest_runtime.compare.methods.base",
    "Fitted": "nest_runtime.compare.methods.base",
    "Method": "nest_runtime.compare.methods.base",
    "Target": "nest_runtime.compare.methods.base",
    "method_names": "nest_runtime.compare.methods.registry",
    "make_methods": "nest_runtime.compare.methods.registry",
    "prepare_data": "nest_runtime.compare.methods.data",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nest_runtime.compare.methods' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
