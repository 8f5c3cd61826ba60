"""A patch as low-rank pairs: ΔW = B·A for every module it changes, exactly.

A site's update M·D (docs/reference/patch-format.md) is a LoRA with A = D, B = M and scaling 1. Both sites of a
fused module stack: A holds both sets of cluster rows, B has each site's columns in its own rows. Experts take the
form of PEFT's ``target_parameters``: the same A for every expert, one B for each. All numbers are float32,
which holds every dtype of a patch exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from nest_runtime.errors import ExportError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.projection import Projection
from nest_runtime.patch.patch import Patch, Site, check_sites


@dataclass(frozen=True)
class Pair:
    """The update of one module.

    Attributes:
        module: its canonical name.
        parameter: name of the weight in it; ``weight`` unless it holds experts.
        sites: the sites in it, in the order of their columns.
        a: A [r, d_in]; of experts [r·experts, d_in], expert by expert.
        b: B [outputs, r]; of experts [outputs, r·experts], column k·experts + e for column k of expert e.
        experts: how many; 0 for a linear module.
    """

    module: str
    parameter: str
    sites: tuple[Site, ...]
    a: torch.Tensor
    b: torch.Tensor
    experts: int = 0

    @property
    def rank(self) -> int:
        """The adapter's rank r: the rows of A, per expert."""
        return self.a.shape[0] // max(self.experts, 1)

    def padded(self, rank: int) -> Pair:
        """The same update with zeros up to a rank; linear modules only."""
        more = rank - self.rank
        a = torch.cat([self.a, torch.zeros(more, self.a.shape[1])])
        return replace(self, a=a, b=torch.cat([self.b, torch.zeros(self.b.shape[0], more)], dim=1))


def layout_of(patch: Patch, model: nn.Module | None = None) -> dict[str, Projection]:
    """Where each site of a patch lies in its module.

    Args:
        patch: the patch.
        model: the base, in memory or on the meta device. Needed where the patch changes experts: how many there are
            and how their weights lie is not in a patch.

    Raises:
        ExportError: the patch changes experts and no model was given.
        SiteMismatch: the model has other sites.
    """
    if model is not None:
        projections = find_projections(model)
        check_sites(patch, projections)
        return {projection.name: projection for projection in projections}
    experts = [site.name for site in patch.sites if ".experts." in site.name]
    if experts:
        raise ExportError(
            f"{patch.label} changes experts ({experts[0]}), whose layout is the model's",
            "give the base model too: model=, or --model on the command line",
        )
    return {site.name: _guess(site) for site in patch.sites}


def pairs_of(patch: Patch, layout: Mapping[str, Projection]) -> list[Pair]:
    """A patch's updates, module by module, empty sites left out; raises ExportError if it changes nothing."""
    modules: dict[str, list[Site]] = {}
    for site in patch.sites:
        if site.n_neurons:
            modules.setdefault(layout[site.name].tensor, []).append(site)
    if not modules:
        raise ExportError(f"{patch.label} changes no neuron", "export a patch that does something")
    return [_pair(sites, layout) for sites in modules.values()]


def _guess(site: Site) -> Projection:
    """What a site's name says of its module: gate and up of a fused one lie one after the other."""
    whole, _, kind = site.name.partition(":")
    return Projection(site.name, 0, kind or "fc", whole, site.d_in, site.d_out, site.d_out if kind == "up" else 0)


def outputs_of(projection: Projection) -> int:
    """Outputs of the module behind a projection, or of one of its experts: of gate and up where it is fused."""
    return projection.each * (2 if ":" in projection.name else 1)


def b_index(
    neurons: torch.Tensor, clusters: torch.Tensor, projection: Projection, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the loadings of neurons [n] (int32) stand in B [experts, outputs, r]: three indices, int64.

    Their clusters begin at column ``start``.
    """
    return projection.expert_of(neurons), projection.rows(neurons), clusters.long() + start


def _pair(sites: list[Site], layout: Mapping[str, Projection]) -> Pair:
    first = layout[sites[0].name]
    rank = sum(site.n_clusters for site in sites)
    a = torch.cat([site.deltas.tensor().float() for site in sites])  # (r, d_in)
    b = torch.zeros(max(first.experts, 1), outputs_of(first), rank)
    start = 0
    for site in sites:
        loadings = torch.ones(site.n_neurons) if site.loadings is None else site.loadings.tensor()
        index = b_index(site.neurons.tensor(), site.clusters.tensor(), layout[site.name], start)
        b[index] = loadings
        start += site.n_clusters
    module = first.tensor.removesuffix(f".{first.parameter}")
    if not first.experts:
        return Pair(module, first.parameter, tuple(sites), a, b[0])
    a = a.repeat(first.experts, 1)
    b = b.permute(1, 2, 0).reshape(outputs_of(first), rank * first.experts)
    return Pair(module, first.parameter, tuple(sites), a, b, first.experts)
