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
    from nest_runtime.runtime.mixture import StackedTensors

SMALL = 1 << 20  # multiplications; a CPU's narrow product of fewer takes some 18 µs whatever its size, in float32 4 up
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
    wide: torch.Tensor | None = None  # deltas in float32, where they are narrow and on a CPU


def product(x: torch.Tensor, deltas: torch.Tensor, wide: torch.Tensor | None) -> torch.Tensor:
    """Every cluster's number for every token: [..., K] from x [..., d_in], in x's dtype or wider.

    Args:
        x: the module's input.
        deltas: [K, d_in] in x's dtype.
        wide: the same in float32, or None.
    """
    if wide is not None and x.numel() * len(wide) <= SMALL:
        return F.linear(x.to(wide.dtype), wide)
    return F.linear(x, deltas)


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
        self.stacks: dict[Any, StackedTensors] = {}  # with those of other patches, kept by the first of them
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
        update = product(x, delta.deltas, delta.wide).index_select(-1, delta.clusters)  # (..., n)
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
