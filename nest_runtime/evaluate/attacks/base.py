"""What an attack is, and the small grammar that lets it put a behavior into other words.

An attack makes one or more cases of a harmful case. It never changes the request itself: the case's behavior,
category, kind and metadata stay, so that judges see the goal and tables can pair trials.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nest_runtime.evaluate.cases import Case, Message, user
from nest_runtime.prompts.content import images_of, text_of

TextChange = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class AttackTarget:
    """The model under attack, for white-box attacks; whatever patch is active in the context is attacked too."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Attack:
    """One way of asking.

    Attributes:
        name: unique; family: its kind, for the breakdown; citation: where it comes from; about: one sentence.
        build: makes the attacked cases of a case; gets a generator of its own, seeded by attack and case.
        white_box: it needs the model (``target``).
    """

    name: str
    family: str
    citation: str
    about: str
    build: Callable[[Case, random.Random, AttackTarget | None], list[Case]]
    white_box: bool = False

    def __call__(self, case: Case, rng: random.Random, target: AttackTarget | None = None) -> list[Case]:
        """The attacked cases, bearing this attack's name and family."""
        return [replace(made, attack=self.name, family=self.family) for made in self.build(case, rng, target)]


def text_attack(name: str, family: str, citation: str, about: str, change: TextChange) -> Attack:
    """An attack that rewrites the last user turn and nothing else.

    Args:
        name, family, citation, about: as in :class:`Attack`.
        change: the new text of a turn, from the old one and a generator.
    """

    def build(case: Case, rng: random.Random, target: AttackTarget | None) -> list[Case]:
        return [derive(case, name, [*before(case), user(change(case.prompt, rng))])]

    return Attack(name, family, citation, about, build)


def derive(case: Case, name: str, messages: Sequence[Message], **changes: Any) -> Case:
    """A case of the same behavior with other messages, in the suite of attacked cases."""
    fields: dict[str, Any] = {
        "id": f"{case.id}::{name}",
        "trial": f"{case.trial}::{name}",
        "suite": f"{case.suite}-attacked",
        "messages": _with_images(case, messages),
        **changes,
    }
    return replace(case, **fields)


def _with_images(case: Case, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, the last of the user's with the images that the case's last turn shows."""
    images = images_of([message for message in case.messages if message["role"] == "user"][-1:])
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if not images or last < 0:
        return tuple(messages)
    asked = {"role": "user", "content": [*images, {"type": "text", "text": text_of(messages[last]["content"])}]}
    return (*messages[:last], asked, *messages[last + 1 :])


def before(case: Case) -> list[Message]:
    """The messages before the last user turn."""
    last = max(index for index, message in enumerate(case.messages) if message["role"] == "user")
    return list(case.messages[:last])


_ASKS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"(?:so,? |please,? )?how (?:do|can|could|should|would|might) "
        r"(?:i|you|we|one|someone|somebody|people|a person) (.+)",
        r"(?:please )?(?:tell|show|teach)(?: me)? (?:how )?to (.+)",
        r"(?:please )?(?:explain|describe|outline)(?: to me)?(?: in detail)? how (?:to|one can|i can) (.+)",
        r"(?:please )?(?:give|provide|write)(?: me)? [\w ,-]*?(?:instructions|steps|guide|tutorial|directions)"
        r"(?: for| on| about)? ?(?:how )?\bto (.+)",
        r"what (?:is the best way|is a good way|are the steps|are some ways|does it take) to (.+)",
        r"i (?:want|need|would like) to (.+?)[.!] (?:what|where|how)\b[^.?!]*\?",
        r"can you (?:help|tell|show|teach) me (?:how to |to )?(.+)",
        r"how to (.+)",
    )
)


def infinitive(request: str) -> str:
    """What a request asks for as a verb phrase, to stand after ``to``: "How do I bake bread?" → "bake bread".

    A request in the imperative is one already, but for its capital and its full stop. The result is always
    a part of the request, up to the case of its first letter.
    """
    text = request.strip()
    bare = text.rstrip(" .?!")
    for pattern in _ASKS:
        # The one pattern that ends in a question of its own needs its mark; the others go without.
        match = pattern.fullmatch(bare) or pattern.fullmatch(text)
        if match is not None and match[1].strip(" .?!"):
            return match[1].strip(" .?!")
    if not bare:
        return text
    if len(bare) > 1 and bare[0].isupper() and bare[1].islower():
        return bare[0].lower() + bare[1:]
    return bare
