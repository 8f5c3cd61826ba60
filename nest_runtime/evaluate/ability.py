"""General ability: scores of benchmark tasks, and how a patch changes them. Running the tasks is lm_eval.py's business.

A score is a task's metric as lm-eval aggregates it. Where that is the mean over documents, the documents' own values
are kept: they give the interval and the paired comparison with the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from nest_runtime.errors import EvaluationError
from nest_runtime.evaluate.stats import Z95, mcnemar, wilson


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: its name in lm-eval; metric, filter: the metric, and how answers were extracted (``none``: as they are).
        value: as aggregated by lm-eval; NaN if there is none.
        stderr: the value's standard error, or None if lm-eval gives none.
        n: documents.
        higher_is_better: how to read it; None if lm-eval does not say.
        group: the group of tasks that it is part of, or "".
        samples: the documents' values by ``task/number``; empty if their mean is not the value.
        base: the same score of the bare base, if there is one to compare with.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None = None
    group: str = ""
    samples: Mapping[str, float] = field(default_factory=dict)
    base: Score | None = None

    @property
    def name(self) -> str:
        """``metric``, with its filter if it has one."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Wilson's interval where every document is right or wrong, else value ± 1.96 standard errors; or None."""
        if self.samples and set(self.samples.values()) <= {0.0, 1.0}:
            return wilson(round(sum(self.samples.values())), len(self.samples))
        if self.stderr is None:
            return None
        return self.value - Z95 * self.stderr, self.value + Z95 * self.stderr

    @property
    def change(self) -> dict[str, Any] | None:
        """From the base: the difference; where documents can be paired its 95 % interval and McNemar's p."""
        if self.base is None:
            return None
        made: dict[str, Any] = {"base": finite(self.base.value), "difference": finite(self.value - self.base.value)}
        if not self.samples or self.samples.keys() != self.base.samples.keys():
            return {**made, "difference_ci95": None, "mcnemar_p": None}
        pairs = [(self.base.samples[key], value) for key, value in self.samples.items()]
        return {**made, **_paired(pairs)}

    def to_json(self) -> dict[str, Any]:
        """The figures, without the documents' values."""
        return {
            "value": finite(self.value),
            "stderr": self.stderr,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
            "higher_is_better": self.higher_is_better,
            "group": self.group or None,
            "change": self.change,
        }

    def fields(self) -> dict[str, Any]:
        """All of it, for a file; :meth:`of` reads it again."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("base", "samples")}
        base = None if self.base is None else self.base.fields()
        return {**own, "value": finite(self.value), "samples": dict(self.samples), "base": base}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Score:
        """Read what ``fields`` wrote."""
        base, value = fields["base"], fields["value"]
        kept = {"value": math.nan if value is None else value, "base": None if base is None else cls.of(base)}
        return cls(**{**fields, **kept})


def finite(value: float | None) -> float | None:
    """The number where it is one: JSON knows neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


def _paired(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The interval of a mean difference (normal), and McNemar's p where every value is 0 or 1."""
    differences = [new - old for old, new in pairs]
    mean, n = fmean(differences), len(pairs)
    spread = Z95 * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n) if n > 1 else math.inf
    binary = {value for pair in pairs for value in pair} <= {0.0, 1.0}
    p = mcnemar(pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))) if binary else None
    return {"difference_ci95": [mean - spread, mean + spread] if math.isfinite(spread) else None, "mcnemar_p": p}


def with_base(scores: Sequence[Score], base: Sequence[Score]) -> tuple[Score, ...]:
    """The scores, each beside the base's.

    Raises:
        EvaluationError: the two are not about the same tasks and numbers of documents.
    """
    before = {(score.task, score.name): score for score in base}
    keys = {(score.task, score.name) for score in scores}
    if before.keys() != keys or any(before[score.task, score.name].n != score.n for score in scores):
        raise EvaluationError("the scores are of other tasks or documents than the base's", "run both on the same")
    return tuple(replace(score, base=before[score.task, score.name]) for score in scores)


def by_task(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """``{task: {metric: figures}}``, as the summary has it."""
    made: dict[str, dict[str, Any]] = {}
    for score in scores:
        made.setdefault(score.task, {})[score.name] = score.to_json()
    return made
