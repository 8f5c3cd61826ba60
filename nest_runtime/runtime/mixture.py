"""Mixtures: a batch in which every token has its own patch, computed in one pass.

The updates of all patches on one module are stacked end to end, and take one product together. What a batch needs of it
is worked out once, and kept while the same batch is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nest_runtime.runtime.delta import DECODED, LinearDelta, add_at, product, settle

MAX_STACKS = 32  # mixtures of patches that a module remembers


@dataclass(frozen=True)
class Places:
    """Where the numbers of each token's own patch are, among those of all tokens and patches of one module."""

    shared: torch.Tensor  # (m,) int64, in the flat (tokens, ΣK) product
    outputs: torch.Tensor  # (m,) int64, in the flat (tokens, outputs) output
    loadings: torch.Tensor | None  # (m,)


@dataclass(eq=False)
class StackedTensors:
    """The updates of several patches on one module and device, end to end, so that they take one product together."""

    deltas: torch.Tensor  # (ΣK, d_in)
    rows: torch.Tensor  # (Σn,) int64, rows of the module's output; a row comes once for every patch that changes it
    clusters: torch.Tensor  # (Σn,) int64
    loadings: torch.Tensor | None  # (Σn,), None where all are one
    widths: tuple[int, ...]  # K of each patch, 0 where it leaves the module alone
    counts: torch.Tensor  # (patches + 1,) int64 on the CPU: n of each patch; the last is the base's, 0
    wide: torch.Tensor | None = None  # deltas in float32, where they are narrow and on a CPU
    _placed: tuple[tuple[int, ...], Places] | None = field(default=None, init=False)

    def places(self, owners: tuple[int, ...], outputs: int) -> Places:
        """The places for a batch whose tokens belong to these patches; the last ones are kept for the next pass.

        Args:
            owners: each token's patch by number, -1 for the base.
            outputs: the module's outputs.
        """
        placed = self._placed
        if placed is not None and placed[0] == owners:
            return placed[1]
        found = self._places(owners, outputs)
        if len(owners) <= DECODED:
            self._placed = (owners, found)
        return found

    def _places(self, owners: tuple[int, ...], outputs: int) -> Places:
        with torch.inference_mode(False), torch.no_grad():
            owner = torch.tensor(owners)
            each = self.counts[owner]
            token = torch.arange(len(owners)).repeat_interleave(each)
            first = (self.counts.cumsum(0) - self.counts)[owner] - (each.cumsum(0) - each)
            entry = first.repeat_interleave(each) + torch.arange(len(token))
            return Places(
                token * len(self.deltas) + self.clusters[entry],
                token * outputs + self.rows[entry],
                None if self.loadings is None else self.loadings[entry],
            )


class Members:
    """Which token of a flat batch is computed under which patch; valid for one pass.

    Args:
        owners: each token's patch by number, -1 for the base.
        patches: how many patches there are.
        device: where the batch is.
    """

    def __init__(self, owners: Sequence[int], patches: int, device: torch.device) -> None:
        self.owners = tuple(owners)
        self._patches = patches
        self._device = device
        self._others: dict[tuple[int, ...], torch.Tensor] = {}

    def others(self, widths: tuple[int, ...]) -> torch.Tensor:
        """(tokens, Σ widths) bool: whether a column is of a patch that is not the token's, ``widths`` columns each.

        Most modules of a model ask with the same widths: worked out once for them.
        """
        found = self._others.get(widths)
        if found is None:
            rows = [
                [owner != number for number, width in enumerate(widths) for _ in range(width)]
                for owner in range(-1, self._patches)
            ]
            table = torch.tensor(rows)  # a row for the base, and one for each patch
            index = torch.tensor([owner + 1 for owner in self.owners])
            found = self._others[widths] = table.index_select(0, index).to(self._device)
        return found


def add_mixed(deltas: Sequence[LinearDelta | None], members: Members, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A linear module's outputs when every token has its own patch; ``y`` is never written to.

    Each patch's product is computed for all tokens. These few extra rows of arithmetic cost less than sorting tokens by
    patch and back at every module. On a CPU only the numbers of each token's own patch are then taken from it. On other
    devices, where small operations cost more than their arithmetic, the others are set to zero.

    Args:
        deltas: each patch's update, None if it leaves this module alone.
        members: which token belongs to which patch, by number in ``deltas``.
        x: the module's input (tokens, d_in).
        y: its output (tokens, outputs) as the pristine weights give it.

    Returns:
        (tokens, outputs) in y's dtype.
    """
    first = next((delta for delta in deltas if delta is not None), None)
    if first is None:
        return y
    key = (tuple(deltas), x.device, x.dtype)
    stack = first.stacks.get(key)
    if stack is None:
        if len(first.stacks) >= MAX_STACKS:
            first.stacks.clear()
        stack = first.stacks[key] = _stack(*key)
    shared = product(x, stack.deltas, stack.wide)  # (tokens, ΣK)
    if x.device.type == "cpu":
        places = stack.places(members.owners, y.shape[-1])
        update = shared.reshape(-1).index_select(0, places.shared)  # (m,)
        if places.loadings is not None:
            update = update * places.loadings
        return add_at(y, places.outputs, update.to(y.dtype))
    shared = shared.masked_fill(members.others(stack.widths), 0.0)
    update = shared.index_select(-1, stack.clusters)  # (tokens, Σn)
    if stack.loadings is not None:
        update = update * stack.loadings
    return y.index_add(-1, stack.rows, update.to(y.dtype))


def _stack(deltas: Sequence[LinearDelta | None], device: torch.device, dtype: torch.dtype) -> StackedTensors:
    parts = [(number, delta.on(device, dtype)) for number, delta in enumerate(deltas) if delta is not None]
    with torch.inference_mode(False), torch.no_grad():
        clusters, first = [], 0
        for _, part in parts:
            clusters.append(part.clusters + first)
            first += len(part.deltas)
        wide = [part.wide for _, part in parts if part.wide is not None]
        ones = [part.deltas.new_ones(len(part.rows)) for _, part in parts]
        factors = [one if part.loadings is None else part.loadings for (_, part), one in zip(parts, ones, strict=True)]
        stacked = StackedTensors(
            torch.cat([part.deltas for _, part in parts]),
            torch.cat([part.rows for _, part in parts]),
            torch.cat(clusters),
            torch.cat(factors) if any(part.loadings is not None for _, part in parts) else None,
            tuple(0 if delta is None else delta.n_clusters for delta in deltas),
            torch.tensor([0 if delta is None else delta.n_neurons for delta in deltas] + [0]),
            torch.cat(wide) if len(wide) == len(parts) else None,
        )
        settle([device])
        return stacked
