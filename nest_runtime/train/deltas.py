"""The trained numbers: cluster rows and loadings in float32, added to the base by differentiable hooks.

For every site, y[…, neurons] += a · (x Dᵀ)[…, clusters]. The base's weights get no gradient, and only their own layer
reads them. These hooks are for training; those for serving are in runtime/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nest_runtime.model.anatomy import Projection, is_experts, module_of, read_rows
from nest_runtime.model.experts import Half, difference, routed, units_of
from nest_runtime.train.forward import checkpointed
from nest_runtime.train.sites import LocatedSite

MASKED = 0.1  # a learned loading smaller than this leaves its neuron out, where the recipe asks for it


@dataclass
class SiteDelta:
    """One site's numbers: ``deltas`` [K, d_in]; ``loadings`` [n] or None; ``scale``, the RMS of its base rows."""

    site: LocatedSite
    projection: Projection
    deltas: torch.Tensor
    loadings: torch.Tensor | None
    neurons: torch.Tensor
    clusters: torch.Tensor
    scale: float


class Deltas:
    """All sites' trainable numbers on one model; sites without neurons have none.

    Args:
        model: the frozen base.
        projections: of the model.
        sites: located and clustered; their order is the projections'.
        loadings: ``tied``, ``signed`` or ``learned`` (settings.Recipe).
        starts: starting values by site name: (deltas, loadings or None).
    """

    def __init__(
        self,
        model: Any,
        projections: Sequence[Projection],
        sites: Sequence[LocatedSite],
        loadings: str,
        starts: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    ) -> None:
        by_name = {projection.name: projection for projection in projections}
        self.model, self.enabled, self.learned = model, True, loadings == "learned"
        self.projections = tuple(projections)
        self.sites = [
            _site_delta(model, by_name[site.site], site, loadings, (starts or {}).get(site.site))
            for site in sites
            if site.neurons
        ]
        for site in self.sites:
            site.deltas.requires_grad_(True)
            if self.learned and site.loadings is not None:
                site.loadings.requires_grad_(True)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every number by name, trained or fixed: ``deltas`` [K, d_in] and ``loadings`` [n] of each site, float32."""
        found = {f"{site.site.site}.deltas": site.deltas for site in self.sites}
        found.update({f"{p.site.site}.loadings": p.loadings for p in self.sites if p.loadings is not None})
        return found

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.requires_grad)

    @property
    def lowest(self) -> Projection | None:
        """A projection of the lowest layer that changes; None if no layer does."""
        return min((site.projection for site in self.sites), key=lambda found: found.layer, default=None)

    def copy(self) -> dict[str, torch.Tensor]:
        """A detached copy of every number, by name; shapes and dtypes as in ``tensors``."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite every number in place; names, shapes and dtypes as in ``tensors``."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(values[name].to(tensor.device))

    def add_mask_gradient(self, weight: float) -> None:
        """Add the gradient of ``weight`` · mean |loading| to the loadings' gradients, as Recipe.mask_weight asks."""
        learned = [site.loadings for site in self.sites if site.loadings is not None]
        count = sum(loadings.numel() for loadings in learned)
        for loadings in learned:
            pull = weight / count * loadings.detach().sign()
            loadings.grad = pull if loadings.grad is None else loadings.grad + pull

    def mask(self) -> None:
        """Set loadings below ``MASKED`` to 0, one of every site excepted: an update without neurons is none."""
        with torch.no_grad():
            for site in self.sites:
                if site.loadings is not None:
                    small = site.loadings.abs() < MASKED
                    small[site.loadings.abs().argmax()] = False
                    site.loadings[small] = 0.0

    def scale(self, factor: float) -> None:
        """Multiply every cluster row: an update of another strength."""
        with torch.no_grad():
            for site in self.sites:
                site.deltas.mul_(factor)

    def round_to(self, dtype: torch.dtype) -> None:
        """Round the cluster rows to the values that a patch of ``dtype`` ships."""
        with torch.no_grad():
            for site in self.sites:
                site.deltas.copy_(site.deltas.to(dtype).float())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which the deltas act on the model while ``enabled`` is true; hooks are removed afterwards.

        Layers that checkpoint their activations do so inside (forward.checkpointed).
        """
        by_module: dict[nn.Module, list[SiteDelta]] = {}
        for site in self.sites:
            by_module.setdefault(module_of(self.model, site.projection), []).append(site)
        handles = [
            module.register_forward_hook(self._experts_hook(sites), with_kwargs=True)
            if is_experts(module)
            else module.register_forward_hook(self._hook(sites))
            for module, sites in by_module.items()
        ]
        try:
            with checkpointed(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, sites: list[SiteDelta]) -> Any:
        outputs = [site.projection.rows(site.neurons) for site in sites]

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            """Add the updates to a linear module's output [..., outputs], in its dtype."""
            if not self.enabled:
                return output
            x, low_from = inputs[0], 0
            stacked = torch.cat([site.deltas for site in sites]).to(x.dtype)  # (all clusters, d_in)
            low = nn.functional.linear(x, stacked)  # (…, all clusters)
            for site, rows in zip(sites, outputs, strict=True):
                values = low[..., low_from + site.clusters]  # (…, neurons)
                if site.loadings is not None:
                    values = values * site.loadings.to(x.dtype)
                # In place: a copy as wide as the module's output would live until the backward pass.
                output.index_add_(-1, rows, values)
                low_from += len(site.deltas)
            return output

        return add

    def _experts_hook(self, sites: list[SiteDelta]) -> Any:
        units = units_of([site.neurons for site in sites])
        both = [_of_kind(self.projections, sites[0].projection, kind) for kind in ("gate", "up")]

        def add(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            """Add what the updates change in the output [..., d] of an experts module, in its dtype."""
            if not self.enabled:
                return output
            gate, up = (read_rows(module, replace(projection, module=""), units) for projection in both)
            halves = {
                site.projection.kind: Half.of(units, site.neurons, site.clusters, site.deltas, site.loadings)
                for site in sites
            }
            call, rows = routed(args, kwargs), (gate, up)
            added = difference(module, call, units, rows, rows, halves.get("gate"), halves.get("up"))
            return output + added.reshape(output.shape).to(output.dtype)

        return add


def _of_kind(projections: Sequence[Projection], like: Projection, kind: str) -> Projection:
    """The gate or the up projection of the experts that ``like`` belongs to."""
    return next(p for p in projections if p.tensor == like.tensor and p.kind == kind)


def _site_delta(
    model: Any,
    projection: Projection,
    site: LocatedSite,
    loadings: str,
    starts: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> SiteDelta:
    device = next(module_of(model, projection).parameters()).device
    neurons = torch.tensor(site.neurons, dtype=torch.long, device=device)
    base = read_rows(model, projection, neurons).float()
    values = None if loadings == "tied" else torch.where(torch.tensor(site.z) < 0, -1.0, 1.0)
    deltas = torch.zeros(site.n_clusters, site.d_in)
    if starts is not None:
        deltas, given = starts
        values = given if given is not None else (None if loadings == "tied" else torch.ones(len(neurons)))
    return SiteDelta(
        site=site,
        projection=projection,
        deltas=deltas.detach().clone().float().to(device),
        loadings=None if values is None else values.detach().clone().float().to(device),
        neurons=neurons,
        clusters=torch.tensor(site.clusters, dtype=torch.long, device=device),
        scale=float(base.square().mean().sqrt()),
    )
