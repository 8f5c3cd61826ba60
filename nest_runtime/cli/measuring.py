"""What eval and compare share: the cases that the user named, and how rates are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nest_runtime.cli.output import percent
from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.cli.output import Output
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


def families_table(out: Output, families: Mapping[str, Mapping[str, Any]]) -> None:
    """Attack success by family, worst first, where more than one family was tried."""
    if len(families) < 2:
        return
    out.line()
    worst = sorted(families.items(), key=lambda item: (-item[1]["rate"], item[0]))
    rows = [[name, percent(figures["rate"]), figures["n"]] for name, figures in worst]
    out.table(["FAMILY", "ATTACK SUCCESS", "N"], rows, right=("ATTACK SUCCESS", "N"))
