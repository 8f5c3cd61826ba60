"""What the files do not keep: all z-scores, silhouettes by k, and profiles, from the model's activations on prompts.

The steps are those of locating and clustering, with the settings that the sites were located with; where the
prompts are the same ones, so are the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nest_runtime.plots.view import NeuronView, SiteView
from nest_runtime.progress import Progress

if TYPE_CHECKING:
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.recipe import Recipe

K_SHOWN = 8  # silhouettes are computed up to this k, or the recipe's where that is larger


@dataclass(frozen=True)
class SiteScan:
    """One projection on the prompts.

    Attributes:
        view: its kept neurons.
        z: z-scores of all its neurons [d_out].
        silhouettes: by number of clusters.
        profiles: standardized activations of its kept neurons [n, prompts].
    """

    view: SiteView
    z: np.ndarray
    silhouettes: dict[int, float]
    profiles: np.ndarray


@dataclass(frozen=True)
class Scan:
    """Projections with kept neurons on the prompts; ``labels`` [prompts] is 1 for a harmful one."""

    title: str
    sites: tuple[SiteScan, ...]
    labels: np.ndarray

    @property
    def z(self) -> dict[str, np.ndarray]:
        """All z-scores (d_out,) float, by projection."""
        return {site.view.name: site.z for site in self.sites}


def scan(
    view: NeuronView,
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    progress: Progress | None = None,
) -> Scan:
    """Run the prompts through the bare model and look at the projections that have kept neurons.

    Args:
        view: the neurons, and the recipe that they were located by.
        model, tokenizer: of the view's base.
        harmful, benign: the prompts.
        progress: called as (stage, done, total).

    Raises:
        UsageError: the view's settings are no recipe.
        TrainingError: too few prompts.
    """
    from nest_runtime.model.anatomy import find_projections
    from nest_runtime.train.activations import pooled_activations
    from nest_runtime.train.recipe import Recipe

    recipe = Recipe.of_header(view.recipe) if view.recipe else Recipe()
    kept = {site.name: site for site in view.sites if len(site.neurons)}
    projections = [projection for projection in find_projections(model) if projection.name in kept]
    labels = np.array([1] * len(harmful) + [0] * len(benign))
    activations = pooled_activations(
        model,
        tokenizer,
        [example.messages for example in [*harmful, *benign]],
        projections,
        pooling=recipe.pooling,
        batch_size=recipe.prompt_batch,
        batch_tokens=recipe.batch_tokens,
        progress=progress,
    )
    weights, found = [], []
    for number, projection in enumerate(projections):
        weights.append(_probe(activations.read(projection.name), labels, recipe))
        found.append(_clusterings(activations.read(projection.name), kept[projection.name], recipe))
        if progress is not None:
            progress("clusterings", number + 1, len(projections))
    from nest_runtime.train.locate import z_scores

    scores = z_scores(weights, recipe.normalization)
    rows = zip(projections, scores, found, strict=True)
    return Scan(view.title, tuple(SiteScan(kept[p.name], z, *made) for p, z, made in rows), labels)


def _probe(values: np.ndarray, labels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The probe's weights [d_out], fitted as locating does."""
    from nest_runtime.train.locate import fit_probe, split_rows, standardize

    fit, _ = split_rows(labels, recipe.probe_holdout, recipe.seed)
    return fit_probe(standardize(values, fit)[fit], labels[fit], recipe)[0]


def _clusterings(values: np.ndarray, site: SiteView, recipe: Recipe) -> tuple[dict[int, float], np.ndarray]:
    """Silhouettes by k of the kept neurons, and their profiles [n, prompts]."""
    from nest_runtime.train.cluster import cluster_profiles
    from nest_runtime.train.locate import standardize

    plain = standardize(values[:, site.neurons]).T
    signs = np.where(site.z < 0, -1.0, 1.0) if recipe.align_signs and site.z is not None else np.ones(len(plain))
    profiles = np.ascontiguousarray(plain * signs[:, None], dtype=np.float32)
    scores = {}
    for k in range(2, min(max(K_SHOWN, recipe.k_max), len(profiles) - 1) + 1):
        score = cluster_profiles(profiles, recipe.evolve(k_min=k, k_max=k))[1]
        if score is not None:
            scores[k] = score
    return scores, plain.astype(np.float32)
