"""Pictures that need the model's activations on prompts (scan.py): silhouette by k, and what clusters answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nest_runtime.pictures.scan import Scan
from nest_runtime.pictures.style import KIND_COLORS, figure, finish, whole_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TALLEST = 10.0  # inches
LIMIT = 2.0  # standard deviations at the ends of the color scale


def silhouette_by_k(scan: Scan) -> Figure:
    """The silhouette of k-means by the number of clusters: one line per projection, the choice marked."""
    made = figure(8.5, 4.2, f"Silhouette by number of clusters, {scan.title}")
    axes: Any = made.subplots()
    labelled: set[str] = set()
    for site in scan.sites:
        if not site.silhouettes:
            continue
        color = KIND_COLORS[site.view.kind]
        ks = sorted(site.silhouettes)
        scores = [site.silhouettes[k] for k in ks]
        label = None if site.view.kind in labelled else f"{site.view.kind}_proj"
        dashes = "-" if site.view.kind == "gate" else "--"
        axes.plot(ks, scores, dashes, color=color, marker=".", linewidth=1, alpha=0.75, label=label)
        labelled.add(site.view.kind)
        if site.view.n_clusters in site.silhouettes:
            chosen = site.view.n_clusters
            axes.plot(chosen, site.silhouettes[chosen], marker="o", color=color, markersize=9, fillstyle="none")
        axes.annotate(f" {site.view.layer}", (ks[-1], scores[-1]), fontsize=8, color=color, va="center")
    axes.set_xlabel("clusters k (circled: chosen; number at the end: layer)")
    axes.set_ylabel("silhouette")
    whole_ticks(axes.xaxis)
    if labelled:
        axes.legend(frameon=False)
    finish(axes)
    return made


def cluster_profiles(scan: Scan) -> Figure:
    """The mean activation of each cluster's neurons on every prompt, benign ones left, harmful ones right."""
    order = np.argsort(scan.labels, kind="stable")
    rows, names = [], []
    for site in scan.sites:
        for cluster in range(site.view.n_clusters):
            mine = site.profiles[site.view.clusters == cluster]
            if len(mine):
                rows.append(mine.mean(axis=0)[order])
                names.append(f"layer {site.view.layer} {site.view.kind} {cluster} ({len(mine)})")
    made = figure(9.5, min(TALLEST, 1.9 + 0.24 * max(len(rows), 4)), f"What each cluster answers to, {scan.title}")
    axes: Any = made.subplots()
    values = np.stack(rows) if rows else np.zeros((1, len(order)))
    image = axes.imshow(values, cmap="PuOr_r", vmin=-LIMIT, vmax=LIMIT, aspect="auto", interpolation="nearest")
    split = int((scan.labels == 0).sum())
    axes.axvline(split - 0.5, color="black", linewidth=1.2)
    total = len(order)
    axes.set_xticks(
        [split / 2 - 0.5, (split + total) / 2 - 0.5], [f"{split} benign", f"{total - split} harmful prompts"]
    )
    axes.tick_params(axis="x", length=0)
    step = max(1, len(names) // 40)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    made.colorbar(image, ax=axes, label="mean activation (standard deviations)", extend="both", shrink=0.9)
    return made
