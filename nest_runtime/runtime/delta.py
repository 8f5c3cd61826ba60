"""What a patch does to one linear module, in the form that a forward pass uses.

A module's sites (two if gate and up are fused) are merged into one :class:`LinearDelta`. It is built from the patch's
frozen tensors, and cached for one device and dtype at a time. After a model has moved, the next pass builds it again
from the frozen tensors, so that no rounding accumulates. Nothing here knows of tables, modes or weights. Updates of
experts are in expert_delta.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nest_runtime.model.anatomy import Projection, find_projections, module_of
from nest_runtime.patch.patch import Patch, Site

if TYPE_CHECKING:
    from nest_runtime.runtime.fold import FoldRecord

MAX_STACKS = 32  # mixtures of patches that a module remembers
FEW = 16  # tokens; a CPU's narrow product of so many takes 24 µs whatever its size, the one in float32 6
DECODED = 256  # tokens of a batch whose places are remembered: decoded ones come again, prompts do not
Call = tuple[torch.Tensor, ...]  # a module's inputs, each with the tokens first: (x,), or those of experts


@dataclass(frozen=True)
class LiveProjection:
    """One projection and the live module behind it, found once.

    The module object is kept, not its path: wrapping the model later (PEFT, torch.compile) changes
    paths and leaves the module in use. ``projection.module`` is ``""``, relative to ``module``.
    """

    module: nn.Module
    projection: Projection

    @property
    def key(self) -> str:
        """The module's canonical name; gate and up of a fused module share it."""
        return self.projection.name.partition(":")[0]


def live_projections(model: nn.Module) -> dict[str, LiveProjection]:
    """Every patchable projection of a model, by name.

    Raises:
        UnknownArchitecture: no FFN projections are known for it.
    """
    return {p.name: LiveProjection(module_of(model, p), replace(p, module="")) for p in find_projections(model)}


@dataclass(frozen=True)
class DeltaTensors:
    """A module's update on one device: D [K, d_in], and the row, cluster and loading of each patched output."""

    deltas: torch.Tensor  # (K, d_in)
    rows: torch.Tensor  # (n,) int64, rows of the module's output
    clusters: torch.Tensor  # (n,) int64
    loadings: torch.Tensor | None  # (n,), None where all are one
    wide: torch.Tensor | None = None  # deltas in float32, for a few narrow tokens on a CPU

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Every cluster's number for every token: [..., K] from x [..., d_in], in x's dtype or wider."""
        if self.wide is not None and 1 < x.numel() // x.shape[-1] <= FEW:
            return F.linear(x.to(self.wide.dtype), self.wide)
        return F.linear(x, self.deltas)


class ModuleDelta(Protocol):
    """The update of one module, linear or of experts."""

    def apply(self, module: nn.Module, call: Call, y: torch.Tensor, fold: FoldRecord | None) -> torch.Tensor:
        """The module's output with the update added; ``y`` itself is not changed.

        Args:
            module: the module.
            call: its inputs.
            y: its output [..., outputs] as the pristine weights give it.
            fold: what is folded into the weights, or None.

        Returns:
            A new tensor of y's shape and dtype.
        """
        ...


@dataclass(frozen=True)
class Places:
    """Where the numbers of each token's own patch are, among those of all tokens and patches of one module."""

    shared: torch.Tensor  # (m,) int64, in the flat (tokens, ΣK) product
    outputs: torch.Tensor  # (m,) int64, in the flat (tokens, outputs) output
    loadings: torch.Tensor | None  # (m,)


@dataclass(frozen=True)
class StackedTensors:
    """The updates of several patches on one module and device, end to end, so that they take one product together."""

    deltas: torch.Tensor  # (ΣK, d_in)
    rows: torch.Tensor  # (Σn,) int64, rows of the module's output; a row comes once for every patch that changes it
    clusters: torch.Tensor  # (Σn,) int64
    loadings: torch.Tensor | None  # (Σn,), None where all are one
    widths: tuple[int, ...]  # K of each patch, 0 where it leaves the module alone
    counts: torch.Tensor  # (patches + 1,) int64 on the CPU: n of each patch; the last is the base's, 0

    def places(self, owners: tuple[int, ...], outputs: int) -> Places:
        """The places for a batch whose tokens belong to these patches, by number, -1 for the base.

        Args:
            owners: each token's patch.
            outputs: the module's outputs.
        """
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


class LinearDelta:
    """The update of one linear module's outputs: y[..., rows] += loadings · (x Dᵀ)[..., clusters].

    Args:
        sites: the module's non-empty sites with their projections, all of one d_in.
    """

    def __init__(self, sites: Sequence[tuple[Site, Projection]]) -> None:
        self.sites = tuple(sites)
        self.n_clusters = sum(site.n_clusters for site, _ in sites)
        self.n_neurons = sum(site.n_neurons for site, _ in sites)
        self.d_in = sites[0][0].d_in
        self._cached: tuple[torch.device, torch.dtype, DeltaTensors] | None = None
        # With those of other patches, kept by the first of them: mixtures, and places in the batch decoded last.
        self.stacks: dict[Any, StackedTensors] = {}
        self._placed: tuple[StackedTensors, tuple[int, ...], Places] | None = None
        self._outputs: tuple[torch.Tensor, int, int, torch.Tensor] | None = None

    def build(self, device: torch.device | str, dtype: torch.dtype) -> DeltaTensors:
        """The update's tensors from the frozen originals: one rounding, from the file's dtype to ``dtype``."""
        # Not inference tensors even when first needed inside inference_mode: a training pass may come next.
        with torch.inference_mode(False), torch.no_grad():
            deltas, rows, clusters, loadings, first = [], [], [], [], 0
            for site, projection in self.sites:
                deltas.append(site.deltas.tensor().to(dtype))
                rows.append(projection.rows(site.neurons.tensor()))
                clusters.append(site.clusters.tensor().long() + first)
                loadings.append(torch.ones(site.n_neurons) if site.loadings is None else site.loadings.tensor())
                first += site.n_clusters
            tied = all(site.loadings is None for site, _ in self.sites)
            narrow = torch.device(device).type == "cpu" and dtype in (torch.bfloat16, torch.float16)
            return DeltaTensors(
                torch.cat(deltas).to(device),
                torch.cat(rows).to(device),
                torch.cat(clusters).to(device),
                None if tied else torch.cat(loadings).to(device, dtype),
                torch.cat(deltas).to(device, torch.float32) if narrow else None,
            )

    def on(self, device: torch.device, dtype: torch.dtype) -> DeltaTensors:
        """As ``build``, remembered for the device and dtype asked for last."""
        cached = self._cached
        if cached is None or cached[0] != device or cached[1] != dtype:
            cached = (device, dtype, self.build(device, dtype))
            settle([device])
            self._cached = cached
        return cached[2]

    def places(self, stack: StackedTensors, owners: tuple[int, ...], outputs: int) -> Places:
        """As ``StackedTensors.places``; those of the batch decoded last are kept, since its next pass asks for them."""
        placed = self._placed
        if placed is not None and placed[0] is stack and placed[1] == owners:
            return placed[2]
        found = stack.places(owners, outputs)
        if len(owners) <= DECODED:
            self._placed = (stack, owners, found)
        return found

    def outputs(self, rows: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
        """The places of ``rows`` in the flat (tokens, width) output; those of the last shape are kept.

        Returns:
            (tokens · n,) int64.
        """
        kept = self._outputs
        if kept is not None and kept[0] is rows and kept[1:3] == (tokens, width):
            return kept[3]
        with torch.inference_mode(False), torch.no_grad():
            found = (torch.arange(tokens)[:, None] * width + rows).reshape(-1)
        if tokens <= DECODED:
            self._outputs = (rows, tokens, width, found)
        return found

    def apply(self, module: nn.Module, call: Call, y: torch.Tensor, fold: FoldRecord | None) -> torch.Tensor:
        """Add the update; see ``ModuleDelta.apply``. ``call`` is (x,) with x [..., d_in], ``y`` is [..., outputs].

        Returns:
            A new tensor like ``y``. Products are taken in x's dtype (the weight's, autocast aside) or a wider one, with
            the accumulation of the backend's matmul. They are rounded to y's dtype before they are added. In bfloat16
            the update is computed separately from W, and keeps bits that adding it to W would lose.
        """
        x = call[0]
        delta = self.on(x.device, x.dtype)
        update = delta.product(x).index_select(-1, delta.clusters)  # (..., n)
        if delta.loadings is not None:
            update = update * delta.loadings
        update = update.to(y.dtype)
        if y.device.type != "cpu":
            return y.index_add(-1, delta.rows, update)
        width = y.shape[-1]
        places = self.outputs(delta.rows, y.numel() // width, width)
        return add_at(y, places, update.reshape(-1))


def add_at(y: torch.Tensor, places: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """A copy of ``y`` with ``update`` (m,), of its dtype, added at flat ``places`` (m,) int64.

    On a CPU this takes a third of ``index_add`` along the last dimension, which goes slice by slice.
    """
    changed = y.clone(memory_format=torch.contiguous_format)
    changed.view(-1).index_add_(0, places, update)
    return changed


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
    shared = F.linear(x, stack.deltas)  # (tokens, ΣK)
    if x.device.type == "cpu":
        places = first.places(stack, members.owners, y.shape[-1])
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
        ones = [part.deltas.new_ones(len(part.rows)) for _, part in parts]
        factors = [one if part.loadings is None else part.loadings for (_, part), one in zip(parts, ones, strict=True)]
        stacked = StackedTensors(
            torch.cat([part.deltas for _, part in parts]),
            torch.cat([part.rows for _, part in parts]),
            torch.cat(clusters),
            torch.cat(factors) if any(part.loadings is not None for _, part in parts) else None,
            tuple(0 if delta is None else delta.n_clusters for delta in deltas),
            torch.tensor([0 if delta is None else delta.n_neurons for delta in deltas] + [0]),
        )
        settle([device])
        return stacked


@dataclass(frozen=True, eq=False)
class Loaded:
    """A patch in the table, ready for a model; compared by identity.

    Attributes:
        patch: the patch.
        deltas: canonical module name → its update; modules without patched neurons are absent.
        saved: site name → [n, d_in] CPU copy of the pristine rows when the patch was added; a quantized
            site is absent. Folding starts only from weights that still match.
        forced: whether a check of the base was overridden.
    """

    patch: Patch
    deltas: Mapping[str, ModuleDelta]
    saved: Mapping[str, torch.Tensor] = field(default_factory=dict)
    forced: bool = False

    @property
    def full_name(self) -> str:
        """``name@version``, for messages."""
        return self.patch.label


def settle(devices: Iterable[torch.device]) -> None:
    """Wait for work queued on CUDA devices: threads may run on streams of their own."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
