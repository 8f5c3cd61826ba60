"""Reading and writing the weights of single neurons in a live model, whatever the layout of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nest_runtime.errors import ModelError
from nest_runtime.model.projection import Projection, module_of, shape_of
from nest_runtime.model.row_bytes import RowBytes


def read_rows(model: nn.Module, projection: Projection, neurons: torch.Tensor) -> torch.Tensor:
    """A copy of the weights of some neurons.

    Args:
        model: the model the projection belongs to.
        projection: from ``find_projections``.
        neurons: [n] integer indices in [0, d_out).

    Returns:
        [n, d_in] in the weight's dtype, on its device.

    Raises:
        ModelError: the weight is quantized, or not in memory.
    """
    weight = _plain_weight(model, projection)
    neurons = neurons.to(weight.device, torch.long)
    rows = projection.rows(neurons)
    with torch.no_grad():
        if projection.experts:
            experts = projection.expert_of(neurons)
            return weight.detach()[experts, rows] if _is_row(projection) else weight.detach()[experts, :, rows]
        if _is_row(projection):
            return weight.detach().index_select(0, rows)
        return weight.detach().index_select(1, rows).t().contiguous()


def write_rows(model: nn.Module, projection: Projection, neurons: torch.Tensor | RowBytes, rows: Any) -> None:
    """Overwrite the weights of some neurons in place, without autograd.

    Args:
        model: the model the projection belongs to.
        projection: from ``find_projections``.
        neurons: [n] integer indices in [0, d_out), each once; or their rows where they were found before.
        rows: a tensor [n, d_in], converted to the weight's dtype and device; or, for rows found before, their bits.

    Raises:
        ModelError: the weight is quantized, or not in memory.
    """
    if isinstance(neurons, RowBytes):
        neurons.write(rows)
        return
    weight = _plain_weight(model, projection)
    neurons = neurons.to(weight.device, torch.long)
    index = projection.rows(neurons)
    rows = rows.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        if projection.experts:
            experts = projection.expert_of(neurons)
            where = (experts, index) if _is_row(projection) else (experts, slice(None), index)
            weight.data[where] = rows
        elif _is_row(projection):
            weight.data.index_copy_(0, index, rows)
        else:
            weight.data.index_copy_(1, index, rows.t())


def weight_of(module: nn.Module, projection: Projection) -> torch.Tensor | None:
    """The live weight [d_out, d_in] of a projection as the module stores it, in any dtype.

    None if it is packed under other names.
    """
    weight = getattr(module, projection.parameter, None)
    return weight if isinstance(weight, torch.Tensor) else None


def _is_row(projection: Projection) -> bool:
    return projection.layout == "linear"


def _plain_weight(model: nn.Module, projection: Projection) -> torch.Tensor:
    module = module_of(model, projection)
    weight = weight_of(module, projection)
    expected = _expected_shape(module, projection)
    plain = weight is not None and type(weight.data) is torch.Tensor and weight.is_floating_point()
    if weight is None or weight.is_meta or not plain or tuple(weight.shape) != expected:
        found = "absent" if weight is None else f"{type(weight).__name__} {weight.dtype} {list(weight.shape)}"
        state = "not in memory" if weight is not None and weight.is_meta else found
        raise ModelError(
            f"the weight of {projection.name} is {state}; expected plain floating point {list(expected)}",
            "rows can be read and folded in an unquantized model only; use hook mode on a quantized one",
        )
    return weight


def _expected_shape(module: nn.Module, projection: Projection) -> tuple[int, ...]:
    if projection.experts:
        outputs = 2 * projection.each  # gate and up
        last = (outputs, projection.d_in) if _is_row(projection) else (projection.d_in, outputs)
        return (projection.experts, *last)
    outputs, inputs, _ = shape_of(module)
    return (outputs, inputs) if _is_row(projection) else (inputs, outputs)
