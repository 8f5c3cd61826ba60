"""What a row of the comparison counts, and its change from another row, trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nest_runtime.evaluate.records import Record
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.stats import PairedChange, paired_change
from nest_runtime.evaluate.suites import is_jailbreak
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES


def headline(result: EvalResult) -> list[str]:
    """The suites that make up a row's attack success: the jailbreak ones, else all harmful ones."""
    suites = list(dict.fromkeys(record.suite for record in result.trials if record.measure == ATTACK_SUCCESS.key))
    jailbreaks = [suite for suite in suites if is_jailbreak(suite)]
    return jailbreaks or suites


def trials(result: EvalResult, measure: str, suites: Sequence[str] | None = None) -> list[Record]:
    """A measure's trials; those of harmful prompts only in ``suites`` (None: all)."""
    chosen = suites if MEASURES[measure].kind == "harmful" else None
    return [r for r in result.trials if r.measure == measure and (chosen is None or r.suite in chosen)]


def versus(base: Sequence[EvalResult], new: Sequence[EvalResult], measure: str) -> dict[str, Any] | None:
    """The change of a measure from ``base`` to ``new``, paired trial by trial, seed by seed.

    One base result serves every seed. None if the measure has no trials.
    """
    before = [base[min(i, len(base) - 1)] for i in range(len(new))]
    changes = [_paired(old, now, measure) for old, now in zip(before, new, strict=True)]
    if not changes[0].n:
        return None
    was, now = fmean(c.base.value or 0.0 for c in changes), fmean(c.new.value or 0.0 for c in changes)
    worst = max(changes, key=lambda change: change.p_value)
    return {
        "base": was,
        "new": now,
        "difference": now - was,
        "relative": (now - was) / was if was else None,
        "mcnemar_p": worst.p_value,
        "n": worst.n,
        "by_seed": [change.to_json() for change in changes],
    }


def _paired(base: EvalResult, new: EvalResult, measure: str) -> PairedChange:
    suites = headline(base)
    was = {(r.suite, r.trial): r.hit for r in trials(base, measure, suites)}
    now = {(r.suite, r.trial): r.hit for r in trials(new, measure, suites)}
    return paired_change([was[key] for key in was], [now[key] for key in was])
