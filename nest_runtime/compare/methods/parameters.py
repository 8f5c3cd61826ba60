"""Ordinary parameters in place of NeST's deltas, so that ``train.tune.tune`` trains them too.

So every supervised baseline gets the same loss, batches, schedule, validation, best state and early stop as NeST: it
is the same code, with other numbers to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nest_runtime.compare.methods.base import FitData, Target
from nest_runtime.progress import Progress
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.tune import TuneResult, tune


@dataclass
class _Site:
    """One parameter as tune's optimizer expects a site: no loadings, learning rates as they are."""

    deltas: torch.Tensor
    loadings: None = None
    scale: float = 1.0


class ParameterSet(Deltas):
    """Named parameters that already act in the model's forward pass.

    Args:
        parameters: by name; trained in place.
        switch: called with False and True to take their effect off the model and put it on again
            (the KL term of the loss asks for the base's logits).
        rounding: round to this dtype when tune rounds, or None to leave the values alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        switch: Callable[[bool], None],
        rounding: torch.dtype | None = None,
    ) -> None:
        self._parameters, self._switch, self._rounding, self._on = dict(parameters), switch, rounding, True
        self.sites = [_Site(parameter) for parameter in self._parameters.values()]  # type: ignore[misc]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters themselves by name, not copies; shapes and dtypes are the model's."""
        return self._parameters

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def lowest(self) -> None:
        """None: it is not known where the parameters act, so no layer's output is kept."""
        return None

    @property
    def enabled(self) -> bool:
        """Whether the parameters act on the model now."""
        return self._on

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Take the parameters' effect off the model, or put it on again."""
        self._on = value
        self._switch(value)

    def round_to(self, dtype: torch.dtype) -> None:
        """Round to what the artifact ships, whatever a patch would."""
        if self._rounding is not None:
            with torch.no_grad():
                for parameter in self._parameters.values():
                    parameter.copy_(parameter.to(self._rounding).to(parameter.dtype))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The parameters take gradients meanwhile; tune has frozen everything else."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)


def supervise(
    target: Target, parameters: ParameterSet, data: FitData, recipe: Recipe, lr: float, progress: Progress | None
) -> TuneResult:
    """Train ``parameters`` on the rows with tune's own loop; the best state stays in them.

    Args:
        target: the model.
        parameters: what is trained, float32.
        data: the rows to learn from and to validate on.
        recipe: steps, batches and early stop.
        lr: the learning rate.
        progress: called as (stage, done, total).
    """
    settings = recipe.evolve(lr=lr, lr_unit="absolute")
    return tune(target.model, target.tokenizer, parameters, data.train, data.validation, settings, progress=progress)


def tuning_report(result: TuneResult) -> dict[str, Any]:
    """What a comparison keeps of a tuning run."""
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "validation": {"before": result.before, "after": result.after},
        "history": result.history,
    }
