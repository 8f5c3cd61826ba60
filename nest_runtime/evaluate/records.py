"""Records: one case with its answer and verdicts, and the rates of any number of them. No files, no models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nest_runtime.evaluate.cases import Case, Message
from nest_runtime.evaluate.judges.base import OTHER, Verdict
from nest_runtime.evaluate.stats import Rate
from nest_runtime.measures import MEASURES

_FIELDS = ("id", "suite", "kind", "measure", "family", "category", "attack", "trial", "attempt", "answer")


@dataclass(frozen=True)
class Record:
    """One case with its answer and verdicts.

    Attributes:
        messages: the conversation up to the answer, with the model's own earlier turns.
        verdicts: by judge, the first one's first; rates are the first one's.

    The rest is the case's.
    """

    id: str
    suite: str
    kind: str
    measure: str
    family: str
    category: str
    attack: str
    trial: str
    attempt: int
    messages: tuple[Message, ...]
    answer: str
    verdicts: Mapping[str, Verdict]

    @classmethod
    def of(cls, case: Case, messages: Sequence[Message], answer: str, verdicts: Mapping[str, Verdict]) -> Record:
        """The record of a case."""
        fields = {name: getattr(case, name) for name in _FIELDS if name != "answer"}
        return cls(**fields, messages=tuple(messages), answer=answer, verdicts=dict(verdicts))

    @property
    def outcome(self) -> str:
        """The first judge's."""
        return next(iter(self.verdicts.values())).outcome

    @property
    def hit(self) -> bool:
        """Whether the case counts towards its measure: whether the outcome is the measure's hit."""
        return self.outcome == MEASURES[self.measure].hit

    @property
    def other(self) -> bool:
        """Whether the answer is neither a refusal nor of use: one of judges.base.OTHER."""
        return self.outcome in OTHER

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; ``from_json`` reads them again."""
        verdicts = {name: verdict.to_json() for name, verdict in self.verdicts.items()}
        own = {name: getattr(self, name) for name in _FIELDS}
        return {**own, "messages": list(self.messages), "verdicts": verdicts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The record that ``to_json`` wrote."""
        verdicts = {name: Verdict(**verdict) for name, verdict in data["verdicts"].items()}
        fields = {name: data[name] for name in _FIELDS}
        return cls(**fields, messages=tuple(data["messages"]), verdicts=verdicts)


def trials_of(records: Sequence[Record]) -> tuple[Record, ...]:
    """One record per trial: its first success, else its last attempt."""
    chosen: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.suite, record.trial)
        if key not in chosen or not chosen[key].hit:
            chosen[key] = record
    return tuple(chosen.values())


def rate_of(rows: Sequence[Record]) -> Rate:
    """How many of the records count towards their measure."""
    return Rate(sum(row.hit for row in rows), len(rows))


def other_share(rows: Sequence[Record]) -> float | None:
    """The share of answers that are neither refusals nor of use; None of no records."""
    return sum(row.other for row in rows) / len(rows) if rows else None


def measures(rows: Iterable[Record], measure: str) -> bool:
    """Whether any of the records is about the measure."""
    return any(row.measure == measure for row in rows)


def breakdown(rows: Sequence[Record], measure: str) -> dict[str, Any]:
    """One suite's figures for a measure: rate, outcomes, and rates by family, category and attack."""
    rows = [row for row in rows if row.measure == measure]
    key = MEASURES[measure].rate_key
    counts = Counter(row.outcome for row in rows)
    outcomes = {**dict.fromkeys(("empty", "unparsable"), 0), **counts}  # these two are shown even when there are none
    groups: dict[str, Callable[[Record], str]] = {
        "by_family": lambda row: row.family,
        "by_category": lambda row: row.category,
        "by_attack": lambda row: row.attack,
    }
    split = {name: rates_by(rows, pick, key) for name, pick in groups.items()}
    refused, other = sum(row.outcome == "refused" for row in rows), sum(row.other for row in rows)
    shares = {"refused": refused / len(rows), "other": other / len(rows)}
    return {**rate_of(rows).to_json(key), **shares, "outcomes": outcomes, **split}


def rates_by(rows: Sequence[Record], pick: Callable[[Record], str], key: str = "rate") -> dict[str, Any]:
    """The rate of each group of records, by the group's name, in alphabetical order."""
    names = sorted({pick(row) for row in rows})
    return {name: rate_of([row for row in rows if pick(row) == name]).to_json(key) for name in names}
