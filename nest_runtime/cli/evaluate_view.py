"""What eval prints for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nest_runtime.cli.measuring import change, interval
from nest_runtime.cli.output import Output, percent
from nest_runtime.escape import short
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES

if TYPE_CHECKING:
    from nest_runtime.evaluate import EvalResult
    from nest_runtime.evaluate.stats import Corrected, PairedChange, Rate


def render(out: Output, result: EvalResult) -> None:
    """Tables of rates, families and scores, then what a reader should know."""
    from nest_runtime.evaluate.records import rates_by

    subject = f"{result.patch} ({short(result.digest)})" if result.digest else "the bare base"
    judges = f", judged by {', '.join(result.judges)}" if result.judges else ""
    out.line(f"{result.model} with {subject}{judges}")
    if result.records:
        rows = list(_rows(result))
        columns = ["SUITE", "MEASURE", "RATE", "95 % CI", "N", "OTHER"]
        cells = [row.cells() for row in rows]
        if any(row.corrected for row in rows):
            columns += ["CORRECTED", "95 % CI"]
            cells = [[*row, *_corrected(source.corrected)] for row, source in zip(cells, rows, strict=True)]
        out.table(columns, cells, right=columns[2:])
        _against_base(out, [row for row in rows if row.paired is not None])
        attacked = [record for record in result.trials if record.measure == ATTACK_SUCCESS.key]
        _families(out, rates_by(attacked, lambda record: record.family))
    if result.ability:
        _ability(out, result)
    if result.suites:
        _sources(out, result)
    _notes(out, result)


@dataclass(frozen=True)
class _Row:
    """One measure on one suite."""

    suite: str
    title: str
    rate: Rate
    other: float | None
    paired: PairedChange | None
    corrected: Corrected | None = None

    def cells(self) -> list[object]:
        rate = self.rate
        return [self.suite, self.title, percent(rate.value), interval(rate.ci95), rate.n, percent(self.other)]


def _rows(result: EvalResult) -> Iterator[_Row]:
    """A row per suite and measure, and one for all jailbreaks if there are several suites of them."""
    from nest_runtime.evaluate.records import other_share
    from nest_runtime.evaluate.suites import is_jailbreak

    for suite, measure in dict.fromkeys((record.suite, record.measure) for record in result.trials):
        paired = result.changes[suite][measure] if result.changes else None
        rate, other = result.rate(measure, suite), result.other(measure, suite)
        yield _Row(suite, MEASURES[measure].title, rate, other, paired, result.corrected(measure, suite))
    wrapped = [r for r in result.trials if r.measure == ATTACK_SUCCESS.key and is_jailbreak(r.suite)]
    if result.jailbreak is not None and len({record.suite for record in wrapped}) > 1:
        mended = result.jailbreak_corrected
        other = other_share(wrapped)
        yield _Row("all jailbreaks", ATTACK_SUCCESS.title, result.jailbreak, other, result.jailbreak_change, mended)


def _corrected(found: Corrected | None) -> list[str]:
    """A rate corrected for the judge's errors, and its interval."""
    return ["-", "-"] if found is None else [percent(found.value), interval(found.ci95)]


def _against_base(out: Output, rows: Sequence[_Row]) -> None:
    """What the patch changed, on the same cases."""
    if not rows:
        return
    out.line()
    cells = [
        (row.suite, row.title, percent(row.paired.base.value), percent(row.rate.value), change(row.paired.relative))
        for row in rows
        if row.paired is not None
    ]
    columns = ("SUITE", "MEASURE", "BASE", "PATCHED", "CHANGE")
    out.table(columns, cells, right=columns[2:])


def _notes(out: Output, result: EvalResult) -> None:
    lost = [name for name in ("empty", "unparsable") if any(record.outcome == name for record in result.records)]
    for name in lost:
        count = sum(record.outcome == name for record in result.records)
        out.line(f"{count} of {len(result.records)} answers were {name}; they stay in the denominator")
    agreement = result.agreement
    if agreement is not None:
        kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
        out.line(f"{' and '.join(agreement.judges)} agree on {percent(agreement.agreed.value)}; Cohen's kappa {kappa}")
    for name, value in result.cost.items():
        out.line(f"judge cost, {name}: {value}")
    for note in result.notes:
        out.note(note)


def _families(out: Output, families: Mapping[str, Mapping[str, Any]]) -> None:
    """Attack success by family, worst first, where more than one family was tried."""
    if len(families) < 2:
        return
    out.line()
    worst = sorted(families.items(), key=lambda item: (-item[1]["rate"], item[0]))
    rows = [[name, percent(figures["rate"]), figures["n"]] for name, figures in worst]
    columns = (ATTACK_SUCCESS.title.upper(), "N")
    out.table(["FAMILY", *columns], rows, right=columns)


def _ability(out: Output, result: EvalResult) -> None:
    """Scores of lm-eval's tasks; the parts of a group stay in the JSON."""
    shown = {score.task for score in result.ability}
    scores = [score for score in result.ability if score.group not in shown]
    columns = ["TASK", "METRIC", "VALUE", "STDERR", "N"]
    columns += ["BASE", "CHANGE", "P"] if any(score.base for score in scores) else []
    rows = []
    for score in scores:
        row: list[object] = [score.task, score.name, _number(score.value), _number(score.stderr), score.n]
        if score.change is not None:
            p = score.change["mcnemar_p"]
            difference = score.change["difference"]
            moved = "-" if difference is None else f"{difference:+.4f}"
            row += [_number(score.change["base"]), moved, "-" if p is None else f"{p:.3f}"]
        rows.append(row)
    out.table(columns, rows, right=columns[2:])


def _sources(out: Output, result: EvalResult) -> None:
    """Where the suites come from."""
    out.line()
    rows = [[name, found.n, found.available, found.licence, found.source] for name, found in result.suites.items()]
    out.table(["SUITE", "N", "OF", "LICENCE", "SOURCE"], rows, right=("N", "OF"))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
