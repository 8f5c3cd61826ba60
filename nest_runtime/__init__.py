"""nest-runtime: safety patches for language models, trained by NeST and switched on while serving.

The public names are below and nowhere else; they load on first use, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ERRORS = (
    "NestError",
    "UsageError",
    "DataError",
    "ModelError",
    "UnknownArchitecture",
    "PatchFormatError",
    "PatchNotFound",
    "SiteMismatch",
    "StoreError",
    "EngineError",
    "TrainingError",
    "EvaluationError",
    "ExportError",
    "HubError",
    "TrustError",
    "DigestMismatch",
    "BaseMismatch",
    "SignatureError",
    "Revoked",
    "Downgrade",
    "Expired",
)

_HOMES = {  # the module, and what it calls the thing where that is another name
    "Patch": "nest_runtime.patch.patch",
    "Site": "nest_runtime.patch.site",
    "compose": "nest_runtime.patch.algebra",
    "scale": "nest_runtime.patch.algebra",
    "diff": "nest_runtime.patch.algebra",
    "load_patch": "nest_runtime.resolve",
    "load_model": "nest_runtime.model.load",
    "Projection": "nest_runtime.model.projection",
    "find_sites": "nest_runtime.model.anatomy:find_projections",
    "register_architecture": "nest_runtime.model.anatomy",
    "model_hash": "nest_runtime.model.fingerprint",
    "rows_digest": "nest_runtime.model.base_rows",
    "PatchRuntime": "nest_runtime.runtime",
    "export_gguf": "nest_runtime.export",
    "export_merged": "nest_runtime.export",
    "export_peft": "nest_runtime.export",
    "import_peft": "nest_runtime.export",
    "Recipe": "nest_runtime.train.recipe",
    "train_patch": "nest_runtime.train.pipeline",
    "judge": "nest_runtime.evaluate.judging",
    **dict.fromkeys(_ERRORS, "nest_runtime.errors"),
}

_CALLED = ("compare", "evaluate")  # packages that can be called

__all__ = ["__version__", *_HOMES, *_CALLED]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _CALLED:
        return import_module(f"nest_runtime.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'nest_runtime' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from nest_runtime.compare.api import compare as compare
    from nest_runtime.errors import *  # noqa: F403
    from nest_runtime.evaluate.api import evaluate as evaluate
    from nest_runtime.evaluate.judging import judge as judge
    from nest_runtime.export import export_gguf as export_gguf
    from nest_runtime.export import export_merged as export_merged
    from nest_runtime.export import export_peft as export_peft
    from nest_runtime.export import import_peft as import_peft
    from nest_runtime.model import anatomy as _anatomy
    from nest_runtime.model.anatomy import register_architecture as register_architecture
    from nest_runtime.model.base_rows import rows_digest as rows_digest
    from nest_runtime.model.fingerprint import model_hash as model_hash
    from nest_runtime.model.load import load_model as load_model
    from nest_runtime.model.projection import Projection as Projection
    from nest_runtime.patch.algebra import compose as compose
    from nest_runtime.patch.algebra import diff as diff
    from nest_runtime.patch.algebra import scale as scale
    from nest_runtime.patch.patch import Patch as Patch
    from nest_runtime.patch.site import Site as Site
    from nest_runtime.resolve import load_patch as load_patch
    from nest_runtime.runtime import PatchRuntime as PatchRuntime
    from nest_runtime.train.pipeline import train_patch as train_patch
    from nest_runtime.train.recipe import Recipe as Recipe

    find_sites = _anatomy.find_projections  # the public name
