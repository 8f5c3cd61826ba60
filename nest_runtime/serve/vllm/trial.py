"""Answers under a patch that is not active: probes before a switch to a followed patch.

serve/following/admission.py asks for them. As an adapter, the patch answers beside the active one. In place there is
only one set of weights: admissions pause, the patch is applied, the probes are answered, and the old patch is restored
before admissions continue.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from nest_runtime.errors import EngineError
from nest_runtime.serve.requests.generation import ChoiceTokens, EngineRequest
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.vllm.adapters import Adapters
from nest_runtime.serve.vllm.flow import Flow
from nest_runtime.serve.vllm.inplace import InPlace


class Trial:
    """Some greedy answers under one patch, in the form of serve/requests/generation.py's Generation.

    Args:
        client: vLLM's ``AsyncLLM``.
        patches: how patches are put on.
        flow: the requests in flight.
        request: the prompts, and the patch.
        wait_seconds: how long a trial in place waits for requests in flight.
    """

    def __init__(
        self, client: Any, patches: InPlace | Adapters, flow: Flow, request: EngineRequest, wait_seconds: float
    ) -> None:
        self._client = client
        self._patches = patches
        self._flow = flow
        self._request = request
        self._wait_seconds = wait_seconds

    async def events(self) -> AsyncIterator[ChoiceTokens]:
        """Every answer whole, when all are there. Raises EngineError."""
        async with self._under(self._request.pin) as adapter:
            try:
                found = await asyncio.gather(
                    *(self._one(index, adapter) for index in range(len(self._request.prompts)))
                )
            except Exception as error:
                raise EngineError(f"the engine failed on a trial: {error}", "see the engine's log") from error
        for answer in found:
            yield answer

    def cancel(self) -> None:
        """Nothing is left running: the engine ends a request that nobody reads."""

    def _under(self, pin: ServedPatch) -> AbstractAsyncContextManager[Any]:
        if isinstance(self._patches, Adapters):
            return self._beside(self._patches, pin)
        return self._in_place(self._patches, pin)

    @asynccontextmanager
    async def _beside(self, patches: Adapters, pin: ServedPatch) -> AsyncIterator[Any]:
        yield None if pin.key is None else patches.request(pin.key)

    @asynccontextmanager
    async def _in_place(self, patches: InPlace, pin: ServedPatch) -> AsyncIterator[None]:
        async with self._flow.shut(pin, "drain", self._wait_seconds):
            before = patches.on
            await patches.switch(pin.key)
            try:
                yield
            finally:
                await patches.switch(before)

    async def _one(self, index: int, adapter: Any) -> ChoiceTokens:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=self._request.max_new_tokens[index])
        prompt = {"prompt_token_ids": list(self._request.prompts[index])}
        outputs = self._client.generate(prompt, params, f"trial-{uuid.uuid4().hex}", lora_request=adapter)
        last = [output async for output in outputs][-1]
        return ChoiceTokens(index, tuple(last.outputs[0].token_ids), last.outputs[0].finish_reason or "stop")
