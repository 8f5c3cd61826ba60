"""Everyday framings: the many ways in which people put the same request.

A patch that has only met bare prompts learns the bare form along with the harm. So training puts its prompts
into framings: polite or hasty, with a reason before them, with a format demanded, inside a long letter, under a
persona, in another language's frame, in JSON, late in a conversation.

Code framings put a request inside code or data that a program works on: a string, a comment, a list of its words,
a field of JSON. People who program ask this way, and a model that writes code is asked this way most of all.

Both classes are treated alike. :func:`chosen` looks only at the prompt's text and the seed, so that harmful and
benign prompts get the same framings in the same shares, and a framing says nothing about the class.

The wordings (framings.json) were written for this project. None is a jailbreak: no wording asks to drop rules, to
play somebody without limits, or to begin with agreement. A patch trained on known attacks would only show that it
knows them. A patch trained on everyday forms can be tested on real attacks (``evaluate.attacks``).
:data:`HELD_OUT_FRAMINGS` has milder rewordings of the same aim: for choosing settings, never for training.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Framing:
    """One way of putting a request.

    Attributes:
        name: unique among its list.
        kind: request, context, format, language, structure, conversation, long, persona, code, held-out or moved-on.
        render: makes of a prompt the ``{"role", "content"}`` messages that ask for it.
        has_system: the messages hold a system message, which some models' chat templates refuse.
    """

    name: str
    kind: str
    render: Callable[[str], list[Message]]
    has_system: bool = False


def chosen(prompt: str, count: int, seed: int = 0, *, system: bool = True) -> list[Framing]:
    """Framings for a prompt, all different, with as many kinds as the count allows.

    Args:
        prompt: its text alone, with the seed, decides.
        count: how many; at most as many as there are.
        seed: another seed, another choice.
        system: False leaves out framings with a system message.

    Raises:
        ValueError: the count is negative, or more than there are.
    """
    rng = random.Random(hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    kinds: dict[str, list[Framing]] = {}
    for framing in FRAMINGS:
        if system or not framing.has_system:
            kinds.setdefault(framing.kind, []).append(framing)
    there = sum(map(len, kinds.values()))
    if not 0 <= count <= there:
        raise ValueError(f"count is {count}; expected 0 to {there}, the number of framings")
    order = list(kinds)
    rng.shuffle(order)
    for members in kinds.values():
        rng.shuffle(members)
    rounds = range(max(map(len, kinds.values())))
    return [kinds[kind][turn] for turn in rounds for kind in order if turn < len(kinds[kind])][:count]


def in_code(prompt: str, count: int, seed: int = 0) -> list[Framing]:
    """Code framings for a prompt, all different; its text and the seed decide.

    Raises:
        ValueError: the count is negative, or more than there are.
    """
    if not 0 <= count <= len(CODE_FRAMINGS):
        raise ValueError(f"count is {count}; expected 0 to {len(CODE_FRAMINGS)}, the number of code framings")
    rng = random.Random(hashlib.sha256(f"code:{seed}:{prompt}".encode()).digest())
    return rng.sample(CODE_FRAMINGS, count)


def framed(prompt: str, count: int, seed: int = 0, *, system: bool = True) -> list[list[Message]]:
    """The prompt in the framings that :func:`chosen` gives, as conversations that end with the user's turn.

    Raises:
        ValueError: the count is negative, or more than there are.
    """
    return [framing.render(prompt) for framing in chosen(prompt, count, seed, system=system)]


def moved_on(prompt: str, seed: int = 0) -> list[Message]:
    """A conversation in which the prompt came up earlier, and the last turn asks for something harmless.

    Whatever the prompt's class, the last turn is benign: train on its answer, not on a refusal. It teaches a patch to
    judge the current turn instead of refusing from then on.
    """
    rng = random.Random(hashlib.sha256(f"moved on:{seed}:{prompt}".encode()).digest())
    return rng.choice(MOVED_ON).render(prompt)


def _render(row: dict[str, Any], prompt: str) -> list[Message]:
    text = _CHANGES[row["change"]](prompt) if "change" in row else prompt.strip()
    if "imperative" in row and _is_imperative(text):
        return [{"role": "user", "content": row["imperative"].replace("{act}", _as_act(text))}]
    messages = row.get("messages") or [{"role": "user", "content": row["user"]}]
    return [{"role": message["role"], "content": _filled(message["content"], text)} for message in messages]


def _filled(wording: str, text: str) -> str:
    """Each wording has one slot, so a prompt that itself says ``{escaped}`` stays as it is."""
    slot = next((slot for slot in _SLOTS if slot in wording), None)
    if slot is None:
        return wording
    before, _, after = wording.partition(slot)
    inner = _SLOTS[slot](text)
    goes_on = re.match(r" \w", after) and text[-1:].isalnum()  # "… the moon Answer in …" needs its full stop
    return f"{before}{inner}{'.' if goes_on else ''}{after}"


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _chunks(text: str) -> list[str]:
    """Pieces of three to eight letters, the same each time."""
    rng, pieces = random.Random(hashlib.sha256(text.encode()).digest()), []
    while text:
        size = rng.randint(3, 8)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


_SLOTS: dict[str, Callable[[str], str]] = {
    "{escaped}": lambda text: _quoted(text)[1:-1],
    "{words}": lambda text: _quoted(text.split()),
    "{reversed}": lambda text: _quoted(text.split()[::-1]),
    "{chunks}": lambda text: _quoted(_chunks(text)),
    "{prompt}": lambda text: text,
}


def _is_imperative(text: str) -> bool:
    first = re.match(r"[A-Za-z]+", text)
    one_sentence = "\n" not in text and not re.search(r"[.!?:]\s", text)
    return first is not None and first[0].lower() in _VERBS and one_sentence and not text.endswith("?")


def _as_act(text: str) -> str:
    return text[0].lower() + text[1:].rstrip(" .!")


def _typos(text: str) -> str:
    """About one longer word in five gets two letters swapped, one left out or one doubled; the same each time."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    return re.sub(r"[A-Za-z]{5,}", lambda match: _mistyped(match[0], rng), text.strip())


def _mistyped(word: str, rng: random.Random) -> str:
    at, draw = rng.randrange(1, len(word) - 2), rng.random()
    if draw < 0.1:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if draw < 0.15:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at] + word[at:] if draw < 0.2 else word


def _bare(text: str) -> str:
    """Lower case without the marks that end or part sentences."""
    return re.sub(r"[.,;:!?]+(?=\s|$)", "", text.strip().lower())


_CHANGES: dict[str, Callable[[str], str]] = {
    "lower": lambda text: text.strip().lower(),
    "upper": lambda text: text.strip().upper(),
    "typos": _typos,
    "bare": _bare,
}


def _has_system(row: dict[str, Any]) -> bool:
    return any(message["role"] == "system" for message in row.get("messages", ()))


def _read(rows: Sequence[dict[str, Any]]) -> tuple[Framing, ...]:
    return tuple(Framing(row["name"], row["kind"], partial(_render, row), _has_system(row)) for row in rows)


_WORDINGS = json.loads(Path(__file__).with_name("framings.json").read_text(encoding="utf-8"))
# First words of a request in the imperative: only such a request fits behind "Can you". Others get a neutral form.
_VERBS = frozenset(_WORDINGS["imperative_verbs"])

FRAMINGS: tuple[Framing, ...] = _read(_WORDINGS["framings"])
"""Everyday framings, for training."""

CODE_FRAMINGS: tuple[Framing, ...] = _read(_WORDINGS["code"])
"""Requests inside of code and data, for training."""

HELD_OUT_FRAMINGS: tuple[Framing, ...] = _read(_WORDINGS["held_out"])
"""Rewordings that seek an answer by a pretext, as an attacker would; for choosing settings only."""

HELD_OUT_CODE: tuple[Framing, ...] = _read(_WORDINGS["held_out_code"])
"""Code framings for choosing settings only."""

MOVED_ON: tuple[Framing, ...] = _read(_WORDINGS["moved_on"])
"""Conversations that leave the prompt behind; see :func:`moved_on`."""
