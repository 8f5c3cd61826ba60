"""The methods that ``collective_rpc`` calls on every rank of every replica.

vLLM mixes :class:`PatchExtension` into its worker class (``worker_extension_cls``); its methods run between steps. A
method never raises a NestError. It reports it, so that the caller hears from every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nest_runtime.errors import NestError
from nest_runtime.serve.vllm.rank import RankPatches, Report, slot_report

FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}


def _reporting(method: Callable[..., Report]) -> Callable[..., Report]:
    """The error of a rank as its report."""

    @functools.wraps(method)
    def reported(self: Any, *arguments: Any) -> Report:
        try:
            return method(self, *arguments)
        except NestError as error:
            return {"rank": self.rank, "error": type(error).__name__, "message": error.message, "hint": error.hint}

    return reported


class PatchExtension:
    """Mixed into vLLM's worker; the worker's own attributes ``rank`` and ``get_model`` are used, nothing else of it."""

    @_reporting
    def nest_prepare(self, data: bytes) -> Report:
        """See RankPatches.prepare; ``data`` is a patch file, checked here again."""
        from nest_runtime.patch.file import from_bytes

        return _patches(self).prepare(from_bytes(data, "the patch sent to the workers"))

    @_reporting
    def nest_apply(self, digest: str | None) -> Report:
        """See RankPatches.apply."""
        return _patches(self).apply(digest)

    @_reporting
    def nest_state(self) -> Report:
        """See RankPatches.state."""
        return _patches(self).state()

    @_reporting
    def nest_forget(self, digest: str) -> Report:
        """See RankPatches.forget."""
        return _patches(self).forget(digest)

    @_reporting
    def nest_slots(self) -> Report:
        """Which adapter is in which slot of this rank."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        return slot_report(self.rank, manager.lora_index_to_id)  # type: ignore[attr-defined]


def _patches(worker: Any) -> RankPatches:
    """The worker's patches, made at the first call."""
    found = getattr(worker, "_nest_patches", None)
    if found is None:
        model = worker.get_model()
        packed = {**FUSED, **(getattr(model, "packed_modules_mapping", None) or {})}
        worker._nest_patches = found = RankPatches(model, worker.rank, packed, _renaming(model))
    return found


def _renaming(model: Any) -> Callable[[str], str]:
    """How the model's loader renames modules of the checkpoint: towers of multimodal models stand elsewhere."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    if hasattr(mapper, "get_rename_mapper"):  # without the fusing of gate and up, which rows.candidates does
        mapper = mapper.get_rename_mapper()

    def renamed(name: str) -> str:
        return next(iter(mapper.apply_list([name])), name)

    return renamed
