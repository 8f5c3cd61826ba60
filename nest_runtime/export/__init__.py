"""Patches for other tools: a PEFT adapter (which vLLM's LoRA reads too), a merged checkpoint, a GGUF adapter.

Every export is a new folder that is whole or not there, with ``nest_export.json`` naming the patch in it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "export_gguf": "nest_runtime.export.gguf",
    "export_merged": "nest_runtime.export.merged",
    "export_peft": "nest_runtime.export.peft",
    "import_peft": "nest_runtime.export.peft",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nest_runtime.export' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


if TYPE_CHECKING:
    from nest_runtime.export.gguf import export_gguf as export_gguf
    from nest_runtime.export.merged import export_merged as export_merged
    from nest_runtime.export.peft import export_peft as export_peft
    from nest_runtime.export.peft import import_peft as import_peft
