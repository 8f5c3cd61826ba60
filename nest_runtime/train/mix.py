"""Which examples training sees: prompts as given and in everyday framings, held-out ones apart.

The split comes first, by prompt: no framing of a held-out prompt is trained on. Both classes get framings by the same
rule, so that a framing says nothing about the class. Nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from nest_runtime.errors import DataError
from nest_runtime.prompts.examples import Example, render
from nest_runtime.prompts.framings import HELD_OUT_FRAMINGS, chosen, in_code, moved_on
from nest_runtime.train.recipe import Recipe

T = TypeVar("T")
MOVED_ON = 12  # one prompt in so many also comes up early in a conversation that has gone on to something harmless


@dataclass(frozen=True)
class Mix:
    """One class's examples: those to train on, those held out to validate with, and plain ones to locate with."""

    train: tuple[Example, ...]
    held: tuple[Example, ...]
    located: tuple[Example, ...] = ()


def harmful_mix(tokenizer: Any, examples: Sequence[Example], settings: Recipe) -> Mix:
    """Harmful examples plain and framed; held-out ones plain, and in framings that training never uses."""
    train, held = hold_out(examples, settings, 1)
    framed = _framed(tokenizer, train, settings)
    asked = (
        [_in(example, HELD_OUT_FRAMINGS, number) for number, example in enumerate(held)] if settings.framings else []
    )
    return Mix((*train, *framed), (*held, *asked), _some(train, settings))


def benign_mix(tokenizer: Any, examples: Sequence[Example], settings: Recipe, harmful: Sequence[Example] = ()) -> Mix:
    """Benign examples plain and framed; no more than the steps will see if the base has to answer them.

    Args:
        tokenizer: the model's.
        examples: the benign ones.
        settings: the recipe.
        harmful: those that are trained on; a harmless question after one of them is answered.
    """
    train, held = hold_out(examples, settings, 0)
    mixed = [*train, *_framed(tokenizer, train, settings)]
    if settings.framings or settings.code_framings:
        mixed += [_left_behind(example, settings) for example in [*train, *harmful][::MOVED_ON] if _is_bare(example)]
        seen = max(round(settings.steps * settings.batch_size * (1 - settings.harmful_share)), 1)
        mixed = shuffled(mixed, settings.seed, 3)[:seen]
    return Mix(tuple(mixed), tuple(held), _some(train, settings))


def hold_out(items: Sequence[T], settings: Recipe, kind: int) -> tuple[list[T], list[T]]:
    """Split one class into training and validation by seed; at least one item stays for training."""
    most = settings.validation_most or len(items)
    count = min(round(settings.validation_fraction * len(items)), len(items) - 1, most)
    order = np.random.default_rng([settings.seed, 17, kind]).permutation(len(items))
    held = set(order[:count].tolist())
    return (
        [item for index, item in enumerate(items) if index not in held],
        [item for index, item in enumerate(items) if index in held],
    )


def shuffled(items: Sequence[T], seed: int, purpose: int) -> list[T]:
    """The items in an order drawn from the seed."""
    order = np.random.default_rng([seed, 23, purpose]).permutation(len(items))
    return [items[index] for index in order]


def _left_behind(example: Example, settings: Recipe) -> Example:
    """A conversation in which the example's prompt came up earlier; its last turn is harmless."""
    messages = tuple(dict(message) for message in moved_on(example.prompt, settings.seed))
    return Example(messages, None, f"{example.id}::moved on", example.category)


def _is_bare(example: Example) -> bool:
    """Whether an example is one text turn, which can be put into other words."""
    return len(example.messages) == 1 and isinstance(example.messages[0]["content"], str)


def _some(examples: Sequence[Example], settings: Recipe) -> tuple[Example, ...]:
    """The examples to locate with: all, or ``locate_prompts`` of them drawn by seed."""
    most = settings.locate_prompts
    if not most or len(examples) <= most:
        return tuple(examples)
    return tuple(shuffled(examples, settings.seed, 5)[:most])


def _framed(tokenizer: Any, examples: Sequence[Example], settings: Recipe) -> list[Example]:
    """Framed copies of the examples that are one bare question without an answer of their own."""
    if not settings.framings and not settings.code_framings:
        return []
    system = _takes_system(tokenizer)
    found = []
    for example in examples:
        if not _is_bare(example):
            continue
        if example.response and "target" not in example.meta:
            continue  # an answer to the bare question need not fit the framed one
        framings = chosen(example.prompt, settings.framings, settings.seed, system=system)
        for framing in [*framings, *in_code(example.prompt, settings.code_framings, settings.seed)]:
            messages = tuple(dict(message) for message in framing.render(example.prompt))
            if sum(len(message["content"]) for message in messages) <= settings.framed_characters:
                found.append(replace(example, messages=messages, id=f"{example.id}::{framing.name}"))
    return found


def _in(example: Example, framings: Sequence[Any], number: int) -> Example:
    framing = framings[number % len(framings)]
    return replace(example, messages=tuple(framing.render(example.prompt)), id=f"{example.id}::{framing.name}")


def _takes_system(tokenizer: Any) -> bool:
    """Whether the chat template knows system messages; without a template nothing is lost by them."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    try:
        return "Be brief." in render(tokenizer, messages)
    except DataError:
        return False
