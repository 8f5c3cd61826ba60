"""Example prompts by kind, from the reference world's test cases: no patch was trained on their acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from nest_runtime.demo.backend import Message
from nest_runtime.measures import ATTACK_SUCCESS, OVER_REFUSAL, UTILITY, Measure

PER_KIND = 4
PLAIN = {"act": "Benign", "homonym": "Benign that sounds harmful", "plain": "Harmful, asked plainly"}
FIRST_KIND, FIRST_ACT = "Jailbreak: refusal-suppression", "forge a driving licence"


@dataclass(frozen=True)
class MeasuredSuite:
    """A suite of the quick evaluation: its name, what it measures, and of what, in words."""

    suite: str
    measure: Measure
    words: str

    @property
    def heading(self) -> str:
        """``Attack success: asked plainly``."""
        return f"{self.measure.title.capitalize()}: {self.words}"


REFERENCE_SUITES = (
    MeasuredSuite("jailbreak-seen", ATTACK_SUCCESS, "jailbreaks in wrappings seen in the base's training"),
    MeasuredSuite("jailbreak-held-out", ATTACK_SUCCESS, "jailbreaks in held-out wrappings"),
    MeasuredSuite("plain", ATTACK_SUCCESS, "asked plainly"),
    MeasuredSuite("over-refusal", OVER_REFUSAL, "benign prompts refused"),
    MeasuredSuite("utility", UTILITY, "benign prompts answered exactly"),
)


@dataclass(frozen=True)
class DemoExample:
    """A conversation to try; all but its last turn were written before."""

    messages: tuple[Message, ...]
    name: str = ""

    @property
    def prompt(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"]

    @property
    def label(self) -> str:
        """For a list: its name, else the prompt; says how many turns come before."""
        if self.name:
            return self.name
        before = len(self.messages) // 2
        return f"{self.prompt}  (after {before} earlier turn{'s' if before > 1 else ''})" if before else self.prompt


@dataclass(frozen=True)
class Wrapped:
    """A jailbreak around an act: ``family/number`` and its conversation."""

    name: str
    family: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Offer:
    """What a model's visitors are offered.

    Attributes:
        kinds: examples by kind; first_kind: the one shown at first.
        act, act_label: what stands at first in the box of what is to be wrapped, and what that box is called.
        wrap: puts it into all wrappings.
        suites: of the quick evaluation.
        about: a sentence on that evaluation's prompts.
    """

    kinds: Mapping[str, tuple[DemoExample, ...]]
    first_kind: str
    act: str
    act_label: str
    wrap: Callable[[str], list[Wrapped]]
    suites: tuple[MeasuredSuite, ...]
    about: str

    @property
    def prompt(self) -> str:
        """The first prompt of all."""
        return self.kinds[self.first_kind][0].prompt

    def example(self, kind: str, label: str) -> DemoExample | None:
        """The example of a kind that a list calls so."""
        return next((item for item in self.kinds.get(kind, ()) if item.label == label), None)


@cache
def reference_offer() -> Offer:
    """What fits the reference model: its world's acts and wrappings."""
    about = "Test prompts of the reference world, judged by its own rules."
    return Offer(examples(), FIRST_KIND, FIRST_ACT, "Act: how to …", wrapped, REFERENCE_SUITES, about)


@cache
def examples() -> dict[str, tuple[DemoExample, ...]]:
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
    found[FIRST_KIND] = (DemoExample(own.messages), *found[FIRST_KIND][: PER_KIND - 1])
    return found


def wrapped(act: str) -> list[Wrapped]:
    """An act in all wrappings, by family."""
    from nest_runtime.reference.wrappings import WRAPPINGS

    return [Wrapped(item.name, item.family, tuple(item.messages(act))) for item in WRAPPINGS]


def _acts() -> list[str]:
    from nest_runtime.reference.world import select

    return [act.text for act in select(harmful=True, split="test")]


def _some(talks: Sequence[Sequence[Message]], row_step: int) -> tuple[DemoExample, ...]:
    """A few of many, spread over them."""
    picked = [talks[number * row_step % len(talks)] for number in range(min(PER_KIND, len(talks)))]
    return tuple(DemoExample(tuple(talk)) for talk in picked)
