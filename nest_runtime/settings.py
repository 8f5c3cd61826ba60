"""Settings: dataclass fields that carry their help, their range and their flag.

    @described
    @dataclass(frozen=True)
    class Recipe:
        z: float = setting(2.0, "Keep neurons whose z-score is above this.", low=0, high=100, flag="--z", metavar="Z")

        def __post_init__(self) -> None:
            check(self, "recipe:")

Checks, docstrings, the options of commands (cli/options.py) and the reference pages (docs/make_reference.py) read them
from there. Nothing is parsed or printed here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from nest_runtime.errors import UsageError
from nest_runtime.hints import did_you_mean

_KEY = "setting"
_T = TypeVar("_T")
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Setting:
    """What is known about one field.

    Attributes:
        help: a sentence or two; what ``--help`` shows.
        more: what the docstring and the reference say beside it.
        low, high: the lowest and the highest value allowed, both included; None sets no limit.
        above: a value has to be greater than this.
        choices: the only values allowed.
        flag: on the command line: ``--k-max``, ``--no-admission-test`` for a field that is true without it, or
            a pair ``--loadings/--tied``; empty for a setting without an option.
        pair: the two values that such a pair of flags stands for.
        metavar: what stands for the value in ``--help``.
        duration: seconds, typed as ``60s`` or ``5m``.
        names: what Tab offers: the name of a function in cli/complete.py.
        group: the title of the group that begins with this field.
        before: what held before there was this setting, for files of earlier releases; None: the default.
        name, kind, default: the field's own; ``settings_of`` fills them in.
    """

    help: str
    more: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    pair: tuple[str, str] | None = None
    metavar: str | None = None
    duration: bool = False
    names: str = ""
    group: str = ""
    before: Any = None
    name: str = ""
    kind: Any = None
    default: Any = None

    @property
    def optional(self) -> bool:
        """Whether None is a value of it."""
        return type(None) in typing.get_args(self.kind)

    @property
    def plain(self) -> Any:
        """Its type, without the None of an optional one."""
        if not self.optional:
            return self.kind
        (kind,) = [part for part in typing.get_args(self.kind) if part is not type(None)]
        return kind

    @property
    def item(self) -> Any:
        """The type of one value: of an element where the setting is a tuple; ``str`` for literals."""
        kind = self.plain
        if typing.get_origin(kind) is tuple:
            return typing.get_args(kind)[0]
        return str if typing.get_origin(kind) is Literal else kind

    @property
    def several(self) -> bool:
        """Whether it holds a tuple of values."""
        return typing.get_origin(self.plain) is tuple

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def denied(self) -> bool:
        """Whether the flag says the opposite of the field: ``--no-admission-test`` of ``admission_test``."""
        return self.kind is bool and self.flag.startswith("--no-")

    @property
    def told(self) -> str:
        """Everything that is said about it."""
        help = f"False: {self.help[:1].lower()}{self.help[1:]}" if self.denied else self.help
        return f"{help} {self.more}".rstrip()

    @property
    def allowed(self) -> str:
        """The values allowed, in words; empty if there is no limit."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.above is not None:
            return f"above {self.above:,}"
        if self.low is not None and self.high is not None:
            return f"{self.low} to {self.high}"
        return "" if self.low is None else f"{self.low} or more"


def setting(
    default: _T,
    help: str,
    *,
    more: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    flag: str = "",
    pair: tuple[str, str] | None = None,
    metavar: str | None = None,
    duration: bool = False,
    names: str = "",
    group: str = "",
    before: Any = None,
    shown: bool = True,
) -> _T:
    """A dataclass field with this default; the rest is as in :class:`Setting`.

    Args:
        default: its value if none is given; a class is called for one.
        help: see there, as for the rest.
        shown: whether ``repr`` shows its value; secrets are not shown.
    """
    about = Setting(help, more, low, high, above, choices, flag, pair, metavar, duration, names, group, before)
    return typing.cast(_T, dataclasses.field(default=default, repr=shown, metadata={_KEY: about}))


def required(help: str, *, more: str = "", flag: str = "", metavar: str | None = None) -> Any:
    """A dataclass field without a default; the arguments are as in :class:`Setting`."""
    return dataclasses.field(metadata={_KEY: Setting(help, more, flag=flag, metavar=metavar)})


def settings_of(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass by field, in order, with names, types and defaults; other fields are left out."""
    return _read(owner)


@functools.cache
def _read(owner: Any) -> Mapping[str, Setting]:
    hints, found, group = typing.get_type_hints(owner), {}, ""
    for field in dataclasses.fields(owner):
        about: Setting | None = field.metadata.get(_KEY)
        if about is not None:
            group = about.group or group
            found[field.name] = dataclasses.replace(
                about, name=field.name, kind=hints[field.name], default=field.default, group=group
            )
    return types.MappingProxyType(found)


def check(owner: Any, what: str, *, by_flag: bool = False) -> None:
    """Check the values of a dataclass of settings.

    Args:
        owner: the value, an instance.
        what: how to begin an error: ``recipe:``.
        by_flag: call a value by its option, where it has one, and not by its field.

    Raises:
        UsageError: a value is not allowed; the field, what was found and what is expected are named.
    """
    for field, about in settings_of(type(owner)).items():
        value = getattr(owner, field)
        if value is None and about.optional:
            continue
        name = about.flag.split("/")[0] if by_flag and about.flag else field
        if about.choices and value not in about.choices:
            near = did_you_mean(value, about.choices) if isinstance(value, str) else ""
            raise UsageError(f"{what} {name} is {value!r}", f"{near}use {about.allowed}")
        if not _of_type(value, about):
            kind = f"a list of {about.item.__name__}" if about.several else about.item.__name__
            raise UsageError(f"{what} {name} is {value!r}; expected {kind}", f"{name}: {about.help}")
        if not _in_range(value, about):
            raise UsageError(f"{what} {name} is {value}; expected {about.allowed}", f"{name}: {about.help}")


def _of_type(value: Any, about: Setting) -> bool:
    kind = about.item
    if kind not in (bool, int, float, str):
        return True  # paths, and dataclasses that check themselves
    wanted = (int, float) if kind is float else kind
    values = value if about.several else (value,)
    return isinstance(values, tuple) and all(
        isinstance(item, wanted) and isinstance(item, bool) is (kind is bool) for item in values
    )


def _in_range(value: Any, about: Setting) -> bool:
    if about.low is None and about.high is None and about.above is None:
        return True
    if not math.isfinite(value) or (about.above is not None and value <= about.above):
        return False
    return (about.low is None or value >= about.low) and (about.high is None or value <= about.high)


def described(owner: _Class) -> _Class:
    """A class decorator: the settings' texts become part of the docstring, by group."""
    lines = [(owner.__doc__ or "").rstrip()]
    group = None
    for name, about in settings_of(owner).items():
        if about.group != group:
            group = about.group
            lines += ["", f"    {group or 'Attributes'}:"]
        lines += textwrap.wrap(f"{name}: {about.told}", 110, initial_indent=" " * 8, subsequent_indent=" " * 12)
    owner.__doc__ = "\n".join(lines) + "\n"
    return owner
