"""Neurons inside a module that computes all experts of a layer at once (transformers 5).

Their pre-activations never leave the module, so an update of them cannot be added to an output, as it is
at a linear module. But it changes few neurons, and what those contribute to the module's output can be
computed beside it: once as the weights have them, once as they should be. The difference is added.
That holds for every implementation of the experts (eager, grouped or batched products).
Shapes: T tokens, k experts a token, m neurons looked at; F neurons an expert. See docs/guide/models.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Rows = tuple[torch.Tensor, torch.Tensor]  # of gate and of up, (m, d_in) each
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Half:
    """The update of gate or of up, laid out by unit: Δ(x) = (x Dᵀ)[:, clusters] · loadings.

    Attributes:
        deltas: D [K, d_in].
        clusters: [m] int64.
        loadings: [m]; 0 for units that this half leaves alone.
    """

    deltas: torch.Tensor
    clusters: torch.Tensor
    loadings: torch.Tensor

    @classmethod
    def of(
        cls,
        units: torch.Tensor,
        neurons: torch.Tensor,
        clusters: torch.Tensor,
        deltas: torch.Tensor,
        loadings: torch.Tensor | None,
    ) -> Half:
        """Spread a site's clusters [n] and loadings [n] over the units [m]; indices are int64.

        Differentiable in deltas and loadings, whose dtype it keeps.
        """
        where = torch.searchsorted(units, neurons)
        spread = torch.zeros(len(units), dtype=torch.long, device=deltas.device).index_put((where,), clusters)
        values = torch.ones(len(neurons), dtype=deltas.dtype, device=deltas.device) if loadings is None else loadings
        weights = torch.zeros(len(units), dtype=deltas.dtype, device=deltas.device).index_put((where,), values)
        return cls(deltas, spread, weights)

    def update(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        """Δ (t, units of the part) for inputs x (t, d_in), in x's dtype."""
        return F.linear(x, self.deltas.to(x.dtype))[:, self.clusters[part]] * self.loadings[part].to(x.dtype)


def routed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routed:
    """Hidden states (T, d), chosen experts (T, k) and their weights (T, k) of one call of an experts module."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    x, *rest = tensors
    chosen = next(value for value in rest if not value.is_floating_point())
    weights = next(value for value in rest if value.is_floating_point())
    return x.reshape(-1, x.shape[-1]), chosen, weights


def units_of(neurons: Sequence[torch.Tensor]) -> torch.Tensor:
    """The hidden neurons [m] int64 that some lists of gate and up neurons touch: sorted, each once."""
    return torch.unique(torch.cat(list(neurons)).long())


def difference(
    module: nn.Module,
    call: Routed,
    units: torch.Tensor,
    have: Rows,
    base: Rows,
    gate: Half | None = None,
    up: Half | None = None,
) -> torch.Tensor:
    """What to add to the module's output so that some neurons count with other weights.

    Args:
        module: the experts.
        call: its inputs, from ``routed``.
        units: [m] neurons, sorted, numbered across experts.
        have: their rows as the module computed with them.
        base: their rows as they should be, before the updates ``gate`` and ``up``.
        gate, up: updates on top of ``base``.

    Returns:
        (T, d) in the dtype of the hidden states.
    """
    x, chosen, weights = call
    total = torch.zeros_like(x)
    for expert, part, index in _by_expert(module, units):
        token, choice = torch.where(chosen == expert)
        if not len(token):
            continue
        inputs = x[token]  # (t, d)
        before = [_linear(module, inputs, rows[part], expert, index, half) for half, rows in enumerate(have)]
        after = before
        if base is not have:
            after = [_linear(module, inputs, rows[part], expert, index, half) for half, rows in enumerate(base)]
        after = [
            value if half is None else value + half.update(inputs, part)
            for value, half in zip(after, (gate, up), strict=True)
        ]
        change = _gated(module, *after) - _gated(module, *before)  # (t, units of this expert)
        out = change @ _down(module, expert, index).to(x.dtype) * weights[token, choice, None]
        total = total.index_add(0, token, out.to(total.dtype))
    return total


def first_outputs(module: nn.Module, call: Routed) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that some token is routed to: its number, those tokens (t,), its raw gate and up outputs (t, 2F).

    Tokens are int64, outputs in the dtype of the hidden states.
    """
    x, chosen, _ = call
    weight: torch.Tensor = module.gate_up_proj  # type: ignore[assignment]
    for expert in range(len(weight)):
        token = torch.where(chosen == expert)[0]
        if len(token):
            matrix = weight[expert].t() if module.is_transposed else weight[expert]
            bias = module.gate_up_proj_bias[expert] if module.has_bias else None  # type: ignore[index]
            yield expert, token, F.linear(x[token], matrix, bias)


def _by_expert(module: nn.Module, units: torch.Tensor) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Each expert among some sorted units [m]: its number, its slice of them, and their numbers within it."""
    each = _neurons_each(module)
    experts, counts = torch.unique_consecutive(units // each, return_counts=True)
    start = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        yield expert, slice(start, start + count), units[start : start + count] % each
        start += count


def _neurons_each(module: nn.Module) -> int:
    weight: torch.Tensor = module.gate_up_proj  # type: ignore[assignment]
    return weight.shape[-1 if module.is_transposed else -2] // 2


def _linear(
    module: nn.Module, x: torch.Tensor, rows: torch.Tensor, expert: int, index: torch.Tensor, half: int
) -> torch.Tensor:
    bias = None
    if module.has_bias:
        row = half * _neurons_each(module) + index if module.is_concatenated else 2 * index + half
        bias = module.gate_up_proj_bias[expert, row].to(x.dtype)  # type: ignore[index]
    return F.linear(x, rows.to(x.dtype), bias)


def _gated(module: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The module's own gating of some neurons' gate and up (t, m)."""
    both = torch.cat((gate, up), dim=-1) if module.is_concatenated else torch.stack((gate, up), dim=-1).flatten(-2)
    return module._apply_gate(both)  # type: ignore[operator]


def _down(module: nn.Module, expert: int, index: torch.Tensor) -> torch.Tensor:
    """Rows (m, d) that some neurons of an expert write into the output."""
    weight: torch.Tensor = module.down_proj  # type: ignore[assignment]
    return weight[expert, index] if module.is_transposed else weight[expert][:, index].t()
