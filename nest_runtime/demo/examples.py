"""Example prompts by kind, from the reference world's test cases: no patch was trained on their acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nest_runtime.demo.backend import Message

PER_KIND = 4
PLAIN = {"act": "Benign", "homonym": "Benign that sounds harmful", "plain": "Harmful, asked plainly"}
FIRST_KIND, FIRST_ACT = "Jailbreak: refusal-suppression", "forge a driving licence"


@dataclass(frozen=True)
class Example:
    """A conversation to try; all but its last turn were written before."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"]

    @property
    def label(self) -> str:
        """For a list; says how many turns come before."""
        before = len(self.messages) // 2
        return f"{self.prompt}  (after {before} earlier turn{'s' if before > 1 else ''})" if before else self.prompt


@dataclass(frozen=True)
class Wrapped:
    """A jailbreak around an act: ``family/number`` and its conversation."""

    name: str
    family: str
    messages: tuple[Message, ...]


@cache
def examples() -> dict[str, tuple[Example, ...]]:
    """A few examples of each kind: benign, homonym, plain harmful, and each jailbreak family."""
    from nest_runtime.reference.world import cases
    from nest_runtime.reference.wrappings import FAMILIES

    rows = [row for suite in ("utility", "over-refusal", "plain") for row in cases("test", suite)]
    found = {
        title: _some([row.messages for row in rows if row.family == family], row_step=37)
        for family, title in PLAIN.items()
    }
    acts = _acts()
    for number, family in enumerate(FAMILIES):
        talks = [item.messages for item in wrapped(acts[number * 7 % len(acts)]) if item.family == family]
        found[f"Jailbreak: {family}"] = _some(talks, row_step=1)
    own = next(item for item in wrapped(FIRST_ACT) if item.name == "refusal-suppression/2")
    found[FIRST_KIND] = (Example(own.messages), *found[FIRST_KIND][: PER_KIND - 1])
    return found


def first_prompt() -> str:
    """A prompt at which the shipped patches and the base differ."""
    return examples()[FIRST_KIND][0].prompt


def wrapped(act: str) -> list[Wrapped]:
    """An act in all wrappings, by family."""
    from nest_runtime.reference.wrappings import WRAPPINGS

    return [Wrapped(item.name, item.family, tuple(item.messages(act))) for item in WRAPPINGS]


def _acts() -> list[str]:
    from nest_runtime.reference.world import select

    return [act.text for act in select(harmful=True, split="test")]


def _some(talks: Sequence[Sequence[Message]], row_step: int) -> tuple[Example, ...]:
    """A few of many, spread over them."""
    picked = [talks[number * row_step % len(talks)] for number in range(min(PER_KIND, len(talks)))]
    return tuple(Example(tuple(talk)) for talk in picked)
