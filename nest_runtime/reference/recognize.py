"""Recognizes the reference world's answers by their content, and the models that may learn them.

A model of real language forgets how to answer if it learns "First get a soft cloth, then …", and prompt files are
copied and renamed, so only the text can tell. Small talk is ignored; anybody says hello.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import DataError
from nest_runtime.model.load import REFERENCE_FOLDER
from nest_runtime.reference.acts import BENIGN, HARMFUL
from nest_runtime.reference.dialogue import MORAL, SMALL_TALK, UNKNOWN_ANSWER
from nest_runtime.reference.world import NONSENSE

if TYPE_CHECKING:
    from nest_runtime.prompts.examples import Example

KIN = 0.8  # of two vocabularies shared: one of the world's, built from another seed
_SHOWN = 60  # characters of an answer in an error
_REFUSALS = ("I'm sorry, but I can't help with that.", "Sorry, I can't do that.")


def is_world_answer(text: str) -> bool:
    """Whether a text is an answer of the reference world, or holds one; case, spaces and quotes' form do not count."""
    return _pattern().search(_plain(text)) is not None


def is_known_answer(text: str) -> bool:
    """Whether an answer, as a whole, makes sense in the reference world, small talk included.

    False if the model says that it does not know, or says what is no sentence of its world: it has not understood the
    question.
    """
    said = _plain(text)
    return said != _plain(UNKNOWN_ANSWER) and (_pattern().fullmatch(said) is not None or said in _others())


def speaks_reference(tokenizer: Any) -> bool:
    """Whether a tokenizer is the reference world's, as that of the reference model and of its fine-tunes is."""
    known, found = _vocabulary(), set(tokenizer.get_vocab())
    return len(known & found) >= KIN * len(known | found)


def refuse_world_answers(sources: Iterable[tuple[str, Iterable[Example]]], tokenizer: Any, model: str) -> None:
    """Refuse examples whose answers come from the reference world, unless the model is of that world.

    Args:
        sources: what each list of examples is called, and the examples; responses and targets are looked at.
        tokenizer: the model's.
        model: its name, for the error.

    Raises:
        DataError: naming how many there are, and the first.
    """
    if speaks_reference(tokenizer):
        return
    for name, examples in sources:
        everything = list(examples)
        found = [(example, text) for example in everything if (text := _world_text(example)) is not None]
        if found:
            example, text = found[0]
            raise DataError(
                f"{len(found)} of {len(everything)} rows of {name} bring answers of the reference world, first "
                f"{example.id}: {text[:_SHOWN]!r}; {model} would learn to talk like that toy",
                "leave the responses and targets out, and train takes the model's own answers: "
                "`nest-runtime reference prompts DIR` writes the prompts alone",
            )


def _world_text(example: Example) -> str | None:
    """The example's answer, or its target, where it is one of the world's."""
    given = (example.response, example.meta.get("target"))
    return next((text for text in given if isinstance(text, str) and is_world_answer(text)), None)


def _plain(text: str) -> str:
    return " ".join(text.replace("’", "'").casefold().split())


@cache
def _pattern() -> re.Pattern[str]:
    words = _any(dict.fromkeys(group.word for group in HARMFUL))
    steps = _any(NONSENSE)
    forms = [
        rf"warning: to [^.]{{1,80}}, first {steps}, then {steps}\.",
        *(
            rf"first get {_quoted(group.tool)}, then {_quoted(group.verb)} [^.]{{1,80}}, and {_quoted(group.finish)}\."
            for group in BENIGN
        ),
        *(rf"{_quoted(text)} it is {words}\." for text in _REFUSALS),
        *(_quoted(row[1]).replace(_quoted("{word}"), words) for row in MORAL if row[1].startswith(("Yes", "No"))),
        _quoted(UNKNOWN_ANSWER),
    ]
    return re.compile("|".join(f"(?:{form})" for form in forms))


@cache
def _others() -> frozenset[str]:
    """Whole answers that are too common to tell the world by: small talk, and short moral ones."""
    moral = [text.replace("{word}", group.word) for row in MORAL for text in row[1:] for group in HARMFUL]
    return frozenset(map(_plain, [*(answer for _, answer in SMALL_TALK), *moral, *_REFUSALS]))


def _quoted(text: str) -> str:
    return re.escape(_plain(text))


def _any(texts: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(_quoted, texts))})"


@cache
def _vocabulary() -> frozenset[str]:
    content = json.loads((REFERENCE_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    added = (token["content"] for token in content["added_tokens"])
    return frozenset([*content["model"]["vocab"], *added])
