"""Full fine-tuning: every weight is trained, in float32, and a whole model ships."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nest_runtime.compare.methods.base import FitData, Learned, Method, Target
from nest_runtime.compare.methods.parameters import ParameterSet, supervise, tuning_report
from nest_runtime.io import replacing
from nest_runtime.progress import Progress
from nest_runtime.train.recipe import Recipe


class Full(Method):
    """Supervised fine-tuning of all weights, with the loss and the loop of NeST's tuning."""

    name = "full"
    title = "full fine-tuning"
    place = 30
    look = ("#009E73", "D")
    knob = "lr"
    grid = (3e-5, 1e-4, 3e-4, 1e-3)
    fallback = 1e-5

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Train copies of the weights; the model gets its own tensors back."""
        path = folder / "model.safetensors"
        own = {name: parameter.data for name, parameter in target.model.named_parameters()}
        with _data(target.model, {name: tensor.float().clone() for name, tensor in own.items()}) as trained:
            parameters = ParameterSet(dict(target.model.named_parameters()), _switcher(target.model, own, trained))
            result = supervise(target, parameters, data, recipe, value, progress)
            shipped = {name: trained[name].to(own[name].dtype).cpu().contiguous() for name in own}
        with replacing(path) as temporary:
            save_file(shipped, temporary, metadata={"format": "pt"})
        return Learned(
            path, tuning_report(result), parameters.trainable, switch=lambda: _data(target.model, load_file(path))
        )


@contextmanager
def _data(model: Any, values: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """A context in which the parameters hold ``values``, by name and of the same shapes and dtypes.

    Afterwards each parameter has its own tensor object again, and so the same bits. Yields the own tensors.
    """
    parameters = dict(model.named_parameters())
    own = {name: parameter.data for name, parameter in parameters.items()}
    placed = {name: values[name].to(own[name].device) for name in parameters}
    try:
        for name, parameter in parameters.items():
            parameter.data = placed[name]
        yield placed
    finally:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.data = own[name]


def _switcher(model: Any, own: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]) -> Any:
    """Switches between the base's weights and the trained ones, for the KL term; both by name, of the same shapes."""

    def switch(on: bool) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = trained[name] if on else own[name].to(trained[name].dtype)

    return switch
