"""The table of patches over vLLM: every switch reaches every rank, or the old patch stays active."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nest_runtime.serve.served_patch import ServedPatch, SwapPolicy, Switch
from nest_runtime.serve.switching.table import PatchTable
from nest_runtime.serve.vllm.adapters import Adapters
from nest_runtime.serve.vllm.flow import Flow
from nest_runtime.serve.vllm.inplace import InPlace


class VllmTable(PatchTable):
    """A PatchTable whose activation is a change in the engine.

    Args:
        patches: how patches are put on: in place for everybody, or as adapters per request.
        flow: the requests in flight.
        wait_seconds: how long a switch in place waits for them.
        arguments, settings: PatchTable's, from ``model_name`` on.
    """

    def __init__(
        self, patches: InPlace | Adapters, flow: Flow, wait_seconds: float, *arguments: Any, **settings: Any
    ) -> None:
        super().__init__(patches, *arguments, **settings)
        self._patches = patches
        self._flow = flow
        self._wait_seconds = wait_seconds

    def named(self, model: str) -> ServedPatch | None:
        """As PatchTable's; raises what broke the engine, if anything did."""
        if self._patches.broken is not None:
            raise self._patches.broken
        return super().named(model)

    async def _switch(
        self, what: str, served_patch: ServedPatch, started: float, who: str, policy: SwapPolicy
    ) -> Switch:
        patches = self._patches
        if not isinstance(patches, InPlace):
            return await super()._switch(what, served_patch, started, who, policy)
        async with self._flow.shut(served_patch, policy, self._wait_seconds) as replaced:
            before = patches.on
            await patches.switch(served_patch.key)
            try:
                return replace(await super()._switch(what, served_patch, started, who, policy), replaced=replaced)
            except BaseException:
                await patches.switch(before)
                raise
