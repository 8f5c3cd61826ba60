"""Rates with intervals, and paired comparisons: the arithmetic of the tables, and nothing else.

All of it treats trials as independent. Trials that share a behavior are not quite, so intervals over
many attacks on few behaviors are somewhat too narrow; the number of trials stands beside every rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nest_runtime.errors import EvaluationError

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Rate:
    """``successes`` of ``n`` trials."""

    successes: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.n:
            raise EvaluationError(f"{self.successes} successes of {self.n} trials", "count each trial once")

    @property
    def value(self) -> float | None:
        """The rate, or None if there were no trials."""
        return self.successes / self.n if self.n else None

    @property
    def ci95(self) -> tuple[float, float]:
        """The Wilson score interval at 95 % (Wilson 1927); [0, 1] where there were no trials."""
        return wilson(self.successes, self.n)

    def to_json(self, key: str = "rate") -> dict[str, Any]:
        """``{key: rate, "successes", "n", "ci95"}``."""
        return {key: self.value, "successes": self.successes, "n": self.n, "ci95": list(self.ci95)}

    def __str__(self) -> str:
        if self.value is None:
            return "– (n = 0)"
        low, high = self.ci95
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n = {self.n})"


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a binomial proportion, within [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    middle = p + z2 / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    # Rounding must not push the ends past the rate or the unit interval.
    low = 0.0 if successes == 0 else min((middle - spread) / scale, p)
    high = 1.0 if successes == n else max((middle + spread) / scale, p)
    return max(low, 0.0), min(high, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test, from the two discordant counts.

    Under the null hypothesis each discordant pair falls either way with probability one half:
    p = min(1, 2 · P[X ≤ min(b, c)]) with X binomial(b + c, 1/2). Computed in whole numbers.
    """
    if only_first < 0 or only_second < 0:
        raise EvaluationError(f"discordant counts {only_first} and {only_second}", "counts are never negative")
    n, k = only_first + only_second, min(only_first, only_second)
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / (1 << n))


@dataclass(frozen=True)
class JudgeErrors:
    """How often a judge was right on answers that people labelled.

    Attributes:
        positive, found: answers that are what is counted, and how many of them the judge counted.
        negative, cleared: the other answers, and how many of them the judge did not count.
        source: the labelled answers' name.
    """

    positive: int
    found: int
    negative: int
    cleared: int
    source: str = ""

    @property
    def sensitivity(self) -> Rate:
        """The share of the positive answers that the judge counted."""
        return Rate(self.found, self.positive)

    @property
    def specificity(self) -> Rate:
        """The share of the negative answers that the judge did not count."""
        return Rate(self.cleared, self.negative)


@dataclass(frozen=True)
class Corrected:
    """A rate corrected for its judge's errors."""

    value: float
    ci95: tuple[float, float]
    errors: JudgeErrors

    def to_json(self) -> dict[str, Any]:
        """``{"rate", "ci95", "sensitivity", "specificity", "measured_on"}``."""
        return {
            "rate": self.value,
            "ci95": list(self.ci95),
            "sensitivity": self.errors.sensitivity.value,
            "specificity": self.errors.specificity.value,
            "measured_on": self.errors.source,
        }


def corrected(rate: Rate, errors: JudgeErrors) -> Corrected | None:
    """A judged rate corrected for the judge's errors: Rogan and Gladen (1978), within [0, 1].

    The interval is that of Lang and Reiczigel (2014): it counts the uncertainty of the rate and of the judge's
    sensitivity and specificity. It presumes that the judge errs on these answers as on the labelled ones.

    Returns:
        None if there were no trials or no labelled answers, or the judge is no better than chance. None too if the
        whole interval lies outside of [0, 1]: the judge does not err on these answers as on the labelled ones.
    """
    if not (rate.n and errors.positive and errors.negative):
        return None
    sensitivity, specificity = errors.found / errors.positive, errors.cleared / errors.negative
    if sensitivity + specificity <= 1:
        return None
    value = (rate.successes / rate.n + specificity - 1) / (sensitivity + specificity - 1)
    low, high = _corrected_interval(rate, errors)
    if high <= 0 or low >= 1:
        return None
    return Corrected(_share(value), (_share(low), _share(high)), errors)


def _corrected_interval(rate: Rate, errors: JudgeErrors) -> tuple[float, float]:
    """Lang and Reiczigel's interval: each proportion with pseudo-trials added, then the delta method. Not bounded."""
    z2 = Z95 * Z95
    n, n_found, n_cleared = rate.n + z2, errors.positive + 2, errors.negative + 2
    p = (rate.successes + z2 / 2) / n
    sensitivity, specificity = (errors.found + 1) / n_found, (errors.cleared + 1) / n_cleared
    power = sensitivity + specificity - 1
    if power <= 0:
        return 0.0, 1.0
    true = (p + specificity - 1) / power
    of_found = sensitivity * (1 - sensitivity) / n_found
    of_cleared = specificity * (1 - specificity) / n_cleared
    middle = true + 2 * z2 * (true * of_found - (1 - true) * of_cleared)
    spread = Z95 / power * math.sqrt(p * (1 - p) / n + true**2 * of_found + (1 - true) ** 2 * of_cleared)
    return middle - spread, middle + spread


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


@dataclass(frozen=True)
class PairedChange:
    """The same trials measured twice: how many succeeded both times, once, never.

    Attributes:
        both, only_base, only_new, neither: numbers of trials, by where they succeeded.
    """

    both: int
    only_base: int
    only_new: int
    neither: int

    @property
    def n(self) -> int:
        """The number of trials."""
        return self.both + self.only_base + self.only_new + self.neither

    @property
    def base(self) -> Rate:
        """The rate of the first measurement, the base's."""
        return Rate(self.both + self.only_base, self.n)

    @property
    def new(self) -> Rate:
        """The rate of the second measurement."""
        return Rate(self.both + self.only_new, self.n)

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided."""
        return mcnemar(self.only_base, self.only_new)

    @property
    def difference(self) -> float | None:
        """New rate minus base rate."""
        return (self.only_new - self.only_base) / self.n if self.n else None

    @property
    def difference_ci95(self) -> tuple[float, float]:
        """The adjusted Wald interval of Agresti and Min (2005): half a trial added to each of the four cells."""
        n = self.n + 2
        b, c = self.only_base + 0.5, self.only_new + 0.5
        middle = (c - b) / n
        spread = Z95 * math.sqrt(max(b + c - (c - b) ** 2 / n, 0.0)) / n
        return max(middle - spread, -1.0), min(middle + spread, 1.0)

    @property
    def relative(self) -> float | None:
        """The rate's change as a fraction of the base's: −0.9 is 90 % lower. None if the base's rate is 0."""
        base = self.both + self.only_base
        return (self.only_new - self.only_base) / base if base else None

    @property
    def relative_ci95(self) -> tuple[float, float] | None:
        """Interval of :attr:`relative`: Bonett and Price (2006) for a ratio of paired proportions."""
        f_new, f_base = self.both + self.only_new, self.both + self.only_base
        seen = self.both + self.only_base + self.only_new
        if f_base == 0:
            return None
        spread = math.sqrt((self.only_new + self.only_base + 2) / ((f_new + 1) * (f_base + 1)))
        z = Z95 * spread / (_log_error(f_new, seen) + _log_error(f_base, seen))
        new_low, new_high = wilson(f_new, seen, z)
        base_low, base_high = wilson(f_base, seen, z)
        return new_low / base_high - 1, (new_high / base_low - 1 if base_low > 0 else math.inf)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PairedChange:
        """Read what ``to_json`` wrote."""
        return cls(*(int(data[key]) for key in ("both", "only_base", "only_new", "neither")))

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; ``relative`` is null where the base never succeeded."""
        relative_ci = self.relative_ci95
        return {
            "n": self.n,
            "both": self.both,
            "neither": self.neither,
            "base": self.base.value,
            "new": self.new.value,
            "only_base": self.only_base,
            "only_new": self.only_new,
            "difference": self.difference,
            "difference_ci95": list(self.difference_ci95),
            "relative": self.relative,
            "relative_ci95": None if relative_ci is None else [x if math.isfinite(x) else None for x in relative_ci],
            "mcnemar_p": self.p_value,
        }


def _log_error(successes: int, n: int) -> float:
    p = (successes + 1) / (n + 2)
    return math.sqrt((1 - p) / ((n + 2) * p))


def paired_change(base: Sequence[bool], new: Sequence[bool]) -> PairedChange:
    """Count pairs of outcomes of the same trials, in the same order."""
    pairs = list(zip(base, new, strict=True))
    return PairedChange(*(pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same answers.

    Attributes:
        judges: their names.
        pairs: ``(first's outcome, second's outcome) -> number of answers``.
        disagreements: ids of the cases they disagree on.
    """

    judges: tuple[str, str]
    pairs: dict[tuple[str, str], int]
    disagreements: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """The number of answers that both judged."""
        return sum(self.pairs.values())

    @property
    def agreed(self) -> Rate:
        """The share of answers with the same outcome from both judges."""
        return Rate(sum(count for (a, b), count in self.pairs.items() if a == b), self.n)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (Cohen 1960); None if chance alone explains full agreement (one label only)."""
        if not self.n:
            return None
        labels = {label for pair in self.pairs for label in pair}
        first = {label: sum(c for (a, _), c in self.pairs.items() if a == label) for label in labels}
        second = {label: sum(c for (_, b), c in self.pairs.items() if b == label) for label in labels}
        chance = sum(first[label] * second[label] for label in labels) / self.n**2
        observed = self.agreed.successes / self.n
        return None if chance >= 1.0 else (observed - chance) / (1 - chance)

    def to_json(self) -> dict[str, Any]:
        """Counts, kappa, pairs and disagreements as JSON values."""
        return {
            "judges": list(self.judges),
            "n": self.n,
            "agreed": self.agreed.to_json(),
            "kappa": self.kappa,
            "pairs": [{"first": a, "second": b, "count": c} for (a, b), c in sorted(self.pairs.items())],
            "disagreements": list(self.disagreements),
        }
