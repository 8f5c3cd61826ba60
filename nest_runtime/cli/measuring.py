"""What eval and compare share: the cases that the user named, and how rates are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.evaluate import Case


def cases_of(model: str, suites: Sequence[str], behaviors: Sequence[str]) -> list[Case]:
    """The cases asked for; all of the reference world's where nothing is said and the model is the reference.

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


def interval(ends: Sequence[float]) -> str:
    """The ends of an interval of shares, in per cent."""
    low, high = ends
    return f"{100 * low:.1f}-{100 * high:.1f}"


def change(value: float | None) -> str:
    """A relative change in per cent, with its sign."""
    return "-" if value is None else f"{100 * value:+.0f} %"
