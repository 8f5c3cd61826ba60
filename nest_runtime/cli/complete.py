"""What the shell offers when Tab is pressed after an option or argument whose values have names.

Nothing here loads torch, asks the Hub or raises: a completion that fails offers nothing, and the shell falls back to
file names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from nest_runtime.escape import short
from nest_runtime.train.recipe import RECIPES

JUDGES = (
    ("reference", "the reference world's own"),
    ("local", "the small judge that is shipped"),
    ("phrases", "phrases of refusals"),
    ("hf:", "a classifier: hf:MODEL"),
    ("openai:", "a model behind an API: openai:MODEL"),
)
Names = Iterable[str | tuple[str, str]]  # a name, or a name and what it is


def offer(names: Callable[[], Names]) -> Callable[[str], list[tuple[str, str]]]:
    """An ``autocompletion`` for typer: those of ``names()`` that begin with what was typed, with what they are."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        """The names that begin with what was typed, each with its explanation."""
        try:
            pairs = [(name, "") if isinstance(name, str) else name for name in names()]
        except Exception:  # a Tab key is no place for an error
            return []
        return [(name, what) for name, what in dict(pairs).items() if name.startswith(incomplete)]

    return complete


def _patches() -> Names:
    from nest_runtime.store.store import Store

    entries = Store().list()
    yield from ((entry.version, f"{entry.key} for {entry.base_model or short(entry.base_hash)}") for entry in entries)
    yield from ((entry.key, f"for {entry.base_model or short(entry.base_hash)}") for entry in entries)


def _models() -> Names:
    yield "reference", "the built-in model"
    yield from (f"./{path.parent.name}" for path in sorted(Path().glob("*/config.json")))
    yield from (f"./{path.name}" for path in sorted(Path().glob("*.gguf")))


def _attacks() -> Names:
    from nest_runtime.evaluate.attacks import ATTACKS

    return ["all", *ATTACKS]


def _categories() -> Names:
    from nest_runtime.reference.world import CATEGORIES

    return CATEGORIES


def _pictures() -> Names:
    from nest_runtime.plots.draw import KINDS

    return KINDS.items()


def _suites() -> Names:
    from nest_runtime.reference.world import SUITES

    return ["standard", "reference", *SUITES]


def _channels() -> Names:
    from nest_runtime.hub.news import USUAL_CHANNELS

    return USUAL_CHANNELS


def _methods(incomplete: str) -> list[tuple[str, str]]:
    """The next name of a list with commas between."""
    from nest_runtime.compare.methods.registry import method_names

    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [(before + comma + name, "") for name in method_names() if name.startswith(last) and name not in taken]


patches, models, attacks = offer(_patches), offer(_models), offer(_attacks)
categories, pictures, channels = offer(_categories), offer(_pictures), offer(_channels)
suites, judges, methods = offer(_suites), offer(lambda: JUDGES), _methods
devices = offer(lambda: ("auto", "cpu", "cuda", "mps"))
dtypes = offer(lambda: ("auto", "float32", "bfloat16", "float16"))
formats = offer(lambda: ("png", "svg"))
recipes = offer(lambda: RECIPES)
swap_policies = offer(lambda: ("drain", "enforce"))
