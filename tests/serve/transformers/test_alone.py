"""In bfloat16 a rounding can choose another token: a request that runs alone gets the logits of ``model.generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import save_tiny
from tests.support.engine import alone, answers

COUNT = 48
PROMPTS = [[6 + (7 * place + length) % 250 for place in range(length)] for length in (1, 9, 70)]
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 3}


@contextmanager
def tapped(model: Any) -> Iterator[list[torch.Tensor]]:
    """The logits of every pass."""
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits[0, -1].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def test_one_request_at_a_time_has_the_logits_of_generate(tmp_path: Path) -> None:
    """Eight heads share keys and values: a mask has them computed in one product, whose last bit differs at times."""
    folder = save_tiny(tmp_path, "LlamaForCausalLM", "LlamaConfig", initializer_range=0.2, **GROUPED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with tapped(model) as expected:
        tokens = [alone(model, prompt, COUNT) for prompt in PROMPTS]
    with tapped(model) as seen:
        found = answers(model, "transformers", [[(prompt, None, COUNT)] for prompt in PROMPTS])
    assert [one for (one,) in found] == tokens
    ours, theirs = torch.stack(seen[-len(expected) :]), torch.stack(expected)
    assert [int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)] == [0] * len(expected)
