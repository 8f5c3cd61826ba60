"""What the pictures of neurons show, the same for a sites file and for a patch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.patch.site import Site
    from nest_runtime.train.sites import LocatedSite, SitesFile

KIND_NAMES = ("gate", "up", "fc")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|:|$)")


@dataclass(frozen=True)
class SiteView:
    """One projection and its kept neurons.

    Attributes:
        name: the projection's.
        layer: index of its decoder layer.
        kind: ``gate``, ``up`` or ``fc``.
        d_out: neurons of the projection, kept or not.
        neurons: indices of the kept ones [n] int64.
        clusters: of each one [n] int64.
        z: their z-scores [n] float64, or None.
        loadings: [n] float64, or None if rows are tied.
        norms: L2 norm of each one's row update [n] float64, or None before training.
        silhouette, probe_accuracy, threshold: of locating and clustering, or None.
    """

    name: str
    layer: int
    kind: str
    d_out: int
    neurons: np.ndarray
    clusters: np.ndarray
    z: np.ndarray | None = None
    loadings: np.ndarray | None = None
    norms: np.ndarray | None = None
    silhouette: float | None = None
    probe_accuracy: float | None = None
    threshold: float | None = None

    @property
    def n_clusters(self) -> int:
        """The number of clusters at this site."""
        return int(self.clusters.max()) + 1 if len(self.clusters) else 0

    @property
    def update_norm(self) -> float | None:
        """Frobenius norm of the projection's update, or None before training."""
        return None if self.norms is None else float(np.sqrt((self.norms**2).sum()))


@dataclass(frozen=True)
class NeuronView:
    """All projections of a model that locating looked at, in the model's order, and what to call them.

    Attributes:
        title: for the picture.
        sites: the projections.
        recipe: the settings they were located with, as JSON values.
        base_hash, base_model: the model.
    """

    title: str
    sites: tuple[SiteView, ...]
    recipe: dict[str, Any]
    base_hash: str = ""
    base_model: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of projections there are, gate first."""
        there = {site.kind for site in self.sites}
        return tuple(kind for kind in KIND_NAMES if kind in there)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are, in order."""
        return tuple(sorted({site.layer for site in self.sites}))

    def of(self, kind: str) -> Sequence[SiteView]:
        """The projections of a kind, by layer."""
        return sorted((site for site in self.sites if site.kind == kind), key=lambda site: site.layer)


def view_of_patch(patch: Patch) -> NeuronView:
    """A patch as a view: with loadings and the norms of its row updates."""
    recipe = patch.header()["method"].get("recipe", {})
    return NeuronView(
        patch.label,
        tuple(_patch_site(site) for site in patch.sites),
        recipe if isinstance(recipe, dict) else {},
        patch.base_hash,
        patch.base_model,
    )


def view_of_sites(file: SitesFile, title: str) -> NeuronView:
    """A sites file as a view: nothing is trained yet."""
    sites = tuple(_located_site(site) for site in file.sites)
    return NeuronView(title, sites, dict(file.settings), file.base_hash, file.base_model)


def layer_and_kind(name: str) -> tuple[int, str]:
    """The layer and kind of a projection, by its canonical name (anatomy.Projection.name)."""
    found = _LAYER.search(name)
    leaf = name.rsplit(".", 1)[-1]
    kind = next((kind for kind in ("gate", "up") if leaf in (f"{kind}_proj", kind) or leaf.endswith(f":{kind}")), "fc")
    return int(found[1]) if found else 0, kind


def _patch_site(site: Site) -> SiteView:
    layer, kind = layer_and_kind(site.name)
    stats = site.stats
    return SiteView(
        site.name,
        layer,
        kind,
        site.d_out,
        site.neurons.tensor().numpy().astype(np.int64),
        site.clusters.tensor().numpy().astype(np.int64),
        None if site.z is None else site.z.tensor().numpy().astype(np.float64),
        None if site.loadings is None else site.loadings.tensor().numpy().astype(np.float64),
        site.row_deltas().norm(dim=1).numpy().astype(np.float64),
        *(_number(stats.get(key)) for key in ("silhouette", "probe_accuracy", "threshold")),
    )


def _located_site(site: LocatedSite) -> SiteView:
    return SiteView(
        site.site,
        site.layer,
        site.kind,
        site.d_out,
        np.asarray(site.neurons, dtype=np.int64),
        np.asarray(site.clusters or [0] * len(site.neurons), dtype=np.int64),
        np.asarray(site.z, dtype=np.float64),
        None,
        None,
        site.silhouette,
        site.probe_accuracy,
        site.threshold,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
