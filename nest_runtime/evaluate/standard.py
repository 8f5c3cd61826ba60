"""The standard suite: the short form of the whole measurement, drawn by seed from public prompt sets.

A hundred goals plainly and under eight kinds of attack, three sets of harmless requests that look harmful, and
questions of utility (utility.py asks them). What is in which file is public.py's business; nothing here runs a model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.attacks import ATTACKS
from nest_runtime.evaluate.cases import Case, user
from nest_runtime.evaluate.public import SETS, PublicData, behind, drawn
from nest_runtime.evaluate.utility import Questions, Solved
from nest_runtime.hints import did_you_mean

NAME = "standard"
N = 100
# The other built-in attacks take one answer each: no search, no turns of the model's own, no long demonstrations.
NOT_SINGLE = ("direct", "many-shot", "crescendo", "best-of-n", "prefill")
UTILITY = ("mmlu", "gsm8k", "alpaca")


@dataclass(frozen=True)
class SuiteSource:
    """Where a suite's cases come from.

    Attributes:
        source: the sets, with their papers; licence: theirs.
        n: cases drawn; available: how many there were to draw from.
    """

    source: str
    licence: str
    n: int
    available: int

    def to_json(self) -> dict[str, str | int]:
        """All of it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Standard:
    """What the standard suite asks: cases, questions of utility (or None), and where each comes from, by suite."""

    cases: tuple[Case, ...]
    questions: Questions | None
    sources: dict[str, SuiteSource]


def load_standard(
    names: Iterable[str] = (), *, data: str | Path | None = None, n: int | None = None, seed: int = 0
) -> Standard:
    """The standard suite, or some of it.

    Args:
        names: suites of it (:data:`SUITES` and :data:`UTILITY`); all of them if none is named.
        data: the folder of public sets; by default the one that $NEST_TEST_DATA names.
        n: cases of each suite; 100.
        seed: of every draw.

    Raises:
        UsageError: no folder, or no such suite. DataError: files are missing, or cannot be read: all before any work.
    """
    chosen = list(dict.fromkeys(names)) or [*SUITES, *UTILITY]
    for name in chosen:
        if name not in SUITES and name not in UTILITY:
            raise UsageError(
                f"the standard suite has no part {name!r}",
                did_you_mean(name, (*SUITES, *UTILITY)) + f"use {', '.join((*SUITES, *UTILITY))}",
            )
    public = PublicData.at(data)
    public.check(key for name in chosen for key in (SUITES[name].sets if name in SUITES else (name,)))
    draw = _Draw(public, n or N, seed)
    cases: list[Case] = []
    sources: dict[str, SuiteSource] = {}
    for name in (name for name in SUITES if name in chosen):
        suite = SUITES[name]
        made, available = suite.make(draw, name)
        cases += made
        sources[name] = SuiteSource(*_origin(suite.sets), len(made), available)
    asked = [name for name in UTILITY if name in chosen]
    questions, counts = _questions(draw, asked) if asked else (None, {})
    for name in asked:
        sources[name] = SuiteSource(*_origin((name,)), *counts[name])
    return Standard(tuple(cases), questions, sources)


def split_standard(suites: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """What ``--suite`` names, in two: other suites, and parts of the standard one (none of them: all; None: not asked).

    Raises:
        UsageError: ``standard:`` without a name behind it.
    """
    own = [name for name in suites if name != NAME and not name.startswith(f"{NAME}:")]
    if len(own) == len(suites):
        return own, None
    parts: list[str] = []
    for name in suites:
        if name == NAME:
            return own, []
        if name.startswith(f"{NAME}:"):
            parts += [part.strip() for part in name.removeprefix(f"{NAME}:").split(",")]
    if not all(parts):
        raise UsageError(f"{NAME}: without a suite's name", f"name suites with commas between: {NAME}:plain,wild")
    return own, parts


@dataclass(frozen=True)
class _Draw:
    """The sets, and how much of them is drawn."""

    data: PublicData
    n: int
    seed: int

    def some(self, items: Sequence[str], purpose: str) -> list[str]:
        return drawn(items, self.n, purpose, self.seed)

    def plain(self) -> tuple[list[str], int]:
        """What is asked for, and out of how many: JailbreakBench's goals and HarmBench's behaviors."""
        goals = [*drawn(self.data.jailbreakbench("harmful"), 100, "jbb", self.seed), *self.data.harmbench()]
        return self.some(goals, "plain"), len(goals)

    def goals(self) -> tuple[list[str], int]:
        """The same in another order: what the attacks of this package and of the wild ask for."""
        plain, available = self.plain()
        return self.some(plain, "goals"), available


Made = tuple[list[Case], int]  # a suite's cases, and how many there were to draw from


@dataclass(frozen=True)
class Suite:
    """A part of the standard suite: how it is made, from which sets, and whether it attacks."""

    make: Callable[[_Draw, str], Made]
    sets: tuple[str, ...]
    attacks: bool = False


def _plain(draw: _Draw, suite: str) -> Made:
    goals, available = draw.plain()
    return harmful(suite, [(goal, goal) for goal in goals], "direct"), available


def _wild(draw: _Draw, suite: str) -> Made:
    goals, available = draw.goals()
    wild = draw.data.wild("test")
    if draw.seed:
        random.Random(f"{draw.seed}/wild").shuffle(wild)
    return harmful(suite, behind(wild, goals, draw.n), "wild"), available


def _questions_of(family: str) -> Callable[[_Draw, str], Made]:
    """A set whose questions are attacks already."""

    def make(draw: _Draw, suite: str) -> Made:
        found = draw.data.column(suite, "question")
        return harmful(suite, [(q, q) for q in draw.some(found, suite)], family), len(found)

    return make


def _attacked(*names: str) -> Callable[[_Draw, str], Made]:
    """The goals under attacks of this package, each goal under the next one."""

    def make(draw: _Draw, suite: str) -> Made:
        """Draw goals, and give each to one of the attacks in turn."""
        goals, available = draw.goals()
        cases = harmful(suite, [(goal, goal) for goal in goals], "direct")
        made = []
        for number, case in enumerate(cases):
            attack = ATTACKS[names[number % len(names)]]
            # Each attack on each case draws from a generator of its own, as in attacks.apply_attacks.
            made += attack(case, random.Random(f"{draw.seed}/{attack.name}/{case.id}"))
        return [replace(case, suite=suite) for case in made], available

    return make


def _benign(read: Callable[[PublicData], list[str]], purpose: str) -> Callable[[_Draw, str], Made]:
    def make(draw: _Draw, suite: str) -> Made:
        found = read(draw.data)
        return benign(suite, draw.some(found, purpose)), len(found)

    return make


GOALS = ("jailbreakbench", "harmbench")
SUITES: dict[str, Suite] = {
    "plain": Suite(_plain, GOALS),
    "wild": Suite(_wild, ("wild", *GOALS), attacks=True),
    "jailbreakchat": Suite(_questions_of("framing"), ("jailbreakchat",), attacks=True),
    "selfcipher": Suite(_questions_of("encoding"), ("selfcipher",), attacks=True),
    "codeattack": Suite(_questions_of("code"), ("codeattack",), attacks=True),
    "completion": Suite(_questions_of("completion"), ("completion",), attacks=True),
    "built-in": Suite(
        _attacked(*(name for name, attack in ATTACKS.items() if name not in NOT_SINGLE and not attack.white_box)),
        GOALS,
        attacks=True,
    ),
    "prefill": Suite(_attacked("prefill"), GOALS, attacks=True),
    "multi-turn": Suite(_attacked("crescendo"), GOALS, attacks=True),
    "xstest-safe": Suite(_benign(PublicData.xstest_safe, "xstest"), ("xstest",)),
    "jailbreakbench-benign": Suite(_benign(lambda d: d.jailbreakbench("benign"), "jbb benign"), ("jailbreakbench",)),
    "coconot-contrast": Suite(_benign(lambda d: d.column("coconot", "prompt"), "coconot"), ("coconot",)),
}
ATTACKED = tuple(name for name, suite in SUITES.items() if suite.attacks)


def harmful(suite: str, prompts: Sequence[tuple[str, str]], family: str) -> list[Case]:
    """Cases of (what is typed, what is wanted); those that are attacks already are called after their suite."""
    attack = "direct" if family == "direct" else suite
    return [
        Case(f"{suite}/{number}", (user(text),), "harmful", suite, family=family, attack=attack, behavior=goal)
        for number, (text, goal) in enumerate(prompts)
    ]


def benign(suite: str, prompts: Sequence[str]) -> list[Case]:
    """Cases that a good model answers."""
    return [Case(f"{suite}/{number}", (user(text),), "benign", suite) for number, text in enumerate(prompts)]


def _questions(draw: _Draw, names: Sequence[str]) -> tuple[Questions, dict[str, tuple[int, int]]]:
    """The questions of utility, and of each kind how many of how many."""
    mmlu = draw.data.fields("mmlu", "question", "answer") if "mmlu" in names else []
    gsm8k = draw.data.fields("gsm8k", "question", "answer") if "gsm8k" in names else []
    alpaca = draw.data.column("alpaca", "prompt") if "alpaca" in names else []
    questions = Questions(
        tuple(Solved(*row) for row in drawn(mmlu, draw.n, "mmlu", draw.seed)),
        tuple(Solved(*row) for row in drawn(gsm8k, draw.n, "gsm8k", draw.seed)),
        tuple(draw.some(alpaca, "alpaca")),
    )
    sizes = {
        "mmlu": (len(questions.choices), len(mmlu)),
        "gsm8k": (len(questions.solutions), len(gsm8k)),
        "alpaca": (len(questions.instructions), len(alpaca)),
    }
    return questions, sizes


def _origin(keys: Iterable[str]) -> tuple[str, str]:
    """The sets' titles, and their licences."""
    found = [SETS[key] for key in keys]
    return "; ".join(one.title for one in found), ", ".join(dict.fromkeys(one.licence for one in found))
