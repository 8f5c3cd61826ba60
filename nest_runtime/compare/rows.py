"""The comparison as rows: arithmetic on finished cells, no model anywhere.

A row's rates are means over its seeds; the interval is Wilson's for that mean and the number of prompts of
ONE seed, since the same prompts are answered again under every seed. McNemar's p is the largest over the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from nest_runtime.compare.cells import Cell
from nest_runtime.compare.compare import Outcome
from nest_runtime.compare.methods.base import Method
from nest_runtime.compare.paired import headline, trials, versus
from nest_runtime.compare.paper import against_paper
from nest_runtime.evaluate.ability import Score, with_base
from nest_runtime.evaluate.judges.errors import measured_errors
from nest_runtime.evaluate.records import Record, other_share, rate_of
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.stats import Rate, corrected
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, OVER_REFUSAL

FORMAT = 1


def document(outcome: Outcome, methods: Sequence[Method] = ()) -> dict[str, Any]:
    """The whole comparison as JSON values: ``rows`` first, then the paper's figures, sweep and identity.

    Args:
        outcome: the finished cells.
        methods: for titles and looks; a row of none of them is called by its name.
    """
    table = rows(outcome.cells, methods)
    return {
        "format": FORMAT,
        "rows": table,
        "paper": against_paper(outcome.cells, table),
        "sweep": [row.to_json() for row in outcome.sweep],
        "values": dict(outcome.values),
        "notes": list(outcome.notes),
        **outcome.identity,
    }


def rows(cells: Sequence[Cell], methods: Sequence[Method] = ()) -> list[dict[str, Any]]:
    """One row per method, in the order of the cells; every row but base's with its change from base."""
    base = next((cell for cell in cells if cell.method == "base"), None)
    known = {method.name: method for method in methods}
    names = list(dict.fromkeys(cell.method for cell in cells))
    return [_row([cell for cell in cells if cell.method == name], known.get(name), base) for name in names]


def _row(cells: list[Cell], method: Method | None, base: Cell | None) -> dict[str, Any]:
    first = cells[0]
    results = [cell.result for cell in cells]
    suites = headline(first.result)
    rates = {name: _mean_rate([trials(r, name, suites) for r in results]) for name in MEASURES}
    row: dict[str, Any] = {
        "method": first.method,
        "title": first.method if method is None else method.title,
        "look": list(method.look) if method is not None and method.look else None,
        "setting": first.setting,
        "knob": first.knob,
        "value": first.value if first.knob else None,
        "trainable": max(cell.fit["trainable"] for cell in cells),
        "artifact_bytes": max(cell.fit["artifact_bytes"] for cell in cells),
        "seconds": _known(cells, "seconds", lambda values: round(fmean(values), 1)),
        "peak_bytes": _known(cells, "peak_bytes", max),
        **{name: rate["value"] for name, rate in rates.items()},
        "n": rates[ATTACK_SUCCESS.key]["n"],  # of attack success, as is the interval
        "ci95": rates[ATTACK_SUCCESS.key]["ci95"],
        "other": _mean_share([trials(result, ATTACK_SUCCESS.key, suites) for result in results]),
        "other_benign": _mean_share([[r for r in result.trials if r.kind == "benign"] for result in results]),
        "rates": rates,
        "corrected": _corrected(first.result, rates),
        "benign_by_suite": _refused(results),
        "ability": _ability(results, None if base is None else base.result),
        "asr_by_suite": _grouped(results, "suite", None),
        "asr_by_family": _grouped(results, "family", suites),
        "seeds": [cell.seed for cell in cells],
        "per_seed": [_seed(cell, suites) for cell in cells],
    }
    if base is not None and first is not base:
        row["vs_base"] = {name: versus([base.result], results, name) for name in MEASURES}
    return row


def _corrected(result: EvalResult, rates: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The rates corrected for the judge's measured errors, by measure; None for a judge whose errors are not known."""
    found: dict[str, Any] = {}
    for name, rate in rates.items():
        errors = measured_errors(result.judges[0], name) if result.judges else None
        if errors is not None and rate["n"]:
            mended = corrected(Rate(min(round(rate["value"] * rate["n"]), rate["n"]), rate["n"]), errors)
            found |= {} if mended is None else {name: mended.to_json()}
    return found or None


def _ability(results: Sequence[EvalResult], base: EvalResult | None) -> dict[str, dict[str, Any]]:
    """Scores of utility by ``task metric``: the mean over seeds, and its change from the base's.

    The interval of a change is for pairs of the same questions under the first seed.
    """
    if not results[0].ability:
        return {}
    paired = [result.ability if base is None else with_base(result.ability, base.ability) for result in results]
    return {
        f"{score.task} {score.name}": _score(column) for column in zip(*paired, strict=True) for score in column[:1]
    }


def _score(seeds: Sequence[Score]) -> dict[str, Any]:
    """One score over its seeds. Its interval is for the questions of one seed: the others ask the same ones again."""
    first, value = seeds[0], fmean(score.value for score in seeds)
    change = None
    if first.base is not None:
        change = {**(first.change or {}), "base": first.base.value, "difference": value - first.base.value}
    moved = replace(first, value=value)
    if len(seeds) > 1 and set(first.samples.values()) <= {0.0, 1.0}:
        ends: Sequence[float] | None = Rate(min(round(value * first.n), first.n), first.n).ci95
    else:
        ends = moved.ci95
    ci95 = None if ends is None else list(ends)
    return {"value": value, "ci95": ci95, "n": first.n, "higher_is_better": first.higher_is_better, "change": change}


def _mean_share(by_seed: Sequence[Sequence[Record]]) -> float | None:
    """The share of answers that are neither refusals nor of use, a mean over seeds; None without records."""
    shares = [share for records in by_seed if (share := other_share(records)) is not None]
    return fmean(shares) if shares else None


def _known(cells: Sequence[Cell], name: str, pool: Callable[[list[float]], float]) -> float | None:
    """A cost over the cells; None if it was not measured (a patch that was made elsewhere)."""
    values = [cell.fit[name] for cell in cells if cell.fit[name] is not None]
    return pool(values) if values else None


def _seed(cell: Cell, suites: Sequence[str]) -> dict[str, Any]:
    rates = {name: rate_of(trials(cell.result, name, suites)).value for name in MEASURES}
    return {"seed": cell.seed, "seconds": cell.fit["seconds"], "trainable": cell.fit["trainable"], **rates}


def _grouped(results: Sequence[EvalResult], field: str, suites: Sequence[str] | None) -> dict[str, Any]:
    """Attack success by suite or family."""
    key = ATTACK_SUCCESS.key
    names = sorted({getattr(record, field) for record in trials(results[0], key, suites)})
    return {
        name: _mean_rate(
            [[r for r in trials(result, key, suites) if getattr(r, field) == name] for result in results],
            ATTACK_SUCCESS.rate_key,
        )
        for name in names
    }


def _refused(results: Sequence[EvalResult]) -> dict[str, Any]:
    """Over-refusal by suite."""
    key = OVER_REFUSAL.key
    names = sorted({record.suite for record in trials(results[0], key)})
    return {
        name: _mean_rate([[r for r in trials(result, key) if r.suite == name] for result in results]) for name in names
    }


def _mean_rate(by_seed: Sequence[Sequence[Record]], key: str = "value") -> dict[str, Any]:
    """The mean rate over seeds, n of one seed, and the Wilson interval of that mean for that n."""
    rates = [rate_of(records) for records in by_seed]
    n = rates[0].n
    if not n:
        return {key: None, "n": 0, "ci95": [0.0, 1.0]}
    mean = fmean(rate.value or 0.0 for rate in rates)
    return {key: mean, "n": n, "ci95": list(Rate(min(round(mean * n), n), n).ci95)}
