"""The base as it is: the row that every other row is compared with."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

from nest_runtime.baselines.base import FitData, Fitted, Progress, Target
from nest_runtime.train.settings import Recipe


class Base:
    """Nothing is trained, nothing ships."""

    name: ClassVar[str] = "base"
    title: ClassVar[str] = "base"
    knob: ClassVar[str] = ""
    grid: ClassVar[tuple[float, ...]] = ()
    fallback: ClassVar[float] = 0.0
    seeded: ClassVar[bool] = False
    revision: ClassVar[str] = "1"

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
        """Nothing to do."""
        return Fitted(self.name, 0, None, 0, 0.0, 0, {}, nullcontext)
