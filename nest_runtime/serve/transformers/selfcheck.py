"""Before an engine serves, its logits are compared with those of ``model.generate``: alone, in one batch, in pieces.

Some architectures silently compute something else when they are paged or padded. A few short prompts of different
lengths are answered on the bare base. The engine is led along the tokens that ``model.generate`` gave, and its logits
must agree. This costs about forty passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nest_runtime.serve.transformers.steering import bare_generate

LENGTHS = (1, 7, 40)  # the last is longer than a page of the cache
PIECE = 16  # tokens of a pass, for prompts that are read in pieces
NEW_TOKENS = 4
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits' norm; rounding is 1e-6
NARROW = 0.25  # in narrower formats, where rounding is 1e-2 and one expert more or less is chosen


@dataclass(frozen=True)
class Truth:
    """What ``model.generate`` gives for one prompt: tokens, and the logits that they were chosen by."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: torch.Tensor  # (tokens, vocabulary) float32


class LogitsFollower:
    """A logits processor that keeps the logits of each step, and forces the token that is expected next."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = min(len(self.seen), len(self._truth.tokens) - 1)
        self.seen.append(scores[0].detach().float().cpu().clone())  # what was given is written over
        led = torch.full_like(scores, -torch.inf)
        led[0, self._truth.tokens[step]] = scores[0].amax()  # keeps what is not finite
        return led

    def error(self) -> float:
        """How far off the logits are: the norm of the difference over that of the truth; infinity where some lack."""
        if len(self.seen) != len(self._truth.tokens):
            return torch.inf
        found, expected = torch.stack(self.seen), self._truth.logits
        open_ = expected.isfinite() & found.isfinite()
        if not bool((expected.isfinite() == found.isfinite()).all()):
            return torch.inf
        found, expected = found.masked_fill(~open_, 0.0), expected.masked_fill(~open_, 0.0)
        return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


def truths(model: Any, text: Sequence[int]) -> list[Truth]:
    """What ``model.generate`` gives for the first tokens of a text, repeated as often as it takes.

    Args:
        model: the model, before an engine has touched it.
        text: ids that the model knows, at least one.
    """
    found = []
    for length in LENGTHS:
        prompt = tuple(text[place % len(text)] for place in range(length))
        ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
        settings = {"return_dict_in_generate": True, "output_logits": True}
        output = bare_generate(model, ids, torch.ones_like(ids), NEW_TOKENS, settings=settings)
        logits = torch.cat(output.logits).float().cpu()
        found.append(Truth(prompt, tuple(output.sequences[0, length:].tolist()), logits))
    return found


def tolerance(dtype: torch.dtype) -> float:
    """How far off an engine's logits may be."""
    return TOLERANCE.get(dtype, NARROW)
