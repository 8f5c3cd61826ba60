"""What eval, compare and claim share: the cases that the user named, limits of measures, how rates are printed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nest_runtime.cli.options import parameter_name, parameter_of
from nest_runtime.errors import UsageError
from nest_runtime.measures import MEASURES, Measure
from nest_runtime.settings import Setting

if TYPE_CHECKING:
    from pathlib import Path

    from nest_runtime.evaluate import Case
    from nest_runtime.evaluate.standard import Standard


def cases_of(model: str, suites: Sequence[str], behaviors: Sequence[str]) -> list[Case]:
    """The cases asked for; all of the reference world's if nothing is said and the model is the reference.

    Raises:
        UsageError: nothing is said for another model, or there is no such suite.
        DataError: a file cannot be read.
    """
    from nest_runtime.evaluate import load_behaviors, load_suites

    if not suites and not behaviors:
        if model != "reference":
            raise UsageError("nothing to measure on: no --suite and no --behaviors", "give --behaviors FILE")
        suites = ["reference"]
    return [*load_suites(suites), *(case for file in behaviors for case in load_behaviors(file))]


def sampled(
    model: str,
    suites: Sequence[str],
    behaviors: Sequence[str],
    *,
    data: Path | None,
    limit: int | None,
    seed: int = 0,
    others: bool = False,
) -> tuple[list[Case], Standard | None]:
    """The cases asked for beside the standard suite, at most ``limit`` of each, and that suite where it is named.

    Args:
        model: as the user named it.
        suites: names, those of the standard suite and its parts among them.
        behaviors: files with cases.
        data: the folder of public prompt sets; needed for the standard suite.
        limit: the most cases of a suite; None: all.
        seed: of the draw.
        others: something else is measured too, so that naming no cases is allowed.

    Raises:
        UsageError: nothing is said for a model that is not the reference, or a suite or the data is missing.
        DataError: a file cannot be read.
    """
    from nest_runtime.evaluate import sample_cases
    from nest_runtime.evaluate.standard import load_standard, split_standard

    rest, parts = split_standard(suites)
    standard = None if parts is None else load_standard(parts, data=data, n=limit, seed=seed)
    if not rest and not behaviors and (others or standard is not None):
        return [], standard
    cases = cases_of(model, rest, behaviors)
    return cases if limit is None else sample_cases(cases, limit, seed=seed), standard


def assumptions(behaviors: Sequence[str]) -> list[str]:
    """A remark on each file with prompts that count as harmful because nothing in it says what they are."""
    from nest_runtime.evaluate.layouts import assumed_harmful

    counted = {file: assumed_harmful(file) for file in behaviors}
    says = "count as harmful requests; a column `kind` with `benign` says otherwise"
    return [f"{count} prompts of {file} {says}" for file, count in counted.items() if count]


@dataclass(frozen=True)
class LimitFlags:
    """Marks a command's parameter that stands for an option of each measure: ``--max-asr``, ``--min-utility``.

    The command gets a dict of those that are given.
    """

    def parameters(self) -> list[inspect.Parameter]:
        """The options, as typer reads them."""
        return [parameter_of(_limit(measure)) for measure in MEASURES.values()]

    def gather(self, given: dict[str, Any]) -> dict[str, float]:
        """Take the options' values out of what typer gave."""
        values = {measure.key: given.pop(parameter_name(measure.option)) for measure in MEASURES.values()}
        return {key: value for key, value in values.items() if value is not None}


def _limit(measure: Measure) -> Setting:
    title = measure.title[0].upper() + measure.title[1:]
    words = f"{title} at {'most' if measure.lower_is_better else 'least'}, 0 to 1."
    return Setting(words, low=0, high=1, flag=measure.option, metavar="SHARE", kind=float | None)


def interval(ends: Sequence[float]) -> str:
    """The ends of an interval of shares, in per cent."""
    low, high = ends
    return f"{100 * low:.1f}-{100 * high:.1f}"


def change(value: float | None) -> str:
    """A relative change in per cent, with its sign."""
    return "-" if value is None else f"{100 * value:+.0f} %"
