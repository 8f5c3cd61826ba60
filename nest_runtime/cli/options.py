"""Options made from settings: a dataclass says what its fields are (settings.py), and commands take them as flags.

    @with_flags
    def train(ctx: typer.Context, *, harmful: Harmful, settings: Annotated[Mapping[str, Any], Flags(Recipe)]) -> None:

A new field with a flag is an option of such a command, with its help, its range and its completion.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import seconds_of
from nest_runtime.errors import UsageError
from nest_runtime.settings import Setting, settings_of


@runtime_checkable
class FlagGroup(Protocol):
    """What stands for several options in a command's signature."""

    def parameters(self) -> list[inspect.Parameter]:
        """The options, as typer reads them."""

    def gather(self, given: dict[str, Any]) -> Any:
        """Take the options' values out of what typer gave, and make of them what the command gets."""


@dataclass(frozen=True)
class Flags:
    """Marks a command's parameter that stands for the flags of a class of settings.

    What the command gets is a mapping from fields to values. Classes of settings within the class come with it: the
    command gets their instances, or None for an optional one whose own required setting was not given.

    Attributes:
        owner: the dataclass.
        only: the fields whose flags are taken; empty takes all that have one.
        apart: fields that the command has an option of its own for.
        unset: an option that was not given is None, and not the field's default.
    """

    owner: type
    only: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    unset: bool = False

    def parameters(self) -> list[inspect.Parameter]:
        """The options, as typer reads them."""
        return [parameter_of(about, unset=self.unset) for about, _ in self._walk()]

    def gather(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take the options' values out of what typer gave, as values of the fields."""
        found: dict[str, Any] = {}
        for about, inner in self._walk():
            value = _value(about, given.pop(parameter_name(about.flag)))
            if inner is None:
                found[about.name] = value
            else:
                found.setdefault(inner.name, {})[about.name] = value
        for inner in _inner(self.owner):
            if inner.name in found:
                found[inner.name] = inner.made(found[inner.name])
        return found

    def _walk(self) -> Iterator[tuple[Setting, _Inner | None]]:
        """Each setting that has a flag, and the class within the owner that it belongs to."""
        own, inner = settings_of(self.owner), {part.name: part for part in _inner(self.owner)}
        for field in dataclasses.fields(self.owner):
            if field.name in self.apart or (self.only and field.name not in self.only):
                continue
            if field.name in inner:
                part = inner[field.name]
                yield from ((about, part) for about in settings_of(part.owner).values() if about.flag)
            elif field.name in own and own[field.name].flag:
                yield own[field.name], None


@dataclass(frozen=True)
class _Inner:
    """A field that holds settings of its own."""

    name: str
    owner: type
    optional: bool

    def made(self, values: dict[str, Any]) -> Any:
        """The instance of these values; None if it may be and what has no default is not given.

        Raises:
            UsageError: it is not given, and another value was.
        """
        settings = settings_of(self.owner)
        missing = next((about for name, about in settings.items() if about.is_required and values[name] is None), None)
        if not self.optional or missing is None:
            return self.owner(**values)
        for name, value in values.items():
            if not settings[name].is_required and value != settings[name].default:
                flags = settings[name].flag.split("/")[0], missing.flag
                raise UsageError(f"{flags[0]} is given without {flags[1]}", f"add {flags[1]}, or leave it out")
        return None


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, in which each parameter that ``Flags`` or another group marks is its options instead."""
    signature = inspect.signature(command, eval_str=True)
    marks = {name: mark for name, each in signature.parameters.items() if (mark := _mark(each)) is not None}
    parameters: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        parameters += marks[name].parameters() if name in marks else [each.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        gathered = {name: mark.gather(given) for name, mark in marks.items()}
        command(**given, **gathered)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _mark(parameter: inspect.Parameter) -> FlagGroup | None:
    if get_origin(parameter.annotation) is not Annotated:
        return None
    return next((item for item in get_args(parameter.annotation)[1:] if isinstance(item, FlagGroup)), None)


def parameter_name(flag: str) -> str:
    """The name of an option's parameter, which its environment variable ends in: ``--max-queue`` is ``max_queue``."""
    return flag.split("/")[0].removeprefix("--").replace("-", "_")


def parameter_of(about: Setting, *, unset: bool = False) -> inspect.Parameter:
    """One option, as typer reads it.

    Args:
        about: the setting; it has a flag.
        unset: the option is None if it is not given.
    """
    kind, default = about.item, None if about.is_required else about.default
    if about.duration:
        kind, default = str, f"{default:g}s"
    elif about.pair is not None:
        kind, default = bool, default == about.pair[0]
    elif about.several:
        kind, default = list[kind], None  # type: ignore[valid-type]
    elif about.denied:
        default = not default
    if unset:
        default = None
    option = typer.Option(
        about.flag,
        metavar=about.metavar or ("|".join(about.choices) if about.choices and about.pair is None else None),
        help=about.help.replace("[", r"\["),
        min=about.low,
        max=about.high,
        autocompletion=_completion(about),
    )
    return inspect.Parameter(
        parameter_name(about.flag),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if default is None else kind, option],
    )


def _completion(about: Setting) -> Callable[[str], list[tuple[str, str]]] | None:
    if about.names:
        found: Callable[[str], list[tuple[str, str]]] = getattr(complete, about.names)
        return found
    return complete.offer(lambda: about.choices) if about.choices and about.pair is None else None


def _value(about: Setting, value: Any) -> Any:
    """The field's value, of what typer read."""
    if about.several:
        return tuple(value or ())
    if value is None:
        return None
    if about.duration:
        return seconds_of(value, about.flag)
    if about.pair is not None:
        return about.pair[0 if value else 1]
    return not value if about.denied else value


@functools.cache
def _inner(owner: type) -> tuple[_Inner, ...]:
    """The fields of a class that hold settings of their own."""
    found = []
    for name, hint in get_type_hints(owner).items():
        kinds = [part for part in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(part)]
        if kinds and isinstance(kinds[0], type) and settings_of(kinds[0]):
            found.append(_Inner(name, kinds[0], type(None) in get_args(hint)))
    return tuple(found)
