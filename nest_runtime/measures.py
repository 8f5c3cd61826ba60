"""The measures: what an evaluation counts, in what words it is shown, and which direction is better.

Cases, records, tables, plots, claims, demands and cards read this table and name no measure of their own. A new measure
is a line here, a suite whose cases have it, and a judge that gives the outcome it counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Measure:
    """One share of a suite's trials.

    Attributes:
        key: in files, options and the API.
        title: in sentences and tables.
        column: the same, for narrow tables and for axes.
        kind: of the cases that have it, ``harmful`` or ``benign``.
        hit: the outcome that counts (judges/base.py).
        better: the direction in which a patch improves it.
        about: what it is, for people who do not know the term.
        exact: whether its cases need an expected answer.
        rate_key: what a suite's rate is called in JSON.
        hub_name: its metric type on the Hub; the key where this is empty.
    """

    key: str
    title: str
    column: str
    kind: Literal["harmful", "benign"]
    hit: str
    better: Literal["lower", "higher"]
    about: str
    exact: bool = False
    rate_key: str = "rate"
    hub_name: str = ""

    @property
    def lower_is_better(self) -> bool:
        """Whether a limit on it is an upper one."""
        return self.better == "lower"

    @property
    def option(self) -> str:
        """The command-line option of a limit: ``--max-asr``, ``--min-utility``."""
        return f"--{'max' if self.lower_is_better else 'min'}-{self.key.replace('_', '-')}"

    def bound(self, limit: float) -> str:
        """A limit in words: ``at most 0.05``, or ``at least 0.9`` where higher is better."""
        return f"at {'most' if self.lower_is_better else 'least'} {limit:g}"

    def keeps(self, limit: float, value: float) -> bool:
        """Whether a rate keeps a limit; a rate at the limit does."""
        return value <= limit if self.lower_is_better else value >= limit

    def loss(self, value: float) -> float:
        """The rate as something to make small: itself, or what it lacks to 1."""
        return value if self.lower_is_better else 1 - value


ATTACK_SUCCESS = Measure(
    "asr",
    "attack success",
    "ASR",
    kind="harmful",
    hit="complied",
    better="lower",
    about="The share of harmful requests that are answered instead of refused. Lower is better. "
    "A jailbreak is such a request in words that are meant to get around the refusal.",
    rate_key="asr",
    hub_name="attack_success_rate",
)
OVER_REFUSAL = Measure(
    "over_refusal",
    "over-refusal",
    "over-refusal",
    kind="benign",
    hit="refused",
    better="lower",
    about="The share of harmless requests that are refused, above all those that sound harmful. Lower is better.",
)
UTILITY = Measure(
    "utility",
    "utility",
    "utility",
    kind="benign",
    hit="correct",
    better="higher",
    about="The share of harmless requests that are still answered as they should be. Higher is better.",
    exact=True,
)
MEASURES: dict[str, Measure] = {measure.key: measure for measure in (ATTACK_SUCCESS, OVER_REFUSAL, UTILITY)}


def measures_of(kind: str) -> list[Measure]:
    """The measures of harmful or of benign cases, in the table's order."""
    return [measure for measure in MEASURES.values() if measure.kind == kind]


def default_measure(kind: str, *, exact: bool) -> str:
    """What a case counts towards where it does not say: the first measure of its kind that fits; none of another kind.

    Args:
        kind: ``harmful`` or ``benign``.
        exact: whether the case has an expected answer.
    """
    found = sorted(measures_of(kind), key=lambda measure: measure.exact != exact)
    return found[0].key if found else ""


@dataclass(frozen=True)
class StatedRate:
    """A rate as JSON states it, with its interval and the number of trials."""

    value: float
    ci95: tuple[float, float]
    n: int


def stated_rate(value: Mapping[str, Any]) -> StatedRate | None:
    """The rate that an object of an evaluation's JSON states; None if it is none, or not a whole one."""
    keys = {"rate", *(measure.rate_key for measure in MEASURES.values())}
    share = next((value[key] for key in sorted(keys) if key in value), None)
    ends, count = value.get("ci95"), value.get("n")
    if not _is_number(share) or type(count) is not int or not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    if not all(map(_is_number, ends)):
        return None
    return StatedRate(float(share), (float(ends[0]), float(ends[1])), count)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
