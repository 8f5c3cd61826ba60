"""Pictures that need the model's activations on prompts (scan.py): silhouette by k, and what clusters answer to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nest_runtime.plots.scan import Scan, SiteScan
from nest_runtime.plots.style import figure, finish, whole_locator, whole_ticks
from nest_runtime.plots.view import KIND_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TALLEST = 10.0  # inches
COLUMNS = 240  # of the heat map, at most
DARKEST, BRIGHTEST = 0.0, 0.85  # of cividis: its yellow end does not show on white


def silhouette_by_k(scan: Scan) -> Figure:
    """The silhouette of k-means by the number of clusters: a panel per kind, a line per layer, the choice marked."""
    kinds = [kind for kind in KIND_NAMES if any(site.view.kind == kind and site.silhouettes for site in scan.sites)]
    made = figure(9.5, 4.2, f"Silhouette by number of clusters, {scan.title}")
    panels: Any = made.subplots(1, max(len(kinds), 1), sharey=True, squeeze=False)[0]
    color_of, bar = _layer_colors([site.view.layer for site in scan.sites])
    for axes, kind in zip(panels, kinds, strict=False):
        for site in scan.sites:
            if site.view.kind == kind and site.silhouettes:
                _silhouette_line(axes, site, color_of(site.view.layer))
        axes.set_xlabel(f"clusters k of {kind}_proj (ring: chosen)")
        whole_ticks(axes.xaxis)
        finish(axes)
    panels[0].set_ylabel("silhouette")
    made.colorbar(bar, ax=list(panels), label="layer", ticks=whole_locator())
    return made


def _silhouette_line(axes: Any, site: SiteScan, color: Any) -> None:
    ks = sorted(site.silhouettes)
    axes.plot(ks, [site.silhouettes[k] for k in ks], color=color, marker=".", linewidth=1.2)
    chosen = site.view.n_clusters
    if chosen in site.silhouettes:
        axes.plot(chosen, site.silhouettes[chosen], marker="o", color=color, markersize=9, fillstyle="none")


def _layer_colors(layers: Sequence[int]) -> tuple[Any, Any]:
    """A color for each layer, dark ones first, and the scale for a colorbar; cividis reads in every color vision."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    low, high = (min(layers), max(layers)) if layers else (0, 1)
    shades = ListedColormap(colormaps["cividis"](np.linspace(DARKEST, BRIGHTEST, 256)))
    scale = ScalarMappable(Normalize(low, high if high > low else low + 1), shades)
    scale.set_array([])
    return scale.to_rgba, scale


def cluster_profiles(scan: Scan) -> Figure:
    """The mean activation of each cluster's neurons on the prompts, benign ones left, harmful ones right.

    Of many prompts, neighbours share a column, which shows their mean: a column narrower than a pixel shows nothing.
    """
    groups, split = _columns(scan.labels)
    rows, names = [], []
    for site in scan.sites:
        for cluster in range(site.view.n_clusters):
            mine = site.profiles[site.view.clusters == cluster]
            if len(mine):
                profile = mine.mean(axis=0)
                rows.append(np.array([profile[group].mean() for group in groups]))
                names.append(f"layer {site.view.layer} {site.view.kind} {cluster} ({len(mine)})")
    made = figure(9.5, min(TALLEST, 1.9 + 0.24 * max(len(rows), 4)), f"What each cluster answers to, {scan.title}")
    axes: Any = made.subplots()
    values = np.stack(rows) if rows else np.zeros((1, len(groups)))
    limit = _limit(values)
    image = axes.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.axvline(split - 0.5, color="black", linewidth=1.2)
    benign, harmful = int((scan.labels == 0).sum()), int((scan.labels == 1).sum())
    axes.set_xticks([split / 2 - 0.5, (split + len(groups)) / 2 - 0.5], [f"{benign:,} benign", f"{harmful:,} harmful"])
    most = max((len(group) for group in groups), default=1)
    axes.set_xlabel(f"prompts, up to {most} to a column" if most > 1 else "prompts")
    axes.tick_params(axis="x", length=0)
    step = max(1, len(names) // 40)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    made.colorbar(image, ax=axes, label="mean activation (standard deviations)", extend="both", shrink=0.9)
    return made


def _limit(values: np.ndarray) -> float:
    """The end of the color scale in standard deviations: nearly all values, of any shape, are within it."""
    return max(0.5, float(np.ceil(10 * np.quantile(np.abs(values), 0.995)) / 10))


def _columns(labels: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Which prompts share each column, benign columns first, and how many columns are benign; labels are (prompts,)."""
    total = len(labels)
    found: list[list[np.ndarray]] = []
    for label in (0, 1):
        mine = np.flatnonzero(labels == label)
        count = min(len(mine), max(1, round(COLUMNS * len(mine) / total))) if len(mine) else 0
        found.append(np.array_split(mine, count) if count else [])
    return [*found[0], *found[1]], len(found[0])
