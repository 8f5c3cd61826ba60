"""The engine alone, without HTTP: started on a model, asked for some answers at once, and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.requests.generation import EngineRequest
from nest_runtime.serve.requests.sampling import SamplingParams
from nest_runtime.serve.served_patch import BASE, NO_DIGEST, ServedPatch
from nest_runtime.serve.transformers.engine import TransformersEngine

NOBODY = ServedPatch(None, BASE, NO_DIGEST)
LIMITS = Limits(cache_tokens=4096, batch_tokens=128)
TEXT = tuple(range(6, 60))


def answers(
    model: Any,
    kind: str,
    groups: Sequence[Sequence[tuple[Sequence[int], str | None, int]]],
    *,
    runtime: PatchRuntime | None = None,
    limits: Limits = LIMITS,
    ends: Sequence[int] = (),
) -> list[list[list[int]]]:
    """New tokens for groups of (prompt, patch digest or None, count), each group served at once, one after the other.

    Raises EngineError where the engine does not take the model.
    """

    async def one(engine: TransformersEngine, prompt: Sequence[int], patch: str | None, count: int) -> list[int]:
        pin = NOBODY if patch is None else ServedPatch(patch, "patched", patch)
        generation = engine.admit(EngineRequest((tuple(prompt),), (count,), 1, SamplingParams(), pin))
        return [token async for event in generation.events() for token in event.tokens]

    async def run() -> list[list[list[int]]]:
        engine = TransformersEngine(model, runtime or PatchRuntime(model), limits, 64, ends=ends, kind=kind, text=TEXT)
        try:
            await engine.start()
            return [list(await asyncio.gather(*(one(engine, *case) for case in group))) for group in groups]
        finally:
            await engine.stop()

    return asyncio.run(run())


def alone(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What ``model.generate`` gives for one prompt, greedily."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        rows = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=-1
        )
    return rows[0, len(prompt) :].tolist()
