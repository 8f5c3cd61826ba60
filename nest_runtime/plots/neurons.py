"""Pictures of located and patched neurons: where they are, their z-scores, clusterings and updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nest_runtime.plots.style import (
    CLUSTER_COLORS,
    CLUSTER_MARKERS,
    GRAY,
    KIND_COLORS,
    PALE,
    figure,
    finish,
    whole_ticks,
)
from nest_runtime.plots.view import NeuronView, SiteView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_TALLEST = 9.0  # inches
BAND = 0.27  # half the height of a layer's band
BINS = 40
MANY_LAYERS = 16  # beyond these, no numbers on the bars


def neuron_map(view: NeuronView) -> Figure:
    """Where the neurons are: layer against position in the projection, by cluster, and how many per layer.

    Larger marks have larger updates, if there are any; clusters are numbered within each projection.
    """
    kinds, layers = view.kinds, view.layers
    height = min(MAP_TALLEST, 2.2 + 0.4 * len(layers))
    sized = any(site.norms is not None for site in view.sites)
    made = figure(10, height, f"Safety neurons of {view.title}{' (larger mark: larger update)' if sized else ''}")
    ratios = [*([3.0] * len(kinds)), 1.1]
    panels = made.subplots(1, len(kinds) + 1, sharey=True, width_ratios=ratios, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=False):
        for site in view.of(kind):
            _site_row(axes, site)
        widths = {site.d_out for site in view.of(kind)}
        axes.set_xlim(-0.01 * max(widths), 1.01 * max(widths))
        axes.set_xlabel(f"neuron of {kind}_proj (of {' or '.join(f'{w:,}' for w in sorted(widths))})")
        axes.hlines(layers, 0, max(widths), color=GRAY, linewidth=0.4, alpha=0.5, zorder=0)
        finish(axes, grid="x")
    panels[0].set_ylabel("layer")
    panels[0].set_ylim(max(layers) + 0.7, min(layers) - 0.7)  # the first layer on top
    whole_ticks(panels[0].yaxis)
    _counts(panels[-1], view)
    shown = min(max((site.n_clusters for site in view.sites), default=0), len(CLUSTER_COLORS))
    made.legend(handles=[_key(number) for number in range(shown)], loc="outside lower center", ncols=7, frameon=False)
    return made


def z_histograms(view: NeuronView, everything: dict[str, np.ndarray] | None = None) -> Figure:
    """How far from the middle the kept neurons' probe weights are.

    Args:
        view: the neurons.
        everything: (d_out,) float z-scores of all neurons by projection, if they are known.
    """
    made = figure(8.5, 3.8, f"Probe weights of {view.title}")
    axes: Any = made.subplots()
    kept = {kind: _join([site.z for site in view.of(kind) if site.z is not None]) for kind in view.kinds}
    rest = _join(list(everything.values())) if everything else np.zeros(0)
    values = np.concatenate([*kept.values(), rest])
    edges = _edges(values, max((site.threshold or 0.0 for site in view.sites), default=0.0))
    if everything:
        axes.hist(rest, bins=edges, color=PALE, label=f"all neurons ({len(rest):,})")
        axes.set_yscale("log")
    _, _, bars = axes.hist(
        list(kept.values()),
        bins=edges,
        stacked=not everything,
        color=[KIND_COLORS[kind] for kind in kept],
        label=[f"kept, {kind}_proj ({len(z):,})" for kind, z in kept.items()],
    )
    _hatch(bars, len(kept))
    for bound in sorted({sign * site.threshold for site in view.sites for sign in (-1, 1) if site.threshold}):
        if edges[0] <= bound <= edges[-1]:
            axes.axvline(bound, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("z-score of the probe weight (dashed: threshold)")
    axes.set_ylabel("neurons")
    axes.legend(frameon=False)
    finish(axes)
    return made


def silhouettes(view: NeuronView) -> Figure:
    """The silhouette of the clustering that was chosen, by layer, and its number of clusters."""
    made = figure(8.5, 3.8, f"Clusterings of {view.title}")
    axes: Any = made.subplots()
    width = 0.8 / len(view.kinds)
    for number, kind in enumerate(view.kinds):
        sites = [site for site in view.of(kind) if site.silhouette is not None]
        shift = (number - (len(view.kinds) - 1) / 2) * width
        bars = axes.bar(
            [site.layer + shift for site in sites],
            [site.silhouette for site in sites],
            width,
            color=KIND_COLORS[kind],
            hatch="//" if number else "",
            edgecolor="white",
            label=f"{kind}_proj",
        )
        if len(view.layers) <= MANY_LAYERS:
            axes.bar_label(bars, [f"k = {site.n_clusters}" for site in sites], padding=2, fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("silhouette")
    axes.set_xlim(min(view.layers) - 0.5, max(view.layers) + 0.5)
    axes.margins(y=0.15)
    whole_ticks(axes.xaxis)
    axes.legend(frameon=False)
    finish(axes)
    return made


def update_norms(view: NeuronView) -> Figure:
    """How much a patch changes each projection: the Frobenius norm of its update, by layer."""
    made = figure(8.5, 3.8, f"Size of the updates of {view.title}")
    axes: Any = made.subplots()
    kinds = view.kinds
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        sites = view.of(kind)
        where = [site.layer + (number - (len(kinds) - 1) / 2) * width for site in sites]
        axes.bar(
            where,
            [site.update_norm or 0.0 for site in sites],
            width,
            color=KIND_COLORS[kind],
            hatch="//" if number else "",
            edgecolor="white",
            label=f"{kind}_proj",
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("Frobenius norm of ΔW")
    whole_ticks(axes.xaxis)
    axes.legend(frameon=False)
    finish(axes)
    return made


def _hatch(bars: Any, groups: int) -> None:
    """A pattern on every group of bars but the first, for those who see no colors."""
    for group in list(bars)[1:] if groups > 1 else []:
        for patch in group:
            patch.set(hatch="//", edgecolor="white", linewidth=0)


def _site_row(axes: Any, site: SiteView) -> None:
    """One projection's neurons in the band of its layer, a lane per cluster; larger updates have larger marks."""
    sizes = _mark_sizes(site)
    lanes = np.linspace(-BAND, BAND, site.n_clusters) if site.n_clusters > 1 else np.zeros(1)
    for cluster in np.unique(site.clusters):
        mine = site.clusters == cluster
        number = int(cluster) % len(CLUSTER_COLORS)
        axes.scatter(
            site.neurons[mine],
            np.full(int(mine.sum()), site.layer + lanes[int(cluster)]),
            s=sizes[mine],
            color=CLUSTER_COLORS[number],
            marker=CLUSTER_MARKERS[number],
            linewidths=0,
            alpha=0.8,
        )


def _mark_sizes(site: SiteView) -> np.ndarray:
    if site.norms is None or not len(site.norms) or site.norms.max() <= 0:
        return np.full(len(site.neurons), 16.0)
    return 5 + 25 * site.norms / site.norms.max()


def _counts(axes: Any, view: NeuronView) -> None:
    """Neurons per layer, the kinds stacked."""
    left = np.zeros(len(view.layers))
    for kind in view.kinds:
        by_layer = {site.layer: len(site.neurons) for site in view.of(kind)}
        counts = np.array([by_layer.get(layer, 0) for layer in view.layers], dtype=float)
        axes.barh(
            view.layers,
            counts,
            0.6,
            left=left,
            color=KIND_COLORS[kind],
            hatch="//" if left.any() else "",
            edgecolor="white",
            linewidth=0,
            label=f"{kind} ({int(counts.sum()):,})",
        )
        left += counts
    axes.set_xlabel("neurons per layer")
    axes.set_title("\n" * 2, fontsize=9)  # room above the bars for their legend
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
    finish(axes, grid="x")


def _key(number: int) -> Any:
    from matplotlib.lines import Line2D

    style = {"color": CLUSTER_COLORS[number], "marker": CLUSTER_MARKERS[number]}
    return Line2D([], [], linestyle="none", label=f"cluster {number}", **style)  # type: ignore[arg-type]


def _join(parts: list[Any]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)


def _edges(values: np.ndarray, threshold: float) -> np.ndarray:
    """Edges (bins + 1,) of about BINS bins over values (n,), none of them across the threshold."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / BINS
    if threshold > width:
        width = threshold / round(threshold / width)
    return width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
