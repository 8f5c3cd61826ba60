"""What eval, compare and claim share: the cases that the user named, limits of measures, how rates are printed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.errors import UsageError
from nest_runtime.measures import MEASURES, Measure

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


def with_limits(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each measure instead of its parameter ``limits``: a dict of those that are given.

    The options are made of the table of measures (``--max-asr``, ``--min-utility``).
    """
    own = inspect.signature(command, eval_str=True)
    made = {f"limit_of_{measure.key}": measure for measure in MEASURES.values()}

    @functools.wraps(command)
    def called(**given: Any) -> None:
        values = {measure.key: given.pop(name) for name, measure in made.items()}
        command(**given, limits={key: value for key, value in values.items() if value is not None})

    parameters: list[inspect.Parameter] = []
    for name, parameter in own.parameters.items():
        parameters += [_limit(new, of) for new, of in made.items()] if name == "limits" else [parameter]
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _limit(name: str, measure: Measure) -> inspect.Parameter:
    title = measure.title[0].upper() + measure.title[1:]
    words = f"{title} at {'most' if measure.lower_is_better else 'least'}, 0 to 1."
    option = typer.Option(measure.option, metavar="SHARE", min=0, max=1, help=words)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[float | None, option])


def interval(ends: Sequence[float]) -> str:
    """The ends of an interval of shares, in per cent."""
    low, high = ends
    return f"{100 * low:.1f}-{100 * high:.1f}"


def change(value: float | None) -> str:
    """A relative change in per cent, with its sign."""
    return "-" if value is None else f"{100 * value:+.0f} %"
