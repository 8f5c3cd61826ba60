"""The recipe: every setting of training in one frozen value, with our defaults.

The paper (arXiv 2602.16835) leaves its threshold, cluster range, learning rate, steps, loss details and
refusal texts open. So every default here is ours; benchmarks/ablations.py measures them and
docs/decisions/training-defaults.md keeps the results, bad ones included.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nest_runtime.errors import UsageError
from nest_runtime.names import did_you_mean

_CHOICES = {
    "pooling": ("max", "mean", "last"),
    "probe": ("lbfgs", "adam"),
    "sign": ("positive", "absolute"),
    "normalization": ("projection", "robust", "model"),
    "control": ("none", "random"),
    "loadings": ("tied", "signed", "learned"),
    "optimizer": ("adam", "adamw"),
    "schedule": ("constant", "cosine", "linear"),
    "lr_unit": ("absolute", "row-rms"),
    "delta_dtype": ("bfloat16", "float32"),
}
_RANGES = {  # lowest and highest value allowed, both included
    "batch_size": (1, 65536),
    "prompt_batch": (1, 65536),
    "batch_tokens": (1, 2**24),
    "probe_lr": (1e-8, 10.0),
    "probe_steps": (1, 10**6),
    "probe_weight_decay": (1e-12, 1e6),
    "probe_holdout": (0.0, 0.9),
    "z": (0.0, 100.0),
    "depth_from": (0.0, 1.0),
    "depth_to": (0.0, 1.0),
    "k_min": (1, 1024),
    "k_max": (1, 1024),
    "min_silhouette": (-1.0, 1.0),
    "lr": (1e-8, 100.0),
    "loadings_lr": (0.0, 100.0),
    "steps": (0, 10**7),
    "warmup": (0.0, 1.0),
    "weight_decay": (0.0, 100.0),
    "grad_clip": (0.0, 1e6),
    "harmful_share": (0.01, 0.99),
    "recovery_tokens": (0, 1024),
    "kl_weight": (0.0, 1e4),
    "validation_fraction": (0.0, 0.9),
    "validate_every": (1, 10**6),
    "patience": (0, 10**6),
    "answer_tokens": (1, 8192),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class Recipe:
    """All settings of training. Raises UsageError, naming the field, where a value is not allowed.

    Locate:
        pooling: over a prompt's tokens, padding left out. ``max`` is the paper's.
        probe: ``lbfgs`` (to convergence) or ``adam`` (``probe_steps`` full-batch steps of ``probe_lr``), both of
            the same loss: class-balanced logistic loss plus probe_weight_decay/2 · |w|².
        probe_holdout: share of the prompts kept out to measure the probe's accuracy.
        z: a neuron is kept when the z-score of its probe weight is above this.
        sign: ``positive`` keeps z > threshold with a positive weight, ``absolute`` |z| > threshold.
        normalization: z-scores within the ``projection`` (the paper's), the same with median and MAD
            (``robust``), or across the whole ``model``.
        depth_from, depth_to: which layers, as shares of the model's depth: layer l of L lies at (l + ½) / L.
        control: ``random`` swaps the located neurons for as many random ones, with as many clusters.

    Cluster:
        k_min, k_max: range of cluster counts; the best silhouette wins.
        min_silhouette: with k_min 1, one cluster is taken when no silhouette exceeds this.
        align_signs: flip the profiles of neurons with a negative probe weight before clustering.

    Tune:
        loadings: ``tied`` (the paper's), ``signed`` (fixed at the sign of the probe weight), or ``learned``
            (one trained number a neuron, starting at the sign; beyond the paper).
        lr, lr_unit, loadings_lr, optimizer, weight_decay, schedule, warmup, grad_clip: the optimizer. With
            ``row-rms`` lr counts in units of the root mean square of the site's base rows.
        steps, batch_size, harmful_share: how many steps, of how many examples, what share of them harmful.
        recovery_tokens: harmful examples with a ``target`` (the beginning of a harmful answer, as in AdvBench's column)
            are learned a second time after 1 to this many of its tokens; 0 leaves that out. Beyond the paper.
        kl_weight: weight of KL(base ‖ patched) on the benign answers' tokens.
        validation_fraction, validate_every, patience: held-out share, how often to measure in steps, and how many
            measurements without a better one end the run (0: never).
        answer_tokens: length of the base's own answers where the benign file gives none.
        refusals: texts for harmful prompts without a response; empty takes the built-in list.
        delta_dtype: what the patch ships, and what the final validation measures.
        relocate: with a parent, locate anew and carry its rows over; otherwise its neurons are kept.

    Work:
        prompt_batch, batch_tokens: prompts, and padded tokens, in one forward pass of locate.
        seed: of splits, k-means, batches and the random control.
    """

    pooling: str = "max"
    probe: str = "lbfgs"
    probe_lr: float = 1e-3
    probe_steps: int = 5000
    probe_weight_decay: float = 1e-3
    probe_holdout: float = 0.2
    z: float = 1.0
    sign: str = "absolute"
    normalization: str = "projection"
    depth_from: float = 0.15
    depth_to: float = 0.65
    control: str = "none"
    k_min: int = 2
    k_max: int = 3
    min_silhouette: float = 0.0
    align_signs: bool = True
    loadings: str = "learned"
    lr: float = 1e-2
    lr_unit: str = "absolute"
    loadings_lr: float = 1e-2
    optimizer: str = "adamw"
    weight_decay: float = 0.3
    schedule: str = "cosine"
    warmup: float = 0.05
    grad_clip: float = 1.0
    steps: int = 350
    batch_size: int = 32
    harmful_share: float = 0.5
    recovery_tokens: int = 3
    kl_weight: float = 0.0
    validation_fraction: float = 0.1
    validate_every: int = 25
    patience: int = 0
    answer_tokens: int = 64
    refusals: tuple[str, ...] = ()
    delta_dtype: str = "bfloat16"
    relocate: bool = False
    prompt_batch: int = 64
    batch_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "refusals", tuple(self.refusals))
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), hints[field.name])
            if isinstance(getattr(self, field.name), int) and hints[field.name] is float:
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        if self.depth_to <= self.depth_from:
            raise UsageError(
                f"recipe: depth_to is {self.depth_to}, not above depth_from {self.depth_from}",
                "give a range of layers, for example 0.0 to 1.0",
            )
        if self.k_max < self.k_min:
            raise UsageError(f"recipe: k_max is {self.k_max}, below k_min {self.k_min}", "raise k_max or lower k_min")

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        values = dataclasses.asdict(self)
        values["refusals"] = list(self.refusals)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from ``to_json``'s values; fields left out keep their defaults.

        Raises:
            UsageError: naming an unknown field, or one with a value that is not allowed.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise UsageError(
                f"recipe: unknown field {unknown[0]!r}",
                f"{did_you_mean(unknown[0], sorted(names))}fields are {', '.join(sorted(names))}",
            )
        fields = dict(values)
        if isinstance(fields.get("refusals"), list):
            fields["refusals"] = tuple(fields["refusals"])
        return cls(**fields)

    def evolve(self, **changes: Any) -> Recipe:
        """A copy with other settings, checked like a new one."""
        return self.from_json({**self.to_json(), **changes})


def _check(name: str, value: Any, kind: Any) -> None:
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            near = did_you_mean(value, _CHOICES[name]) if isinstance(value, str) else ""
            raise UsageError(f"recipe: {name} is {value!r}", f"{near}use one of {', '.join(_CHOICES[name])}")
        return
    if isinstance(kind, types.GenericAlias):
        if not all(isinstance(item, str) and item.strip() for item in value):
            raise UsageError(f"recipe: {name} holds something else than text", "give a list of refusal texts")
        return
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"recipe: {name} is {value!r}; expected {kind.__name__}", "correct the recipe")
    if name in _RANGES:
        low, high = _RANGES[name]
        if not math.isfinite(value) or not low <= value <= high:
            raise UsageError(f"recipe: {name} is {value}; expected {low} to {high}", "correct the recipe")
