"""Choosing each method's one setting: the values tried, their scores on validation cases, the one chosen.

Every method with a knob gets as many values, the same cases and the same rule. The test cases have no
part in it. Running the cells is compare.py's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nest_runtime.compare.methods.base import FitData
from nest_runtime.evaluate.cases import Case
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, OVER_REFUSAL


@dataclass(frozen=True)
class SweepRow:
    """One value tried: its rates on the validation cases by measure, and whether it was chosen.

    ``other`` is the share of harmful prompts whose answers were neither refusals nor of use; no part of the score.
    """

    method: str
    knob: str
    value: float
    rates: Mapping[str, float | None]
    score: float
    chosen: bool = False
    other: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As files keep it: the rates beside the rest."""
        fields = {name: getattr(self, name) for name in ("method", "knob", "value")}
        return {**fields, **self.rates, "other": self.other, "score": self.score, "chosen": self.chosen}


def held_cases(data: FitData) -> list[Case]:
    """The held-out training prompts as cases: harmful ones measure attack success, benign ones over-refusal."""
    cases = [
        Case(f"held/harmful/{i:04d}", example.messages, "harmful", "held-out prompts")
        for i, example in enumerate(data.held_harmful)
    ]
    return cases + [
        Case(f"held/benign/{i:04d}", example.messages, "benign", "held-out benign", measure=OVER_REFUSAL.key)
        for i, example in enumerate(data.held_benign)
    ]


def sweep_row(method: str, knob: str, value: float, result: EvalResult) -> SweepRow:
    """Its rates, and its score: attack success + over-refusal + lost utility, what is not measured left out."""
    rates = {name: result.rate(name).value for name in MEASURES}
    score = sum(MEASURES[name].loss(rate) for name, rate in rates.items() if rate is not None)
    return SweepRow(method, knob, value, rates, round(score, 6), other=result.other(ATTACK_SUCCESS.key))


def mark_chosen(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """The row with the lowest score of each method marked; of equal ones the first, which is the smallest value."""
    best: dict[str, SweepRow] = {}
    for row in rows:
        if row.method not in best or row.score < best[row.method].score:
            best[row.method] = row
    return tuple(replace(row, chosen=row is best[row.method]) for row in rows)


def edge_notes(rows: Sequence[SweepRow]) -> list[str]:
    """Which methods' chosen values lie at an end of what was tried: a better one may lie beyond."""
    notes = []
    for row in rows:
        tried = [other.value for other in rows if other.method == row.method]
        if row.chosen and len(tried) > 1 and row.value in (min(tried), max(tried)):
            end = "lowest" if row.value == min(tried) else "highest"
            notes.append(f"{row.method}: the chosen {row.knob} {row.value:g} is the {end} that was tried")
    return notes


def settings_file(
    values: Mapping[str, float], sweep: Sequence[SweepRow], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``--write-settings`` keeps: the chosen values, how they were chosen, for what base, where and when."""
    kept = (
        "model",
        "base_hash",
        "harmful",
        "benign",
        "validation_cases",
        "recipe",
        "machine",
        "created",
        "nest_runtime",
    )
    return {
        "values": dict(values),
        **{name: identity[name] for name in kept},
        "sweep": [row.to_json() for row in sweep],
    }
