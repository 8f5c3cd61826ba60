"""An evaluation as Markdown tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nest_runtime.escape import short
from nest_runtime.evaluate.markdown import NONE, interval, p_value, percent, signed_percent, table
from nest_runtime.evaluate.records import rates_by
from nest_runtime.evaluate.stats import PairedChange, Rate
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES

if TYPE_CHECKING:
    from nest_runtime.evaluate.report import EvalResult


def markdown(result: EvalResult) -> str:
    """The rates by suite, with the change from the base where it is known; attack success by family; judges."""
    who = f"{result.model or 'model'}, patch {result.patch}" + (f" ({short(result.digest)}…)" if result.digest else "")
    judges = f", judged by {', '.join(result.judges)}" if result.judges else ""
    parts = [f"**{who}**{judges}."]
    parts += [made for make in (_suite_table, _family_table, _ability_table, _source_table) if (made := make(result))]
    agreement = result.agreement
    if agreement is not None:
        kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
        names = " and ".join(agreement.judges)
        parts.append(f"Judges {names} agree on {agreement.agreed}; Cohen's kappa {kappa}.")
    parts += [f"Note: {note}." for note in result.notes]
    return "\n\n".join(parts) + "\n"


def _suite_table(result: EvalResult) -> str:
    if not result.records:
        return ""
    head = ["suite", "measure", "rate", "95 % interval", "n", "other", "empty", "unparsable"]
    mended = any(result.corrected(measure) for measure in MEASURES)
    if mended:
        head += ["corrected for the judge", "its 95 % interval"]
    if result.changes is not None:
        head += ["base", "change (points)", "relative", "McNemar p"]
    rows = []
    for suite, measure in dict.fromkeys((r.suite, r.measure) for r in result.trials):
        records = [r for r in result.trials if (r.suite, r.measure) == (suite, measure)]
        rate = result.rate(measure, suite)
        lost = [str(sum(r.outcome == name for r in records)) for name in ("empty", "unparsable")]
        row = [
            suite,
            f"{MEASURES[measure].title} ({MEASURES[measure].hit})",
            percent(rate.value),
            interval(rate.ci95),
            str(rate.n),
            percent(result.other(measure, suite)),
            *lost,
        ]
        if mended:
            found = result.corrected(measure, suite)
            row += [NONE, NONE] if found is None else [percent(found.value), interval(found.ci95)]
        if result.changes is not None:
            row += _change(result.changes.get(suite, {}).get(measure))
        rows.append(row)
    return table(head, rows)


def _family_table(result: EvalResult) -> str:
    rows = []
    for suite in dict.fromkeys(r.suite for r in result.trials if r.measure == ATTACK_SUCCESS.key):
        records = [r for r in result.trials if r.suite == suite and r.measure == ATTACK_SUCCESS.key]
        families = rates_by(records, lambda r: r.family)
        if len(families) < 2:
            continue
        for family, figures in families.items():
            rate = Rate(figures["successes"], figures["n"])
            rows.append([suite, family, percent(rate.value), interval(rate.ci95), str(rate.n)])
    return table(["suite", "family", ATTACK_SUCCESS.title, "95 % interval", "n"], rows) if rows else ""


def _ability_table(result: EvalResult) -> str:
    rows = []
    for score in result.ability:
        ends = NONE if score.ci95 is None else " to ".join(f"{end:.3f}" for end in score.ci95)
        change = score.change or {}
        compared = [
            _points(change.get("base")),
            _points(change.get("difference"), "+"),
            p_value(change.get("mcnemar_p")),
        ]
        name = f"{score.group} / {score.task}" if score.group else score.task
        figures = [_points(score.value), _points(score.stderr), ends, str(score.n)]
        rows.append([name, score.name, *figures, *compared, p_value(change.get("mcnemar_p"))])
    head = ["task", "metric", "value", "stderr", "95 % interval", "n", "base", "change", "McNemar p"]
    return table(head, rows) if rows else ""


def _source_table(result: EvalResult) -> str:
    rows = [[name, str(s.n), str(s.available), s.licence, s.source] for name, s in result.suites.items()]
    return table(["suite", "n", "drawn from", "licence", "source"], rows) if rows else ""


def _points(value: float | None, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.3f}"


def _change(change: PairedChange | None) -> list[str]:
    if change is None or change.difference is None:
        return [NONE] * 4
    low, high = change.difference_ci95
    points = f"{100 * change.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return [percent(change.base.value), points, signed_percent(change.relative), p_value(change.p_value)]
