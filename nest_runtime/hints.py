"""Names that look alike: what somebody who mistyped one may have meant. Nothing here knows what the names are of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.5  # of difflib's ratio: two transposed letters pass, another word does not


def alike(wanted: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to ``limit`` of ``names`` that look like ``wanted``, the most alike first; case does not count."""
    by_small = {name.casefold(): name for name in reversed(list(names))}  # of two that differ by case the first stays
    near = difflib.get_close_matches(wanted.casefold(), list(reversed(by_small)), n=limit, cutoff=ALIKE)
    return [by_small[name] for name in near]


def closest(wanted: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to ``limit`` of ``names``, the most alike first; where none is alike, the first ones."""
    known = list(dict.fromkeys(names))
    return alike(wanted, known, limit) or known[:limit]


def did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """The beginning of a hint, ``did you mean 'prefix-injection'? ``, or nothing where no name is alike."""
    near = alike(wanted, names, limit=1)
    return f"did you mean {near[0]!r}? " if near else ""
