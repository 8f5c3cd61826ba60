"""The methods by name, as their files declare them, and the sweep's choices that ship.

A file in this folder with a subclass of ``Method`` that has a ``name`` is all that a new method needs. Names are read
from the source and a file is imported when its method is made: importing loads torch, and neither ``--help`` nor the
Tab key may wait for that.

``defaults.json`` was written by ``compare --sweep --write-settings``: for one base, one training set and
one recipe, the chosen value of every method's knob, with the figures that chose it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.compare import methods
from nest_runtime.errors import DataError, NestError, UsageError
from nest_runtime.hints import did_you_mean
from nest_runtime.install import extra
from nest_runtime.io import MAX_SETTINGS, parse_json, read_text

if TYPE_CHECKING:
    from nest_runtime.compare.methods.base import Method

DEFAULTS = Path(__file__).with_name("defaults.json")
_CLASS = re.compile(r"^class (\w+)\(.*\):\n((?:    .*\n|\n)*)", re.MULTILINE)
_NAME = re.compile(r'^    name = "([^"]+)"$', re.MULTILINE)
_PLACE = re.compile(r"^    place = (\d+)$", re.MULTILINE)
_UNUSUAL = re.compile(r"^    usual = False\b", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Declared:
    """A method as its source declares it: see the attributes of ``Method``."""

    place: int
    name: str
    module: str
    class_name: str
    usual: bool


@cache
def declared() -> dict[str, Declared]:
    """The methods that the package's files declare, by name, in the order in which tables show them."""
    found = []
    for path in [path for folder in methods.__path__ for path in sorted(Path(folder).glob("*.py"))]:
        for class_name, body in _CLASS.findall(path.read_text(encoding="utf-8")):
            name, place = _NAME.search(body), _PLACE.search(body)
            if name and place:
                found.append(Declared(int(place[1]), name[1], path.stem, class_name, not _UNUSUAL.search(body)))
    return {method.name: method for method in sorted(found)}


def method_names(*, usual: bool = False) -> list[str]:
    """The names of all methods, or of those that ``compare`` takes by default."""
    return [method.name for method in declared().values() if method.usual or not usual]


def check_names(names: Sequence[str]) -> list[str]:
    """The names, each once, ``base`` first: every other row is compared with it.

    Raises:
        UsageError: an unknown name, with the closest known one.
    """
    known = method_names()
    for name in names:
        if name not in known:
            raise UsageError(f"there is no method {name!r}", f"{did_you_mean(name, known)}methods: {', '.join(known)}")
    if not names:
        raise UsageError("no methods to compare", f"methods: {', '.join(known)}")
    return list(dict.fromkeys(["base", *names]))


def make_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, ``base`` added in front if it is missing.

    Raises:
        UsageError: an unknown name, with the closest known one.
        NestError: a method needs a package that is not installed.
    """
    chosen = [declared()[name] for name in check_names(names)]
    made = [getattr(import_module(f"{methods.__name__}.{item.module}"), item.class_name)() for item in chosen]
    for method in made:
        missing = [package for package in method.needs if find_spec(package) is None]
        if missing:
            raise NestError(f"the method {method.name} needs the {missing[0]} package", extra(missing[0]))
    return made


def read_settings(path: Path = DEFAULTS) -> Mapping[str, Any]:
    """The settings file of a sweep: ``base_hash``, ``recipe``, ``values`` by method, and how they were chosen.

    Raises:
        DataError: no such file, or not a settings file.
    """
    try:
        values = parse_json(read_text(path, MAX_SETTINGS))
        if not isinstance(values["values"], dict) or not isinstance(values["recipe"], dict):
            raise TypeError("values and recipe must be objects")
    except FileNotFoundError:
        raise DataError(
            f"no such settings file: {path}", "write one with `compare --sweep --write-settings FILE`"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path} is not a settings file: {type(error).__name__}: {error}",
            "write one with `compare --sweep --write-settings FILE`",
        ) from error
    return values
