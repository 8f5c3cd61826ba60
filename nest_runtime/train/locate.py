"""Which neurons tell harmful from benign: one linear probe per projection, kept by the z-score of its weights.

NeST step 1 (arXiv 2602.16835): standardize the pooled activations, fit a logistic probe of harmful against benign,
z-score its weights across the projection's neurons, and keep those above the threshold. Probe weights show
correlation, not cause: compare with ``control="random"``. Nothing here runs the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from nest_runtime.errors import TrainingError, UsageError
from nest_runtime.model.anatomy import Projection
from nest_runtime.progress import Progress
from nest_runtime.train.activations import PooledActivations
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.sites import LocatedSite
from nest_runtime.train.stages import read_tensors, write_tensors

MIN_PER_CLASS = 2


def chosen_projections(projections: Sequence[Projection], settings: Recipe) -> tuple[Projection, ...]:
    """The projections that the recipe takes: its layers, and of those gate, up or all.

    Raises:
        UsageError: no layer lies in its range, or none has such a projection.
    """
    layers = max(projection.layer for projection in projections) + 1
    chosen = tuple(
        projection
        for projection in projections
        if settings.depth_from <= (projection.layer + 0.5) / layers <= settings.depth_to
    )
    if not chosen:
        raise UsageError(
            f"recipe: no layer of {layers} lies between {settings.depth_from} and {settings.depth_to} of the depth",
            "widen depth_from to depth_to",
        )
    if settings.projections == "all":
        return chosen
    kinds = sorted({projection.kind for projection in chosen})
    if settings.projections not in kinds:
        raise UsageError(
            f"recipe: projections is {settings.projections}; this model's are {', '.join(kinds)}", "use projections all"
        )
    return tuple(projection for projection in chosen if projection.kind == settings.projections)


def locate(
    activations: PooledActivations,
    labels: Sequence[int],
    settings: Recipe,
    *,
    workdir: Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[LocatedSite]:
    """Fit the probes and keep the neurons, with one projection in memory at a time.

    Args:
        activations: pooled activations of the prompts.
        labels: 1 for a harmful prompt, 0 for a benign one, in the same order.
        settings: the recipe; its locate fields count.
        workdir: keep finished probes here (float32 weights, a file per projection) and reuse them.
        device: where the ``adam`` probe runs.
        progress: called as ``("locate", done, total)``.

    Returns:
        One site per projection, in order, without clusters yet; some may be empty.

    Raises:
        TrainingError: fewer than two prompts of a class.
    """
    target = np.asarray(labels, dtype=np.int64)
    fit, held = split_rows(target, settings.probe_holdout, settings.seed)
    weights: list[np.ndarray] = []
    accuracies: list[float | None] = []
    for number, projection in enumerate(activations.projections):
        path = workdir / f"{number:04d}.safetensors" if workdir else None
        known = read_tensors(path) if path else None
        if known is None:
            weight, accuracy = _probe(activations.read(projection.name), target, fit, held, settings, device)
            known = {"weight": torch.from_numpy(weight)}, {"accuracy": accuracy}
            if path:
                write_tensors(path, *known)
        weights.append(known[0]["weight"].numpy())
        accuracies.append(known[1]["accuracy"])
        if progress is not None:
            progress("locate", number + 1, len(activations.projections))
    return keep_neurons(activations.projections, weights, accuracies, settings)


def keep_neurons(
    projections: Sequence[Projection],
    weights: Sequence[np.ndarray],
    accuracies: Sequence[float | None],
    settings: Recipe,
) -> list[LocatedSite]:
    """Sites of the neurons whose weight has a z-score beyond the threshold.

    Args:
        projections: whose neurons they are.
        weights: one (d_out,) float32 array per projection.
        accuracies: of the probes that the weights come from; None where there is none.
        settings: the recipe; ``normalization``, ``sign`` and ``z`` count.

    Returns:
        One site per projection, in order, without clusters yet.
    """
    scores = z_scores(weights, settings.normalization)
    return [
        _keep(projection, z, weight, accuracy, settings)
        for projection, z, weight, accuracy in zip(projections, scores, weights, accuracies, strict=True)
    ]


def split_rows(target: np.ndarray, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows held out, stratified by class and drawn by seed; at least one of each class is fitted on.

    Args:
        target: (prompts,) labels, 0 or 1.
        holdout: the share to hold out.
        seed: of the draw.

    Returns:
        Two (n,) int arrays of row numbers.
    """
    generator = np.random.default_rng(seed)
    fit, held = [], []
    for value, name in ((0, "benign"), (1, "harmful")):
        rows = np.flatnonzero(target == value)
        if len(rows) < MIN_PER_CLASS:
            raise TrainingError(
                f"{len(rows)} {name} prompts; locating needs at least {MIN_PER_CLASS}", f"give more {name} prompts"
            )
        rows = generator.permutation(rows)
        count = min(round(holdout * len(rows)), len(rows) - 1)
        held.append(rows[:count])
        fit.append(rows[count:])
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(held))


def standardize(values: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """``values`` (prompts, neurons) float32, in place, to mean 0 and deviation 1 over ``rows``.

    Constant neurons become 0.
    """
    mean, deviation = values[rows].mean(axis=0), values[rows].std(axis=0)
    constant = deviation < 1e-6 * np.maximum(1.0, np.abs(mean))
    values -= mean
    values /= np.where(constant, 1.0, deviation)
    values[:, constant] = 0.0
    return values


def fit_probe(
    x: np.ndarray, y: np.ndarray, settings: Recipe, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, float]:
    """Weights float32 (neurons,) and bias of a class-balanced logistic probe with L2 ``probe_weight_decay``.

    The loss is mean(balanced logistic loss) + probe_weight_decay/2 · |w|² for both solvers.
    """
    if settings.probe == "adam":
        return _fit_adam(x, y, settings, device)
    strength = 1.0 / (settings.probe_weight_decay * len(x))
    probe = LogisticRegression(C=strength, class_weight="balanced", solver="lbfgs", max_iter=1000, tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is not at its optimum still ranks neurons
        probe.fit(x, y)
    return probe.coef_[0].astype(np.float32), float(probe.intercept_[0])


def _fit_adam(x: np.ndarray, y: np.ndarray, settings: Recipe, device: str | torch.device) -> tuple[np.ndarray, float]:
    """Weights (neurons,) and bias by full-batch Adam on x (prompts, neurons), as in the same group's earlier code."""
    inputs, target = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device, torch.float32)
    share = float(target.mean())
    balance = torch.where(target > 0, 0.5 / share, 0.5 / (1 - share))  # (prompts,)
    weight = torch.zeros(x.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(1, device=device, requires_grad=True)
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": settings.probe_weight_decay},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam(groups, lr=settings.probe_lr)
    with torch.enable_grad():
        for _ in range(settings.probe_steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weight + bias, target, weight=balance)
            loss.backward()
            optimizer.step()
    return weight.detach().cpu().numpy(), float(bias.detach())


def z_scores(weights: Sequence[np.ndarray], normalization: str) -> list[np.ndarray]:
    """Z-scores of probe weights, one (neurons,) float32 array per projection.

    They are taken within each projection, robustly (median, MAD), or across the model.
    """
    if normalization == "model":
        everything = np.concatenate(weights)
        return [(weight - everything.mean()) / max(float(everything.std()), 1e-12) for weight in weights]
    scores = []
    for weight in weights:
        center, spread = float(weight.mean()), float(weight.std())
        if normalization == "robust":
            center = float(np.median(weight))
            spread = 1.4826 * float(np.median(np.abs(weight - center)))
        scores.append((weight - center) / max(spread, 1e-12))
    return scores


def _probe(
    values: np.ndarray,
    target: np.ndarray,
    fit: np.ndarray,
    held: np.ndarray,
    settings: Recipe,
    device: str | torch.device,
) -> tuple[np.ndarray, float | None]:
    x = standardize(values, fit)
    weight, bias = fit_probe(x[fit], target[fit], settings, device)
    if not len(held):
        return weight, None
    right = ((x[held] @ weight + bias) > 0) == (target[held] > 0)
    return weight, round(float(right.mean()), 6)


def _keep(
    projection: Projection, z: np.ndarray, weight: np.ndarray, accuracy: float | None, settings: Recipe
) -> LocatedSite:
    kept = (z > settings.z) & (weight > 0) if settings.sign == "positive" else np.abs(z) > settings.z
    neurons = np.flatnonzero(kept)
    return LocatedSite(
        site=projection.name,
        layer=projection.layer,
        kind=projection.kind,
        d_in=projection.d_in,
        d_out=projection.d_out,
        neurons=tuple(int(index) for index in neurons),
        z=tuple(round(float(value), 6) for value in z[neurons]),
        probe_accuracy=accuracy,
        threshold=settings.z,
    )
