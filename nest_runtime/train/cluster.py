"""Which kept neurons share a row: k-means over their activation profiles, k by silhouette.

NeST step 2: a neuron's profile is its standardized activation on every prompt. Each projection is clustered
separately, gate and up too. Nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from nest_runtime.progress import Progress
from nest_runtime.train.activations import PooledActivations
from nest_runtime.train.locate import standardize
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.sites import LocatedSite

SILHOUETTE_SAMPLE = 2000


def cluster(
    activations: PooledActivations,
    located: Sequence[LocatedSite],
    settings: Recipe,
    *,
    progress: Progress | None = None,
) -> list[LocatedSite]:
    """Cluster every site's neurons; with ``settings.control`` "random", replace them by random ones first.

    Args:
        activations: what the sites were located from.
        located: sites without clusters.
        settings: the recipe; its cluster fields count.
        progress: called as ``("cluster", done, total)``.

    Returns:
        The sites with ``clusters`` and ``silhouette``.
    """
    result = []
    for number, site in enumerate(located):
        result.append(_cluster_site(activations, site, settings, number) if site.neurons else site)
        if progress is not None:
            progress("cluster", number + 1, len(located))
    return result


def _cluster_site(activations: PooledActivations, site: LocatedSite, settings: Recipe, number: int) -> LocatedSite:
    values = activations.read(site.site)
    labels, silhouette = cluster_profiles(_profiles(values, site, settings), settings)
    if settings.control == "random":
        generator = np.random.default_rng([settings.seed, number])
        drawn = np.sort(generator.choice(site.d_out, size=len(site.neurons), replace=False))
        clusters = int(labels.max()) + 1
        site = site.evolve(neurons=tuple(int(index) for index in drawn), z=(0.0,) * len(drawn))
        fixed = settings if settings.rows == "neuron" else settings.evolve(k_min=clusters, k_max=clusters)
        labels, silhouette = cluster_profiles(_profiles(values, site, fixed), fixed)
    return site.evolve(clusters=tuple(int(label) for label in labels), silhouette=silhouette)


def _profiles(values: np.ndarray, site: LocatedSite, settings: Recipe) -> np.ndarray:
    """Standardized profiles (neurons, prompts) float32 of a site's neurons."""
    profiles = standardize(values[:, list(site.neurons)]).T
    if settings.align_signs:
        profiles = profiles * np.where(np.asarray(site.z) < 0, -1.0, 1.0)[:, None]
    return np.ascontiguousarray(profiles, dtype=np.float32)


def cluster_profiles(profiles: np.ndarray, settings: Recipe) -> tuple[np.ndarray, float | None]:
    """K-means labels and their silhouette, with k from k_min to k_max by the best silhouette.

    With ``rows`` neuron, every neuron is a cluster of its own. Fewer than three neurons make one cluster (a silhouette
    needs 2 ≤ k < n). So does k_max 1, and, with k_min 1, a best silhouette that does not exceed ``min_silhouette``.

    Args:
        profiles: (neurons, prompts) float32.
        settings: the recipe.

    Returns:
        Labels (neurons,) int, numbered by first appearance, and the silhouette or None.
    """
    count = len(profiles)
    if settings.rows == "neuron":
        return np.arange(count), None
    one = np.zeros(count, dtype=np.int64)
    if count < 3 or settings.k_max == 1:
        return one, None
    best: tuple[float, np.ndarray] | None = None
    for k in range(max(settings.k_min, 2), min(settings.k_max, count - 1) + 1):
        labels = KMeans(n_clusters=k, n_init=10, random_state=settings.seed).fit_predict(profiles)
        if len(set(labels.tolist())) < 2:
            continue
        sample = SILHOUETTE_SAMPLE if count > SILHOUETTE_SAMPLE else None
        score = float(silhouette_score(profiles, labels, sample_size=sample, random_state=settings.seed))
        if best is None or score > best[0]:
            best = score, labels
    if best is None or (settings.k_min == 1 and best[0] <= settings.min_silhouette):
        return one, None
    return _renumber(best[1]), round(best[0], 6)


def _renumber(labels: np.ndarray) -> np.ndarray:
    """Labels (neurons,) numbered by first appearance, so that equal partitions have equal numbers."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
