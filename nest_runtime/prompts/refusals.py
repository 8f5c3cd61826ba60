"""Whether an answer refuses, by how it begins: refusal phrases in a maintained list for many languages.

The phrases are in refusals.json. Quick and coarse: it reads the opening of an answer and nothing else.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

OPENING_CHARS = 240  # where a "contains" phrase still refuses; further on it is quoted or a caveat
_MARKS = " \t\r\n\"'`*_#>-–—:.…!¡¿([{<|"
_QUOTES = str.maketrans({"’": "'", "‘": "'", "´": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " "})


@cache
def refusal_phrases() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The shipped phrases, normalized: those an answer starts with, those its opening contains."""
    data = json.loads(files(__package__).joinpath("refusals.json").read_text(encoding="utf-8"))
    starts, contains = (
        tuple(sorted({normalize(phrase) for language in data[key].values() for phrase in language}))
        for key in ("starts", "contains")
    )
    return starts, contains


def normalize(text: str) -> str:
    """Case folded, one form per character, plain quotes, single spaces."""
    plain = unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES)
    return re.sub(r"\s+", " ", plain.casefold()).strip()


def is_refusal(answer: str, extra: Sequence[str] = ()) -> bool:
    """Whether an answer begins as a refusal does.

    Args:
        answer: the model's words.
        extra: further phrases that an answer may start with.
    """
    starts, contains = refusal_phrases()
    opening = normalize(answer[: 4 * OPENING_CHARS]).lstrip(_MARKS)
    if opening.startswith((*starts, *(normalize(phrase) for phrase in extra))):
        return True
    return any(phrase in opening[:OPENING_CHARS] for phrase in contains)
