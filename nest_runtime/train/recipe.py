"""The recipe: every setting of training in one frozen value, with our defaults, and recipes by name.

The paper (arXiv 2602.16835) leaves its threshold, cluster range, learning rate, steps, loss details and
refusal texts open. So every default here is ours, chosen on real models (docs/decisions/real-models.md); the reference
world has a recipe of its own, which benchmarks/ablations.py measures (docs/decisions/training-defaults.md).
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
from nest_runtime.hints import did_you_mean

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
    "select": ("loss", "decision"),
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
    "benign_weight": (0.0, 1e4),
    "kl_weight": (0.0, 1e4),
    "onset_weight": (0.0, 1e4),
    "ablation": (0.0, 1.0),
    "framings": (0, 64),
    "framed_characters": (1, 10**7),
    "validation_most": (0, 10**7),
    "locate_prompts": (0, 10**7),
    "step_tokens": (1, 2**24),
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
        benign_weight, kl_weight: weights of the cross-entropy and of KL(base ‖ patched) on the benign answers' tokens.
        onset_weight: how much the first tokens of every answer count, where the choice to refuse is made.
        ablation: probability, per layer and token, of taking the refusal direction away from harmful rows while
            tuning (arXiv 2509.15202). Beyond the paper.
        framings, framed_characters: copies of every prompt of either class in everyday framings (prompts/framings.py)
            beside the plain one, and how long such a conversation may be.
        select: what validation chooses the best state by: ``loss``, or the ``decision`` to refuse.
        validation_fraction, validation_most, validate_every, patience: held-out share, the most prompts of a class
            that it may be (0: no limit), how often to measure in steps, and how many measurements without a better
            one end the run (0: never).
        keep_refused: learn from benign prompts that the base refuses too; they are left out otherwise.
        answer_refused: learn them with the base's likeliest answer that does not begin as its refusals do. Beyond the
            paper.
        answer_tokens: length of the base's own answers where the benign file gives none.
        refusals, own_refusals: texts for harmful prompts without a response; empty takes, with ``own_refusals``, the
            sentence that the base itself refuses with most often, where it does so at all, else the built-in list.
        delta_dtype: what the patch ships, and what the final validation measures.
        relocate: with a parent, locate anew and carry its rows over; otherwise its neurons are kept.

    Work:
        locate_prompts: most prompts of each class to locate with; 0 takes all.
        prompt_batch, batch_tokens: prompts, and padded tokens, in one forward pass of locate.
        step_tokens: padded tokens in one forward and backward pass of tuning; a step may take several.
        seed: of splits, k-means, batches and the random control.
    """

    pooling: str = "max"
    probe: str = "lbfgs"
    probe_lr: float = 1e-3
    probe_steps: int = 5000
    probe_weight_decay: float = 1e-3
    probe_holdout: float = 0.2
    z: float = 2.0
    sign: str = "positive"
    normalization: str = "projection"
    depth_from: float = 0.3
    depth_to: float = 0.75
    control: str = "none"
    k_min: int = 2
    k_max: int = 2
    min_silhouette: float = 0.0
    align_signs: bool = True
    loadings: str = "learned"
    lr: float = 0.16
    lr_unit: str = "row-rms"
    loadings_lr: float = 3e-2
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    grad_clip: float = 1.0
    steps: int = 90
    batch_size: int = 16
    harmful_share: float = 0.55
    recovery_tokens: int = 8
    benign_weight: float = 0.0
    kl_weight: float = 1.0
    onset_weight: float = 4.0
    ablation: float = 0.0
    framings: int = 2
    framed_characters: int = 600
    select: str = "decision"
    validation_fraction: float = 0.1
    validation_most: int = 16
    validate_every: int = 30
    patience: int = 0
    keep_refused: bool = False
    answer_refused: bool = True
    answer_tokens: int = 12
    refusals: tuple[str, ...] = ()
    own_refusals: bool = True
    delta_dtype: str = "bfloat16"
    relocate: bool = False
    locate_prompts: int = 80
    prompt_batch: int = 64
    batch_tokens: int = 4096
    step_tokens: int = 1024
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

    @classmethod
    def of_header(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that a patch's header tells: settings that its release did not have yet are off.

        Raises:
            UsageError: as :meth:`from_json`, but settings of later releases are left out.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls.from_json({**_BEFORE, **{key: value for key, value in values.items() if key in known}})

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


# What training did before there were settings for it.
_BEFORE = {
    "benign_weight": 1.0,
    "onset_weight": 1.0,
    "ablation": 0.0,
    "framings": 0,
    "select": "loss",
    "validation_most": 0,
    "keep_refused": True,
    "answer_refused": False,
    "own_refusals": False,
    "locate_prompts": 0,
}

RECIPES: Mapping[str, Recipe] = types.MappingProxyType(
    {
        "default": Recipe(),
        "paper": Recipe(
            loadings="tied",
            z=3.0,
            framings=0,
            recovery_tokens=0,
            benign_weight=1.0,
            kl_weight=0.0,
            onset_weight=1.0,
            select="loss",
        ),
        "fast": Recipe(steps=40, framings=1, locate_prompts=60, validate_every=20),
        "reference": Recipe.of_header(
            {
                "z": 1.0,
                "sign": "absolute",
                "depth_from": 0.15,
                "depth_to": 0.65,
                "k_max": 3,
                "lr": 1e-2,
                "lr_unit": "absolute",
                "loadings_lr": 1e-2,
                "weight_decay": 0.3,
                "steps": 350,
                "batch_size": 32,
                "harmful_share": 0.5,
                "recovery_tokens": 3,
                "kl_weight": 0.0,
                "validate_every": 25,
                "answer_tokens": 64,
                "batch_tokens": 8192,
                "step_tokens": 8192,
            }
        ),
    }
)


def named_recipe(name: str) -> Recipe:
    """A recipe by name: ``default``, ``paper`` (as published), ``fast`` (half the steps), ``reference`` (its world's).

    Raises:
        UsageError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UsageError(
            f"there is no recipe {name!r}", f"{did_you_mean(name, RECIPES)}use {', '.join(RECIPES)}, or a JSON file"
        )
    return RECIPES[name]
