"""Starting from a parent patch: its neurons and rows taken over as they are, or carried to newly located ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nest_runtime.errors import BaseMismatch, SiteMismatch, UsageError
from nest_runtime.model.anatomy import Projection
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.train.sites import LocatedSite

WarmStart = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
DROPPED_SHARE = 0.01  # of a site's squared update: what neurons that are located no more may take with them


@dataclass(frozen=True)
class Moved:
    """A patch brought to another model: where its neurons are now, and what it starts from.

    Attributes:
        sites: the patch's neurons and those located besides, in the model's order.
        starts: starting values by site.
        carried: share of the patch's squared norm that they keep.
        kept, added, dropped: neurons taken over, located besides, and left out.
    """

    sites: tuple[LocatedSite, ...]
    starts: WarmStart
    carried: float
    kept: int
    added: int
    dropped: int


def check_parent(parent: Patch, projections: Sequence[Projection], base_hash: str) -> None:
    """Raise where the parent was made for another base, or has a site that this model lacks."""
    if parent.base_hash != base_hash:
        raise BaseMismatch(
            f"parent {parent.label} is for base {parent.base_hash}; this model is {base_hash}",
            "re-tune a patch on the base it was made for; `nest-runtime retarget` brings one to a fine-tuned sibling",
        )
    check_shapes(parent, projections)


def check_sibling(parent: Patch, projections: Sequence[Projection], base_hash: str) -> None:
    """Raise where the parent was made for this very base, or has a site that this model lacks."""
    if parent.base_hash == base_hash:
        raise UsageError(
            f"{parent.label} is for this very model ({base_hash}); expected a fine-tuned sibling of it",
            "re-tune it with `nest-runtime train --from`, or name the fine-tuned model",
        )
    check_shapes(parent, projections)


def check_shapes(parent: Patch, projections: Sequence[Projection]) -> None:
    """Raise SiteMismatch if the parent has a site that this model lacks, or has in another shape."""
    shapes = {projection.name: (projection.d_out, projection.d_in) for projection in projections}
    for site in parent.sites:
        if shapes.get(site.name) != (site.d_out, site.d_in):
            raise SiteMismatch(
                f"parent site {site.name} is [{site.d_out}, {site.d_in}]; the model has {shapes.get(site.name)}",
                "name a model of the same architecture and size",
            )


def parent_sites(parent: Patch, projections: Sequence[Projection]) -> tuple[LocatedSite, ...]:
    """The parent's neurons and clusters as located sites; projections it leaves out become empty sites."""
    known = {site.name: site for site in parent.sites}
    return tuple(_as_located(known.get(projection.name), projection) for projection in projections)


def parent_values(parent: Patch) -> WarmStart:
    """The parent's rows and loadings by site, for the same neurons and clusters."""
    return {
        site.name: (site.deltas.tensor().float(), None if site.loadings is None else site.loadings.tensor())
        for site in parent.sites
        if site.n_neurons
    }


def carried_values(parent: Patch, sites: Sequence[LocatedSite], loadings: str) -> tuple[WarmStart, float]:
    """The parent's row updates carried over to other neurons and clusters.

    Each new cluster takes the row that comes nearest to its neurons' updates under the parent, in least
    squares: their mean when tied, the mean with signs turned when signed, the first singular pair when the
    loadings are learned. Neurons new to the patch count as zero; neurons no longer in it are lost.

    Returns:
        Starting values by site, and the share of the parent's squared norm that they keep (1 is all of it).
    """
    known = {site.name: site for site in parent.sites}
    starts: WarmStart = {}
    total = sum(float(site.row_deltas().square().sum()) for site in parent.sites)
    kept = 0.0
    for site in sites:
        old = known.get(site.site)
        if old is None or not site.neurons:
            continue
        full = old.dense()
        rows = full[torch.tensor(site.neurons)]  # (neurons, d_in)
        deltas, values = _nearest(rows, site, loadings)
        made = deltas[torch.tensor(site.clusters)] * (1.0 if values is None else values[:, None])
        kept += float(rows.square().sum() - (rows - made).square().sum())
        starts[site.site] = deltas, values
    return starts, (kept / total if total else 1.0)


def moved_to(parent: Patch, found: Sequence[LocatedSite], projections: Sequence[Projection], loadings: str) -> Moved:
    """A patch for a fine-tuned sibling of its base: its own neurons, joined by those located in the sibling.

    What the patch does is kept: its rows and loadings are the start. Neurons new to it begin without effect; with
    learned loadings at 0 in the cluster that most of the patch's neurons in their new cluster belong to, otherwise
    in a cluster of their own whose row is 0. Neurons located no more are dropped, the weakest first, as long as
    all of them together take no more than ``DROPPED_SHARE`` of the site's squared update.

    Args:
        parent: the patch.
        found: what was located and clustered in the sibling.
        projections: of the sibling, in order.
        loadings: the recipe's.
    """
    old = {site.name: site for site in parent.sites}
    new = {site.site: site for site in found}
    sites: list[LocatedSite] = []
    starts: WarmStart = {}
    total = kept_norm = 0.0
    counts: Counter[str] = Counter()
    for projection, before in zip(projections, parent_sites(parent, projections), strict=True):
        located = new.get(projection.name)
        site = old.get(projection.name)
        norms = torch.zeros(0) if site is None else site.row_deltas().square().sum(dim=1)  # (n,)
        keep = _strong(norms, before, located)
        joined, values = _join(before, site, located, keep, loadings)
        sites.append(joined)
        if joined.neurons:
            starts[joined.site] = values
        total, kept_norm = total + float(norms.sum()), kept_norm + float(norms[keep].sum())
        counts["kept"] += int(keep.sum())
        counts["dropped"] += len(keep) - int(keep.sum())
        counts["added"] += len(joined.neurons) - int(keep.sum())
    carried = kept_norm / total if total else 1.0
    return Moved(tuple(sites), starts, carried, counts["kept"], counts["added"], counts["dropped"])


def _strong(norms: torch.Tensor, before: LocatedSite, located: LocatedSite | None) -> torch.Tensor:
    """Which of the patch's neurons stay (n,) bool."""
    again = set(located.neurons) if located else set()
    keep = torch.ones(len(norms), dtype=torch.bool)
    room = DROPPED_SHARE * float(norms.sum())
    for index in norms.argsort(stable=True).tolist():
        room -= float(norms[index])
        if room < 0:
            break
        keep[index] = before.neurons[index] in again
    return keep


def _join(
    before: LocatedSite, site: Site | None, located: LocatedSite | None, keep: torch.Tensor, loadings: str
) -> tuple[LocatedSite, tuple[torch.Tensor, torch.Tensor | None]]:
    """One site with the patch's neurons that stay and the newly located ones, sorted, and its starting values.

    Args:
        before: the patch's site.
        site: its values, or None for an empty site.
        located: the site as located now, or None.
        keep: [n] bool, which of the patch's neurons stay.
        loadings: the recipe's.

    Returns:
        The site; its rows [K, d_in] and loadings [n] or None.
    """
    stay = [index for index, kept in enumerate(keep.tolist()) if kept]
    clusters = {before.neurons[index]: before.clusters[index] for index in stay}
    fresh = [index for index, neuron in enumerate(located.neurons) if neuron not in clusters] if located else []
    rows = torch.zeros(0, before.d_in) if site is None else site.deltas.tensor().float()
    given = None if site is None or site.loadings is None else site.loadings.tensor()
    values = {before.neurons[i]: 1.0 if given is None else float(given[i]) for i in stay}
    z = {before.neurons[index]: before.z[index] for index in stay}
    if located is not None:
        homes = _homes(located, clusters) if loadings == "learned" and clusters else {}
        if fresh and not homes:
            rows = torch.cat([rows, torch.zeros(1, before.d_in)])
        z |= dict(zip(located.neurons, located.z, strict=True))  # of this model, where there is one
        for index in fresh:
            neuron, sign = located.neurons[index], -1.0 if located.z[index] < 0 else 1.0
            clusters[neuron] = homes.get(located.clusters[index], len(rows) - 1)
            values[neuron] = 0.0 if homes else (1.0 if loadings == "tied" else sign)
        z = {neuron: z[neuron] for neuron in clusters}
    neurons = sorted(clusters)
    used = sorted(set(clusters.values()))  # clusters that lost all their neurons go
    fields: dict[str, Any] = {
        "neurons": tuple(neurons),
        "z": tuple(z[neuron] for neuron in neurons),
        "clusters": tuple(used.index(clusters[neuron]) for neuron in neurons),
    }
    if located is not None:
        fields |= {key: getattr(located, key) for key in ("silhouette", "probe_accuracy", "threshold")}
    plain = given is None and loadings == "tied"
    weights = None if plain else torch.tensor([values[neuron] for neuron in neurons])
    return before.evolve(**fields), (rows[used], weights)


def _homes(located: LocatedSite, clusters: dict[int, int]) -> dict[int, int]:
    """For each new cluster the patch's cluster that most of its known neurons belong to, else the largest."""
    largest = Counter(clusters.values()).most_common(1)[0][0]
    votes: dict[int, Counter[int]] = {number: Counter() for number in range(located.n_clusters)}
    for neuron, number in zip(located.neurons, located.clusters, strict=True):
        if neuron in clusters:
            votes[number][clusters[neuron]] += 1
    return {number: vote.most_common(1)[0][0] if vote else largest for number, vote in votes.items()}


def _nearest(rows: torch.Tensor, site: LocatedSite, loadings: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    signs = torch.where(torch.tensor(site.z) < 0, -1.0, 1.0)
    values = torch.ones(len(rows)) if loadings == "tied" else signs.clone()
    deltas = torch.zeros(site.n_clusters, site.d_in)
    for number in range(site.n_clusters):
        members = torch.tensor(site.clusters) == number
        block = rows[members]
        if loadings != "learned":
            deltas[number] = (block * values[members][:, None]).mean(dim=0)
        elif bool(block.any()):
            left, strengths, right = torch.linalg.svd(block, full_matrices=False)
            size = left[:, 0].abs().mean().clamp_min(1e-12)  # loadings of mean size 1, as at a fresh start
            turn = 1.0 if float((left[:, 0] * signs[members]).sum()) >= 0 else -1.0
            values[members] = turn * left[:, 0] / size
            deltas[number] = turn * strengths[0] * size * right[0]
    return deltas, None if loadings == "tied" else values


def _as_located(site: Site | None, projection: Projection) -> LocatedSite:
    common: dict[str, Any] = {key: getattr(projection, key) for key in ("layer", "kind", "d_in", "d_out")}
    if site is None:
        return LocatedSite(site=projection.name, neurons=(), z=(), **common)
    z = [0.0] * site.n_neurons if site.z is None else site.z.tensor().tolist()
    stats: dict[str, Any] = {key: site.stats.get(key) for key in ("silhouette", "probe_accuracy")}
    return LocatedSite(
        site=projection.name,
        neurons=tuple(site.neurons.tensor().tolist()),
        z=tuple(z),
        clusters=tuple(site.clusters.tensor().tolist()),
        threshold=float(site.stats.get("threshold") or 0.0),
        **common,
        **stats,
    )
