"""A patch's update of a module that holds experts, and its updates of all modules by name.

See nest_runtime/model/experts.py for how a neuron inside such a module is changed from outside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nest_runtime.model.experts import Half, difference, units_of
from nest_runtime.model.projection import Projection
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.runtime.delta import Call, LinearDelta, LiveProjection, ModuleDelta, settle
from nest_runtime.runtime.fold import FoldRecord, read_rows


@dataclass(frozen=True)
class ExpertTensors:
    """The update on one device: the neurons it touches, sorted, and what gate and up get."""

    units: torch.Tensor  # (m,) int64
    gate: Half | None
    up: Half | None


class ExpertsDelta:
    """The update of one experts module's gate and up neurons.

    Args:
        sites: its non-empty sites with their projections.
        projections: gate and up, in this order; both, whichever has a site.
    """

    def __init__(self, sites: Sequence[tuple[Site, Projection]], projections: Sequence[LiveProjection]) -> None:
        self._sites = {projection.kind: site for site, projection in sites}
        self._projections = tuple(projections)
        self._cached: tuple[torch.device, torch.dtype, ExpertTensors] | None = None

    def build(self, device: torch.device, dtype: torch.dtype) -> ExpertTensors:
        """The update's tensors from the patch's frozen ones."""
        with torch.inference_mode(False), torch.no_grad():
            units = units_of([site.neurons.tensor() for site in self._sites.values()])
            halves = {kind: _half(site, units, device, dtype) for kind, site in self._sites.items()}
            return ExpertTensors(units.to(device), halves.get("gate"), halves.get("up"))

    def apply(self, module: nn.Module, call: Call, y: torch.Tensor, fold: FoldRecord | None) -> torch.Tensor:
        """Add the update; see ``ModuleDelta.apply``. ``call`` is what ``experts.routed`` gives, ``y`` is [..., d].

        Returns:
            A new tensor of y's shape and dtype.
        """
        x, chosen, weights = call
        cached = self._cached
        if cached is None or cached[0] != x.device or cached[1] != x.dtype:
            cached = (x.device, x.dtype, self.build(x.device, x.dtype))
            settle([x.device])
            self._cached = cached
        tensors = cached[2]
        gate, up = (_rows(live, tensors.units, fold) for live in self._projections)
        base = (gate, up)
        added = difference(module, (x, chosen, weights), tensors.units, base, base, tensors.gate, tensors.up)
        return y + added.reshape(y.shape).to(y.dtype)


def module_deltas(patch: Patch, projections: Mapping[str, LiveProjection]) -> dict[str, ModuleDelta]:
    """A patch's updates by canonical module name; its sites must be among ``projections``."""
    sites: dict[str, list[tuple[Site, Projection]]] = {}
    for site in patch.sites:
        if site.n_neurons:
            live = projections[site.name]
            sites.setdefault(live.key, []).append((site, live.projection))
    return {key: _module_delta(key, found, projections) for key, found in sites.items()}


def _module_delta(
    key: str, sites: Sequence[tuple[Site, Projection]], projections: Mapping[str, LiveProjection]
) -> ModuleDelta:
    if not sites[0][1].experts:
        return LinearDelta(sites)
    by_kind = {live.projection.kind: live for live in projections.values() if live.key == key}
    return ExpertsDelta(sites, (by_kind["gate"], by_kind["up"]))


def _half(site: Site, units: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Half:
    loadings = None if site.loadings is None else site.loadings.tensor().to(dtype)
    neurons, clusters = site.neurons.tensor().long(), site.clusters.tensor().long()
    half = Half.of(units, neurons, clusters, site.deltas.tensor().to(dtype), loadings)
    return Half(half.deltas.to(device), half.clusters.to(device), half.loadings.to(device))


def _rows(live: LiveProjection, units: torch.Tensor, fold: FoldRecord | None) -> torch.Tensor:
    """Pristine rows (m, d_in) of one projection."""
    return read_rows(live, units) if fold is None else fold.rows(live, units)
