"""NeST with one thing done otherwise, each after a published neighbour of it.

Those of others' methods are like them, not the same: all share this comparison's data, budget and loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from nest_runtime.compare.methods.base import FitData, Learned, Target
from nest_runtime.compare.methods.neurons import NestLoadings
from nest_runtime.progress import Progress
from nest_runtime.train.recipe import Recipe

Settings = Mapping[str, Any]


class _Changed(NestLoadings):
    """NeST with loadings, under a recipe with other settings."""

    changes: ClassVar[Settings] = {}

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """As NeST, with ``changes`` made to the recipe."""
        return super().learn(target, data, recipe.evolve(**self.changes), value, folder, progress)


class UntiedRows(_Changed):
    """A trained row for every located neuron, as SN-Tune has it (Zhao et al. 2025)."""

    name = "untied-rows"
    title = "a row for every neuron"
    place = 62
    look = ("#CC79A7", "s")
    loadings = "tied"
    usual = False
    changes: ClassVar[Settings] = {"rows": "neuron"}


class RowMasks(_Changed):
    """Which of the located rows change is learned too, after SafeEvo's row masks (2026)."""

    name = "row-masks"
    title = "learned row masks"
    place = 63
    look = ("#CC79A7", "8")
    usual = False
    changes: ClassVar[Settings] = {"mask_weight": 1.0}


class AblationDropout(_Changed):
    """The refusal direction is taken away at random while tuning, after DeepRefusal (arXiv 2509.15202)."""

    name = "ablation-dropout"
    title = "refusal direction dropped"
    place = 64
    look = ("#CC79A7", "d")
    usual = False
    changes: ClassVar[Settings] = {"ablation": 0.5}


class OwnWords(_Changed):
    """Refusals are learned in the sentence that the base refuses with itself, whatever the recipe says."""

    name = "own-words"
    title = "the base's own refusal"
    place = 65
    look = ("#CC79A7", "p")
    usual = False
    changes: ClassVar[Settings] = {"own_refusals": True, "refusals": ()}

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """As NeST, the data's refusals left out, so that the base's own come in their place."""
        bare = tuple(replace(example, response=None) for example in data.harmful)
        return super().learn(target, replace(data, harmful=bare), recipe, value, folder, progress)
