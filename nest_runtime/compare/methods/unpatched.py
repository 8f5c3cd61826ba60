"""The base as it is: the row that every other row is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nest_runtime.compare.methods.base import FitData, Fitted, Learned, Method, Target
from nest_runtime.progress import Progress
from nest_runtime.train.recipe import Recipe


class Unpatched(Method):
    """Nothing is trained, nothing ships."""

    name = "base"
    title = "base"
    place = 0
    look = ("#000000", "o")
    knob = ""
    seeded = False

    def fit(
        self,
        target: Target,
        data: FitData,
        recipe: Recipe,
        *,
        value: float,
        workdir: Path,
        progress: Progress | None = None,
    ) -> Fitted:
        """Do nothing and measure nothing: the clock's and the meter's own noise would be in the table."""
        fitted = super().fit(target, data, recipe, value=value, workdir=workdir, progress=progress)
        return replace(fitted, seconds=0.0, peak_bytes=0)

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Nothing to do."""
        return Learned(None, {})
