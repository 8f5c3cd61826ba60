"""The methods by name, the lists that compare takes by default, and the sweep's choices that ship.

``defaults.json`` was written by ``compare --sweep --write-settings``: for one base, one training set and
one recipe, the chosen value of every method's knob, with the figures that chose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nest_runtime.compare.methods.base import Method
from nest_runtime.errors import DataError, UsageError
from nest_runtime.hints import did_you_mean
from nest_runtime.io import MAX_SETTINGS, parse_json, read_text

DEFAULTS = Path(__file__).with_name("defaults.json")
_CLASSES = {
    "base": "unpatched:Unpatched",
    "filter": "filter:Filter",
    "in-context": "in_context:InContext",
    "full": "full:Full",
    "lora": "lora:Lora",
    "lora-ffn": "lora:LoraFfn",
    "circuit-breaker": "circuit_breaker:CircuitBreaker",
    "random-neurons": "neurons:RandomNeurons",
    "random-loadings": "neurons:RandomLoadings",
    "nest": "neurons:Nest",
    "nest-loadings": "neurons:NestLoadings",
}
METHODS: tuple[str, ...] = tuple(_CLASSES)
_NEED_PEFT = ("lora", "lora-ffn", "circuit-breaker")


def check_names(names: Sequence[str]) -> list[str]:
    """The names, each once, ``base`` first: every other row is compared with it.

    Raises:
        UsageError: an unknown name, with the closest known one.
    """
    for name in names:
        if name not in _CLASSES:
            raise UsageError(
                f"there is no method {name!r}", f"{did_you_mean(name, METHODS)}methods: {', '.join(METHODS)}"
            )
    if not names:
        raise UsageError("no methods to compare", f"methods: {', '.join(METHODS)}")
    return list(dict.fromkeys(["base", *names]))


def make_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, ``base`` added in front where it is missing.

    Raises:
        UsageError: an unknown name, with the closest known one.
        NestError: a method needs a package that is not installed.
    """
    from importlib import import_module

    checked = check_names(names)
    if set(checked) & set(_NEED_PEFT):
        from nest_runtime.compare.methods.lora import require_peft

        require_peft()
    made = []
    for name in checked:
        module, _, attribute = _CLASSES[name].partition(":")
        made.append(getattr(import_module(f"nest_runtime.compare.methods.{module}"), attribute)())
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
