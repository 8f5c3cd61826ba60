"""In bfloat16 a rounding can choose another token: a request that runs alone gets the logits of ``model.generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nest_runtime.model.load import load_model
from tests.support.engine import alone, answers

COUNT = 12
PROMPTS = [[6 + (7 * place + length) % 250 for place in range(length)] for length in (1, 9, 70)]


@contextmanager
def tapped(model: Any) -> Iterator[list[torch.Tensor]]:
    """The logits of every pass."""
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits[0, -1].clone()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(params=["tiny", "reference"])
def model(request: pytest.FixtureRequest, tiny_llama: Path) -> Any:
    if request.param == "reference":
        return load_model("reference", dtype="bfloat16").model
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()


def test_one_request_at_a_time_has_the_logits_of_generate(model: Any) -> None:
    with tapped(model) as expected:
        tokens = [alone(model, prompt, COUNT) for prompt in PROMPTS]
    with tapped(model) as seen:
        found = answers(model, "transformers", [[(prompt, None, COUNT)] for prompt in PROMPTS])
    assert [one for (one,) in found] == tokens
    ours, theirs = torch.stack(seen[-len(expected) :]), torch.stack(expected)
    assert [int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)] == [0] * len(expected)
