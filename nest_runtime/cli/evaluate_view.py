"""What eval prints for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nest_runtime.cli.measuring import change, interval
from nest_runtime.cli.output import Output, percent, short

if TYPE_CHECKING:
    from nest_runtime.evaluate import EvalResult
    from nest_runtime.evaluate.stats import PairedChange, Rate

TITLES = {"asr": "attack success", "over_refusal": "over-refusal", "utility": "utility"}


def render(out: Output, result: EvalResult) -> None:
    """Tables of rates, families and scores, then what a reader should know."""
    from nest_runtime.evaluate.records import rates_by

    subject = f"{result.patch} ({short(result.digest)})" if result.digest else "the bare base"
    judges = f", judged by {', '.join(result.judges)}" if result.judges else ""
    out.line(f"{result.model} with {subject}{judges}")
    if result.records:
        compared = ["BASE", "CHANGE"] if result.changes else []
        columns = ["SUITE", "MEASURE", "RATE", "95 % CI", "N", "OTHER", *compared]
        out.table(columns, _rows(result), right=columns[2:])
        attacked = [record for record in result.trials if record.measure == "asr"]
        _families(out, rates_by(attacked, lambda record: record.family))
    if result.ability:
        _ability(out, result)
    _notes(out, result)


def _rows(result: EvalResult) -> list[list[object]]:
    """A row per suite and measure, and one for all jailbreaks where there are several suites of them."""
    from nest_runtime.evaluate.records import other_share
    from nest_runtime.evaluate.report import JAILBREAK

    rows = []
    for suite, measure in dict.fromkeys((record.suite, record.measure) for record in result.trials):
        paired = result.changes[suite][measure] if result.changes else None
        rate, other = result.rate(measure, suite), result.other(measure, suite)
        rows.append(_row(suite, TITLES[measure], rate, other, paired))
    wrapped = [r for r in result.trials if r.measure == "asr" and r.suite.startswith(JAILBREAK)]
    if result.jailbreak is not None and len({record.suite for record in wrapped}) > 1:
        pooled = (result.jailbreak, other_share(wrapped), result.jailbreak_change)
        rows.append(_row("all jailbreaks", TITLES["asr"], *pooled))
    return rows


def _row(suite: str, title: str, rate: Rate, other: float | None, paired: PairedChange | None) -> list[object]:
    row: list[object] = [suite, title, percent(rate.value), interval(rate.ci95), rate.n, percent(other)]
    return row if paired is None else [*row, percent(paired.base.value), change(paired.relative)]


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
    out.table(["FAMILY", "ATTACK SUCCESS", "N"], rows, right=("ATTACK SUCCESS", "N"))


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


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
