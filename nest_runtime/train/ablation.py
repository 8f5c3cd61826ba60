"""Removing the refusal direction at random while tuning, so that refusals do not depend on it alone.

Per layer, the direction is the difference of the mean hidden states of harmful and benign prompts at their last token
(Arditi et al. 2024, arXiv 2406.11717). Projecting it out at random layers and tokens during fine-tuning makes
refusals withstand attacks that were never trained on (DeepRefusal, arXiv 2509.15202). It is used in training only:
none of it ships.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nest_runtime.train.batches import Batch, Row, make_batch
from nest_runtime.train.forward import device_of, dtype_of, hidden_states

PROMPTS = 32  # of each class, to find the directions with


class RefusalAblation:
    """Hooks on the decoder layers from the lowest patched one up that project the direction out at random.

    Args:
        layers: the model's decoder layers; ``lowest`` is the index of the first to change.
        share: probability, per layer and token of a harmful row.
        seed: of the choice, which follows from seed and step alone.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, lowest: int, share: float, seed: int) -> None:
        self.model, self.layers, self.lowest, self.share, self.seed = model, layers, lowest, share, seed
        self.directions: dict[int, torch.Tensor] = {}  # by layer: (d,), of length 1
        self._mask: torch.Tensor | None = None
        self._random = torch.Generator()

    def find(self, rows: Sequence[Row], pad: int) -> None:
        """Measure the directions on the base, from some rows of both classes."""
        sums: dict[int, list[torch.Tensor]] = {}
        for kind in (True, False):
            some = [row for row in rows if row.harmful is kind][:PROMPTS]
            batch = make_batch(some, pad, device_of(self.model), dtype_of(self.model))
            for index, mean in self._means(batch).items():
                sums.setdefault(index, []).append(mean)
        self.directions = {
            index: torch.nn.functional.normalize(harmful - benign, dim=0) for index, (harmful, benign) in sums.items()
        }

    def _means(self, batch: Batch) -> dict[int, torch.Tensor]:
        """By layer, the mean over rows of the states at each prompt's last token, (d,) float32."""
        last = torch.tensor([len(row.prompt) - 1 for row in batch.rows], device=batch.ids.device)
        means: dict[int, torch.Tensor] = {}

        def keep(index: int, states: torch.Tensor) -> None:
            means[index] = states[torch.arange(len(states), device=states.device), last].float().mean(0)

        with self._hooks(keep), torch.no_grad():
            hidden_states(self.model, batch.ids, batch.mask)
        return means

    @contextmanager
    def during(self, batch: Batch, step: int) -> Iterator[None]:
        """Within it, passes over this batch lose the direction at random tokens of harmful rows."""
        self._random.manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.tensor([row.harmful for row in batch.rows], device=batch.ids.device)

        def project(index: int, states: torch.Tensor) -> torch.Tensor:
            draw = torch.rand(batch.ids.shape, generator=self._random).to(states.device) < self.share
            direction = self.directions[index].to(states.dtype)
            part = (states @ direction)[..., None] * direction  # (rows, width, d)
            return torch.where((draw & chosen[:, None])[..., None], states - part, states)

        with self._hooks(project):
            yield

    @contextmanager
    def _hooks(self, change: Any) -> Iterator[None]:
        def hook(index: int) -> Any:
            """A hook that changes the states (rows, width, d) that a layer gives, in their dtype."""

            def run(_: nn.Module, __: Any, output: Any) -> Any:
                """Replace the layer's states, alone or first of a tuple."""
                states = output[0] if isinstance(output, tuple) else output
                changed = change(index, states)
                if changed is None:
                    return None
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return run

        handles = [
            self.layers[index].register_forward_hook(hook(index)) for index in range(self.lowest, len(self.layers))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
