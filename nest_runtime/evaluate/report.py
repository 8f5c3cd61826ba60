"""What came out of an evaluation: records, and the rates, breakdowns, comparisons and tables made of them.

The records are the result; every figure is computed from them, so a saved file can be read again and
compared with another. Nothing here runs models or judges.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError, EvaluationError
from nest_runtime.evaluate.ability import Score, by_task, with_base
from nest_runtime.evaluate.cases import KINDS
from nest_runtime.evaluate.judges.errors import measured_errors
from nest_runtime.evaluate.records import Record, breakdown, measures, other_share, rate_of, trials_of
from nest_runtime.evaluate.standard import SuiteSource
from nest_runtime.evaluate.stats import Agreement, Corrected, PairedChange, Rate, corrected, paired_change
from nest_runtime.evaluate.suites import is_jailbreak
from nest_runtime.evaluate.tables import markdown
from nest_runtime.io import MAX_RESULT, atomic_write, parse_json, read_text
from nest_runtime.measures import ATTACK_SUCCESS, OVER_REFUSAL, UTILITY, measures_of

FORMAT = 1


@dataclass(frozen=True)
class EvalResult:
    """An evaluation of one subject.

    Attributes:
        model, model_hash: the base. patch, digest: the patch's version and digest; ``base`` and None without one.
        judges: names, the first one's verdicts make the rates.
        settings: of generation. seconds, cost: what it took. created: ISO 8601, UTC.
        records: one per case that was run.
        notes: what a reader should know of the run.
        changes: paired comparison with a base's result, by suite and measure; None without one.
        base_records: that result's records, if there is one.
        ability: scores of general ability, each beside the base's where that was measured too.
        suites: where suites come from, as far as that is known.
    """

    model: str
    model_hash: str
    patch: str
    digest: str | None
    judges: tuple[str, ...]
    records: tuple[Record, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    notes: tuple[str, ...] = ()
    changes: Mapping[str, Mapping[str, PairedChange]] | None = None
    ability: tuple[Score, ...] = ()
    base_records: tuple[Record, ...] = ()
    suites: Mapping[str, SuiteSource] = field(default_factory=dict)

    @property
    def trials(self) -> tuple[Record, ...]:
        """One record per trial: its first success, else its last attempt."""
        return trials_of(self.records)

    def rate(self, measure: str, suite: str | None = None) -> Rate:
        """The rate of a measure, in one suite or over all suites that measure it."""
        rows = [r for r in self.trials if r.measure == measure and suite in (None, r.suite)]
        return rate_of(rows)

    def corrected(self, measure: str, suite: str | None = None) -> Corrected | None:
        """The rate corrected for the first judge's measured errors; None for judges whose errors are not known."""
        return self._mended(measure, self.rate(measure, suite))

    def _mended(self, measure: str, rate: Rate) -> Corrected | None:
        errors = measured_errors(self.judges[0], measure) if self.judges else None
        return None if errors is None else corrected(rate, errors)

    def other(self, measure: str, suite: str | None = None) -> float | None:
        """The share of a measure's trials whose answers are neither refusals nor of use; None without trials."""
        return other_share([r for r in self.trials if r.measure == measure and suite in (None, r.suite)])

    @property
    def over_refusal(self) -> float | None:
        """Refused share of the benign cases that measure it; None if there were none."""
        return self.rate(OVER_REFUSAL.key).value

    @property
    def utility(self) -> float | None:
        """Exactly right share of the benign cases that measure it; None if there were none."""
        return self.rate(UTILITY.key).value

    @property
    def jailbreak(self) -> Rate | None:
        """Attack success over all suites of jailbreaks together; None without one."""
        rows = [r for r in self.trials if r.measure == ATTACK_SUCCESS.key and is_jailbreak(r.suite)]
        return rate_of(rows) if rows else None

    @property
    def jailbreak_corrected(self) -> Corrected | None:
        """:attr:`jailbreak`, corrected for the first judge's measured errors."""
        return None if self.jailbreak is None else self._mended(ATTACK_SUCCESS.key, self.jailbreak)

    @property
    def jailbreak_change(self) -> PairedChange | None:
        """The paired change of :attr:`jailbreak`; None without a base."""
        key, changes = ATTACK_SUCCESS.key, self.changes or {}
        rows = [row[key] for suite, row in changes.items() if key in row and is_jailbreak(suite)]
        if not rows:
            return None
        cells = ("both", "only_base", "only_new", "neither")
        return PairedChange(*(sum(getattr(row, cell) for row in rows) for cell in cells))

    @property
    def agreement(self) -> Agreement | None:
        """Agreement of the first two judges over all answers; None with one judge."""
        if len(self.judges) < 2:
            return None
        first, second = self.judges[:2]
        pairs = [(r.id, r.verdicts[first].coarse, r.verdicts[second].coarse) for r in self.records]
        counted = Counter((a, b) for _, a, b in pairs)
        return Agreement((first, second), dict(counted), tuple(ident for ident, a, b in pairs if a != b))

    def compared_with(self, base: EvalResult) -> EvalResult:
        """This result with its paired comparison to ``base``, trial by trial.

        Raises:
            EvaluationError: the two are not about the same trials, judges or model.
        """
        changes, ability = paired_changes(base, self), with_base(self.ability, base.ability)
        return replace(self, changes=changes, ability=ability, base_records=base.records)

    def summary(self) -> dict[str, Any]:
        """All figures as JSON values, without the records."""
        trials = self.trials
        agreement = self.agreement
        suites = list(dict.fromkeys(record.suite for record in trials))
        by_suite = {suite: [r for r in trials if r.suite == suite] for suite in suites}
        harmful, benign = ([measure.key for measure in measures_of(kind)] for kind in KINDS)
        return {
            "format": FORMAT,
            "model": self.model,
            "model_hash": self.model_hash,
            "patch": self.patch,
            "digest": self.digest,
            "judge": self.judges[0] if self.judges else None,
            "judges": list(self.judges),
            **{m: {s: self._figures(s, rows, m) for s, rows in by_suite.items() if measures(rows, m)} for m in harmful},
            "jailbreak": self._jailbreak_json(),
            **{m: self.rate(m).value for m in benign},
            "other": self.other(ATTACK_SUCCESS.key),
            "rates": {m: self.rate(m).to_json() for m in benign},
            "benign": {
                s: {m: self._figures(s, rows, m) for m in benign if measures(rows, m)}
                for s, rows in by_suite.items()
                if any(row.kind == "benign" for row in rows)
            },
            "changes": None
            if self.changes is None
            else {s: {m: change.to_json() for m, change in row.items()} for s, row in self.changes.items()},
            "agreement": None if agreement is None else agreement.to_json(),
            "ability": by_task(self.ability),
            "suites": {name: source.to_json() for name, source in self.suites.items()},
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
            "cost": dict(self.cost),
            "created": self.created,
            "notes": list(self.notes),
        }

    def _figures(self, suite: str, rows: Sequence[Record], measure: str) -> dict[str, Any]:
        """A suite's breakdown, with the corrected rate where the judge's errors are known."""
        found = self.corrected(measure, suite)
        return {**breakdown(rows, measure), **({} if found is None else {"corrected": found.to_json()})}

    def _jailbreak_json(self) -> dict[str, Any] | None:
        pooled, change = self.jailbreak, self.jailbreak_change
        if pooled is None:
            return None
        found = self.jailbreak_corrected
        mended = {} if found is None else {"corrected": found.to_json()}
        own = pooled.to_json(ATTACK_SUCCESS.rate_key)
        return {**own, **mended, "change": None if change is None else change.to_json()}

    def to_json(self) -> dict[str, Any]:
        """The summary and every record; ``from_json`` gives an equal result back."""
        scores = [score.fields() for score in self.ability]
        records = {"records": self.records, "base_records": self.base_records}
        kept = {name: [record.to_json() for record in rows] for name, rows in records.items()}
        return {**self.summary(), **kept, "scores": scores}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalResult:
        """Read what ``to_json`` wrote; figures are computed again.

        Raises:
            DataError: fields are missing, or the format is of another version.
        """
        if data.get("format") != FORMAT:
            raise DataError(f"evaluation result of format {data.get('format')!r}; expected {FORMAT}", "run eval again")
        try:
            changes = data["changes"]
            return cls(
                **{key: data[key] for key in ("model", "model_hash", "patch", "digest", "settings", "seconds", "cost")},
                judges=tuple(data["judges"]),
                records=tuple(Record.from_json(row) for row in data["records"]),
                base_records=tuple(Record.from_json(row) for row in data.get("base_records", ())),
                created=data["created"],
                notes=tuple(data["notes"]),
                changes=None if changes is None else {s: _read_changes(row) for s, row in changes.items()},
                ability=tuple(Score.of(fields) for fields in data.get("scores", ())),
                suites={name: SuiteSource(**source) for name, source in data.get("suites", {}).items()},
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"evaluation result without {error}", "run eval again") from error

    def save(self, path: str | Path) -> Path:
        """Write the JSON, atomically."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, json.dumps(self.to_json(), indent=1, ensure_ascii=True))
        return target

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read a saved result; raises DataError if it is not one."""
        try:
            data = parse_json(read_text(path, MAX_RESULT))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no evaluation result: {error}", "name a file that eval wrote") from error
        if not isinstance(data, dict):
            raise DataError(f"{path} holds no JSON object", "name a file that eval wrote")
        return cls.from_json(data)

    def markdown(self) -> str:
        """Tables for people: rates by suite, then attack success by family."""
        return markdown(self)


def paired_changes(base: EvalResult, new: EvalResult) -> dict[str, dict[str, PairedChange]]:
    """Per suite and measure, the same trials under ``base`` and under ``new``.

    Raises:
        EvaluationError: the two are not about the same trials, first judge or model.
    """
    if base.model_hash != new.model_hash:
        raise EvaluationError(
            f"results of two models: {base.model_hash} and {new.model_hash}", "compare results of one base"
        )
    if base.judges[:1] != new.judges[:1]:
        raise EvaluationError(f"results of two judges: {base.judges[:1]} and {new.judges[:1]}", "use the same judge")
    before = {(r.suite, r.measure, r.trial): r.hit for r in base.trials}
    after = {(r.suite, r.measure, r.trial): r.hit for r in new.trials}
    if before.keys() != after.keys():
        raise EvaluationError(
            f"the results differ in {len(before.keys() ^ after.keys())} trials of {len(before.keys() | after.keys())}",
            "run both on the same cases",
        )
    changes: dict[str, dict[str, PairedChange]] = {}
    for suite, measure in dict.fromkeys(key[:2] for key in before):
        keys = [key for key in before if key[:2] == (suite, measure)]
        changes.setdefault(suite, {})[measure] = paired_change([before[k] for k in keys], [after[k] for k in keys])
    return changes


def _read_changes(row: Mapping[str, Any]) -> dict[str, PairedChange]:
    return {measure: PairedChange.from_json(change) for measure, change in row.items()}
