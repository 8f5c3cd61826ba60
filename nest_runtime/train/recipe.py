"""The recipe: every setting of training in one frozen value, with our defaults, and recipes by name.

The paper (arXiv 2602.16835) leaves its threshold, cluster range, learning rate, steps, loss details and refusal texts
open. So every default here is ours, chosen on real models (docs/decisions/real-models.md). The reference world has a
recipe of its own, which benchmarks/ablations.py measures (docs/decisions/training-defaults.md).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nest_runtime.errors import UsageError
from nest_runtime.hints import did_you_mean
from nest_runtime.settings import check, described, setting, settings_of


@described
@dataclass(frozen=True)
class Recipe:
    """All settings of training. Raises UsageError that names the field if a value is not allowed."""

    pooling: str = setting(
        "max",
        "What is taken over a prompt's tokens, padding left out.",
        more="``max`` is the paper's.",
        choices=("max", "mean", "last"),
        group="Locate",
    )
    probe: str = setting(
        "lbfgs",
        "How the probe is fitted: to convergence, or by steps of Adam.",
        more="The loss is the same: class-balanced logistic loss plus probe_weight_decay/2 · |w|².",
        choices=("lbfgs", "adam"),
    )
    probe_lr: float = setting(1e-3, "Learning rate of an ``adam`` probe.", low=1e-8, high=10)
    probe_steps: int = setting(5000, "Full-batch steps of an ``adam`` probe.", low=1, high=10**6)
    probe_weight_decay: float = setting(1e-3, "Weight decay of the probe.", low=1e-12, high=1e6)
    probe_holdout: float = setting(
        0.2, "Share of the prompts kept out to measure the probe's accuracy.", low=0, high=0.9
    )
    z: float = setting(
        2.0,
        "Keep neurons whose probe weight has a z-score above this.",
        low=0,
        high=100,
        flag="--z",
        metavar="Z",
    )
    sign: str = setting(
        "positive",
        "Which neurons are kept: with a positive weight and z above the threshold, or with |z| above it.",
        choices=("positive", "absolute"),
    )
    normalization: str = setting(
        "projection",
        "What z-scores are taken over: the projection, the same with median and MAD, or the whole model.",
        more="``projection`` is the paper's.",
        choices=("projection", "robust", "model"),
    )
    score: str = setting(
        "probe",
        "What a neuron is scored by: its probe weight, or what the base's refusals lose without it.",
        more="``causal`` is the first-order effect on a refusal's first tokens (train/causal.py); beyond the paper.",
        choices=("probe", "causal"),
    )
    projections: str = setting(
        "all",
        "Which first projections of an FFN are looked at.",
        more="``gate`` and ``up`` need a gated FFN. arXiv 2507.17075 finds up enough for weight edits.",
        choices=("all", "gate", "up"),
    )
    depth_from: float = setting(
        0.3,
        "The first layer, as a share of the model's depth.",
        more="Layer l of L lies at (l + ½) / L.",
        low=0,
        high=1,
    )
    depth_to: float = setting(0.75, "The last layer, as a share of the model's depth.", low=0, high=1)
    control: str = setting(
        "none",
        "As a control: as many random neurons instead.",
        more="They get as many clusters.",
        choices=("none", "random"),
        flag="--control",
        metavar="random",
    )
    k_min: int = setting(
        2, "Fewest clusters of one projection; the best silhouette wins.", low=1, high=1024, group="Cluster"
    )
    k_max: int = setting(2, "Most clusters of one projection.", low=1, high=1024, flag="--k-max", metavar="K")
    min_silhouette: float = setting(
        0.0, "With k_min 1, one cluster is taken where no silhouette is above this.", low=-1, high=1
    )
    align_signs: bool = setting(
        True, "Flip the profiles of neurons with a negative probe weight before they are clustered."
    )
    rows: str = setting(
        "cluster",
        "Whether the neurons of a cluster share a trained row, or each has its own.",
        more="``cluster`` is the paper's. ``neuron`` with ``tied`` loadings tunes the located neurons as they are, as "
        "SN-Tune does.",
        choices=("cluster", "neuron"),
        group="Tune",
    )
    loadings: str = setting(
        "learned",
        "A trained loading per neuron, or the paper's tied rows.",
        more="``signed`` rows are fixed at the sign of the probe weight; ``learned`` loadings, which are beyond the "
        "paper, start there.",
        choices=("tied", "signed", "learned"),
        flag="--loadings/--tied",
        pair=("learned", "tied"),
    )
    lr: float = setting(0.16, "Learning rate of the cluster rows.", low=1e-8, high=100, flag="--lr", metavar="RATE")
    lr_unit: str = setting(
        "row-rms",
        "What lr counts in: as it is, or in units of the root mean square of the site's base rows.",
        choices=("absolute", "row-rms"),
    )
    loadings_lr: float = setting(3e-2, "Learning rate of the loadings.", low=0, high=100)
    optimizer: str = setting("adamw", "The optimizer.", choices=("adam", "adamw"))
    weight_decay: float = setting(0.0, "Weight decay of the cluster rows.", low=0, high=100)
    schedule: str = setting(
        "cosine", "How the learning rate falls after the warm-up.", choices=("constant", "cosine", "linear")
    )
    warmup: float = setting(0.05, "Share of the steps in which the learning rate rises.", low=0, high=1)
    grad_clip: float = setting(1.0, "The largest norm of a gradient; 0 clips nothing.", low=0, high=1e6)
    steps: int = setting(100, "Training steps.", low=0, high=10**7, flag="--steps", metavar="N")
    batch_size: int = setting(16, "Examples in one step.", low=1, high=65536)
    harmful_share: float = setting(0.5, "Share of them that is harmful.", low=0.01, high=0.99)
    recovery_tokens: int = setting(
        8,
        "Harmful examples with a ``target`` are learned again after 1 to this many of its tokens; 0 leaves that out.",
        more="A target is the beginning of a harmful answer, as in AdvBench's column. Beyond the paper.",
        low=0,
        high=1024,
    )
    benign_weight: float = setting(
        0.0, "Weight of the cross-entropy on the benign answers' tokens.", low=0, high=1e4, before=1.0
    )
    kl_weight: float = setting(1.0, "Weight of KL(base ‖ patched) on the benign answers' tokens.", low=0, high=1e4)
    onset_weight: float = setting(
        4.0,
        "How much the first tokens of every answer count, where the choice to refuse is made.",
        low=0,
        high=1e4,
        before=1.0,
    )
    margin_weight: float = setting(
        0.0,
        "Weight of a margin, at a refusal's first token, over the token that a harmful answer would begin with.",
        more="Learned where the harmful file has a ``target``. Beyond the paper.",
        low=0,
        high=1e4,
    )
    mask_weight: float = setting(
        0.0,
        "Weight of the loadings' mean size; neurons whose loading comes near 0 are left out of the patch.",
        more="A learned choice of rows; needs learned loadings. Beyond the paper.",
        low=0,
        high=1e4,
    )
    ablation: float = setting(
        0.0,
        "Probability, per layer and token, of taking the refusal direction away from harmful rows while tuning.",
        more="From arXiv 2509.15202; beyond the paper.",
        low=0,
        high=1,
    )
    framings: int = setting(
        2,
        "Copies of every prompt of either class in everyday framings, beside the plain one.",
        more="The framings are in prompts/framings.py.",
        low=0,
        high=64,
        before=0,
    )
    code_framings: int = setting(
        1,
        "Copies of every prompt of either class inside of code or data, for models that write code.",
        low=0,
        high=20,
        before=0,
    )
    framed_characters: int = setting(600, "How long such a conversation may be.", low=1, high=10**7)
    select: str = setting(
        "decision",
        "What validation chooses the best state by: the loss, or the decision to refuse.",
        choices=("loss", "decision"),
        before="loss",
    )
    validation_fraction: float = setting(0.1, "Share of the prompts held out for validation.", low=0, high=0.9)
    validation_most: int = setting(
        16, "The most prompts of a class that are held out; 0 sets no limit.", low=0, high=10**7, before=0
    )
    validate_every: int = setting(30, "How often to measure, in steps.", low=1, high=10**6)
    patience: int = setting(0, "How many measurements without a better one end the run; 0: never.", low=0, high=10**6)
    keep_refused: bool = setting(
        False, "Learn from benign prompts that the base refuses too; they are left out otherwise.", before=True
    )
    answer_refused: bool = setting(
        True,
        "Learn refused benign prompts with the base's likeliest answer that does not begin as its refusals do.",
        more="Beyond the paper.",
        before=False,
    )
    answer_tokens: int = setting(
        12, "Length of the base's own answers where the benign file gives none.", low=1, high=8192
    )
    refusals: tuple[str, ...] = setting(
        (),
        "Texts for harmful prompts without a response.",
        more="Empty takes, with ``own_refusals``, the sentence that the base itself refuses with most often, where it "
        "does so at all, else the built-in list.",
    )
    own_refusals: bool = setting(True, "Whether refusals may be the base's own.", before=False)
    strength: float = setting(
        1.0,
        "What the tuned rows are multiplied with in the end: more refuses more, of both classes.",
        more="Chosen on validation prompts, as a steering vector's coefficient is. With a parent, its rows are "
        "multiplied too. Beyond the paper.",
        low=0.01,
        high=100,
        flag="--strength",
        metavar="S",
    )
    delta_dtype: str = setting(
        "bfloat16",
        "What the patch ships, and what the final validation measures.",
        choices=("bfloat16", "float32"),
    )
    relocate: bool = setting(
        False, "With a parent, locate anew and carry its rows over; otherwise its neurons are kept."
    )
    locate_prompts: int = setting(
        80, "Most prompts of each class to locate with; 0 takes all.", low=0, high=10**7, group="Work", before=0
    )
    prompt_batch: int = setting(64, "Prompts in one forward pass of locate.", low=1, high=65536)
    batch_tokens: int = setting(4096, "Padded tokens in one forward pass of locate.", low=1, high=2**24)
    step_tokens: int = setting(
        512,
        "Padded tokens in one forward and backward pass of tuning; a step may take several.",
        low=1,
        high=2**24,
    )
    seed: int = setting(
        0,
        "Seed of every random choice.",
        more="Those are splits, k-means, batches and the random control.",
        low=0,
        high=2**31 - 1,
        flag="--seed",
        metavar="N",
    )

    def __post_init__(self) -> None:
        if isinstance(self.refusals, list):
            object.__setattr__(self, "refusals", tuple(self.refusals))
        check(self, "recipe:")
        if not all(text.strip() for text in self.refusals):
            raise UsageError("recipe: refusals holds an empty text", "give a list of refusal texts")
        for name, about in settings_of(type(self)).items():
            if about.kind is float:
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.depth_to <= self.depth_from:
            raise UsageError(
                f"recipe: depth_to is {self.depth_to}, not above depth_from {self.depth_from}",
                "give a range of layers, for example 0.0 to 1.0",
            )
        if self.mask_weight and self.loadings != "learned":
            raise UsageError(
                f"recipe: mask_weight is {self.mask_weight:g} and loadings are {self.loadings}",
                "set loadings to learned, or mask_weight to 0",
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
        names = settings_of(cls)
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise UsageError(
                f"recipe: unknown field {unknown[0]!r}",
                f"{did_you_mean(unknown[0], sorted(names))}fields are {', '.join(sorted(names))}",
            )
        return cls(**values)

    @classmethod
    def of_header(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe in a patch's header; settings that its release did not have yet are off.

        Raises:
            UsageError: as :meth:`from_json`, but settings of later releases are left out.
        """
        known = settings_of(cls)
        before = {name: about.before for name, about in known.items() if about.before is not None}
        return cls.from_json({**before, **{key: value for key, value in values.items() if key in known}})

    def evolve(self, **changes: Any) -> Recipe:
        """A copy with other settings, checked like a new one."""
        return self.from_json({**self.to_json(), **changes})


RECIPES: Mapping[str, Recipe] = types.MappingProxyType(
    {
        "default": Recipe(),
        "paper": Recipe(
            loadings="tied",
            z=3.0,
            framings=0,
            code_framings=0,
            recovery_tokens=0,
            benign_weight=1.0,
            kl_weight=0.0,
            onset_weight=1.0,
            select="loss",
        ),
        "fast": Recipe(steps=40, framings=1, code_framings=0, locate_prompts=60, validate_every=20),
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
