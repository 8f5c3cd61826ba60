"""Patches per request: each one an adapter of vLLM's own LoRA kernels, exported from the patch and named by its digest.

The base stays as it is, requests choose, and a switch of the active patch changes no weight and waits for nobody.
vLLM keys keys and values by the adapter's name: two patches never share a name (slots.py), so none is read under
another. Ranks on other machines read the exported folder too: put ``$NEST_HOME`` on a file system they share.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nest_runtime.errors import EngineError, ExportError, NestError
from nest_runtime.export.peft import Adapter, export_peft, import_peft
from nest_runtime.patch.patch import Patch
from nest_runtime.serve.vllm.base import CheckpointBase
from nest_runtime.serve.vllm.replicas import Replicas
from nest_runtime.serve.vllm.slots import Slots, adapter_name

log = logging.getLogger("nest_runtime.serve.vllm")


class Adapters:
    """The patches that are loaded as adapters. Made on the event loop.

    Args:
        replicas: the workers.
        base: the checkpoint.
        models: vLLM's ``OpenAIServingModels``, which finds adapters by name.
        folder: where exported adapters are kept, by digest.

    ``add`` and ``remove`` are called in threads, like PatchRuntime's; the rest on the event loop.

    Raises:
        EngineError: the engine has too few slots, or adapters that are not ours.
    """

    per_request = True
    broken: EngineError | None = None

    def __init__(self, replicas: Replicas, base: CheckpointBase, models: Any, folder: Path) -> None:
        config = replicas.client.vllm_config.lora_config
        if models.lora_requests:
            raise EngineError(
                f"the engine was started with adapters of its own: {', '.join(models.lora_requests)}",
                "start it without --lora-modules: only patches may be loaded beside each other",
            )
        self._slots = Slots(config.max_loras)
        self._rank = int(config.max_lora_rank)
        self._replicas = replicas
        self._base = base
        self._models = models
        self._folder = folder
        self._loop = asyncio.get_running_loop()

    @property
    def capacity(self) -> int:
        """How many patches may be loaded at once."""
        return self._slots.capacity

    def add(self, patch: Patch, *, pause: Any = nullcontext) -> str:
        """Check a patch against the checkpoint, export it and load it on every rank.

        Raises:
            StoreError: all slots are taken.
            EngineError: an adapter is not on every rank, or its rank is beyond the engine's.
            BaseMismatch, SiteMismatch: see Base.check.
        """
        self._base.check(patch)
        asyncio.run_coroutine_threadsafe(self._load(patch), self._loop).result()
        return patch.digest

    def remove(self, digest: str) -> None:
        """Unload a patch from every rank."""
        asyncio.run_coroutine_threadsafe(self._unload(digest), self._loop).result()

    async def _load(self, patch: Patch) -> None:
        if self._slots.id_of(patch.digest) is not None:
            return
        name, number = adapter_name(patch.digest), self._slots.take(patch.digest)
        try:
            adapter = await asyncio.to_thread(self._export, patch)
            from vllm.lora.request import LoRARequest

            request = LoRARequest(name, number, str(adapter.folder))
            if not await self._replicas.client.add_lora(request):
                raise EngineError(f"the engine did not load the adapter of {patch.version}", "see the engine's log")
            await self.verify()
        except NestError:
            await self._give_up(patch.digest, number)
            raise
        except Exception as error:
            await self._give_up(patch.digest, number)
            raise EngineError(
                f"the engine did not load the adapter of {patch.version}: {error}", "see the engine's log"
            ) from error
        self._models.lora_requests[name] = request

    async def _unload(self, digest: str) -> None:
        number = self._slots.id_of(digest)
        if number is None:
            return
        self._models.lora_requests.pop(adapter_name(digest), None)
        await self._replicas.client.remove_lora(number)
        self._slots.release(digest)

    def request(self, digest: str) -> Any:
        """The LoRARequest of a loaded patch."""
        return self._models.lora_requests[adapter_name(digest)]

    async def verify(self) -> None:
        """Every rank has every adapter in a slot, and the last slot empty. Raises EngineError."""
        self._slots.check(await self._replicas.call("nest_slots"))

    async def _give_up(self, digest: str, number: int) -> None:
        self._slots.release(digest)
        try:
            await self._replicas.client.remove_lora(number)
        except Exception as error:
            log.error("adapter %d may still be in the engine: %s", number, error)

    def _export(self, patch: Patch) -> Adapter:
        """The patch as an adapter folder that is it to the bit, whatever stood there before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = self._folder / adapter_name(patch.digest)
        adapter = export_peft(patch, folder, model=self._base.model, engine="vllm", overwrite=True)
        if import_peft(folder).digest != patch.digest:
            raise ExportError(f"{folder} is not the patch that was written there", "look who else writes there")
        if adapter.rank > self._rank:
            raise EngineError(
                f"{patch.label} has rank {adapter.rank}; the engine takes at most {self._rank}",
                f"start with --max-lora-rank {adapter.rank} or more",
            )
        return adapter
