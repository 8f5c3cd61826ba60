"""The base as it is: the row that every other row is compared with."""

from __future__ import annotations

from pathlib import Path

from nest_runtime.baselines.base import FitData, Learned, Method, Progress, Target
from nest_runtime.train.settings import Recipe


class Base(Method):
    """Nothing is trained, nothing ships."""

    name = "base"
    title = "base"
    knob = ""
    seeded = False

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Nothing to do."""
        return Learned(None, {})
