"""One projection: a matrix of the model that can be patched. The live module behind it, and the names both go by.

Names are canonical: free of what torch.compile, PEFT, DDP and FSDP put in between, so that a patch
made on the bare model fits the wrapped one. Which projections a model has is anatomy.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nest_runtime.errors import SiteMismatch

_WRAPPER_PARTS = frozenset({"_orig_mod", "base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_PREFIXES = ("module.", "base_model.model.")


@dataclass(frozen=True)
class Projection:
    """A matrix of the model, (d_out, d_in), whose rows are neurons that can be patched.

    Those of all experts of a layer are one: neuron n is neuron n mod (d_out / experts) of expert
    n // (d_out / experts).

    Attributes:
        name: canonical, e.g. ``model.layers.0.mlp.gate_proj``; of a fused module ``….gate_up_proj:gate`` and ``:up``.
        layer: index of the decoder layer.
        kind: ``gate``, ``up``, or ``fc`` (the first of an FFN's two matrices).
        module: dotted path of the module in the live model; differs from ``name`` when wrapped.
        d_in: inputs.
        d_out: neurons of this projection, those of all experts; half the outputs of a fused module.
        offset: first of them in the output of the module, or of one expert.
        layout: ``linear`` for a weight [outputs, d_in], ``conv1d`` for [d_in, outputs] (GPT-2).
        stride: step from one neuron to the next in that output; 2 where gate and up alternate (gpt-oss).
        experts: how many experts the module holds; 0 for a linear module. The weight then has one dimension more,
            [experts, …], first.
        parameter: the weight's name in the module.
    """

    name: str
    layer: int
    kind: str
    module: str
    d_in: int
    d_out: int
    offset: int = 0
    layout: str = "linear"
    stride: int = 1
    experts: int = 0
    parameter: str = "weight"

    @property
    def tensor(self) -> str:
        """The weight's canonical name in the model's state."""
        whole = self.name.partition(":")[0]
        return whole if self.experts else f"{whole}.{self.parameter}"

    @property
    def each(self) -> int:
        """Neurons of one expert; all of them if there are no experts."""
        return self.d_out // max(self.experts, 1)

    def rows(self, neurons: torch.Tensor) -> torch.Tensor:
        """Output rows [n] int64 of some neurons, counted within the expert if there are experts."""
        return self.offset + self.stride * (neurons.long() % self.each)

    def expert_of(self, neurons: torch.Tensor) -> torch.Tensor:
        """The expert [n] int64 that each of some neurons belongs to; zeros if there are none."""
        return neurons.long() // self.each


def canonical_name(path: str) -> str:
    """A module or tensor path without the parts that wrappers insert."""
    name = ".".join(part for part in path.split(".") if part not in _WRAPPER_PARTS)
    shortened = True
    while shortened:
        shortened = False
        for prefix in _WRAPPER_PREFIXES:
            if name.startswith(prefix):
                name, shortened = name[len(prefix) :], True
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, PEFT, DDP and FSDP wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "peft_config") and isinstance(getattr(model, "base_model", None), nn.Module):
            inner = getattr(model.base_model, "model", None)
            if not isinstance(inner, nn.Module) or not hasattr(model, "get_base_model"):
                return model
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_fsdp_wrapped_module", None), nn.Module):
            model = model._fsdp_wrapped_module  # type: ignore[assignment]
        else:
            return model


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds gate and up of several experts in one parameter.

    transformers 5 marks them (``use_experts_implementation``) with how they are stored and, in ``_apply_gate``, how
    gate and up are joined; a module without these marks is not understood.
    """
    weight = getattr(module, "gate_up_proj", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 3
        and bool(getattr(module, "has_gate", False))
        and not getattr(module, "has_post_expert_norm", False)
        and isinstance(getattr(module, "down_proj", None), torch.Tensor)
        and all(hasattr(module, key) for key in ("is_transposed", "is_concatenated", "_apply_gate"))
    )


def shape_of(module: nn.Module) -> tuple[int, int, str]:
    """Outputs, inputs and layout of a linear module; by attributes, since quantized weights have other shapes."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, "linear"
    return int(module.nf), int(module.nx), "conv1d"  # type: ignore[arg-type]


def module_of(model: nn.Module, projection: Projection) -> nn.Module:
    """The module behind a projection; raises SiteMismatch if the model has none."""
    try:
        return model.get_submodule(projection.module)
    except AttributeError:
        pass
    wanted = projection.tensor.removesuffix(f".{projection.parameter}")
    for path, module in model.named_modules():  # wrapped or unwrapped since the projection was found
        if (is_experts(module) if projection.experts else is_linear(module)) and canonical_name(path) == wanted:
            return module
    raise SiteMismatch(
        f"{type(model).__name__} has no module {projection.module!r}", "find the sites of this very model again"
    )
