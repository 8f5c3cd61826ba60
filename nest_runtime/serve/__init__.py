"""The OpenAI-compatible server: engine, HTTP API, admin API, metrics, audit.

``serve(ServeConfig(...))`` runs until a signal ends it. Importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.limits import Allowed, Limits

if TYPE_CHECKING:
    from nest_runtime.serve.server import serve

__all__ = ["Allowed", "Limits", "ServeConfig", "serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":
        from nest_runtime.serve.server import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
