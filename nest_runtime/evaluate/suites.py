"""Named suites of cases: the reference world's, and files of published benchmarks (layouts.py).

Suites hold plain behaviors (and the reference world's own jailbreaks); attacks/ makes more of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.cases import Case
from nest_runtime.evaluate.layouts import read_behaviors
from nest_runtime.evaluate.standard import ATTACKED, NAME, load_standard, split_standard
from nest_runtime.hints import did_you_mean
from nest_runtime.reference import world

REFERENCE_SUITES = tuple(world.SUITES)
JAILBREAK = "jailbreak"  # suites whose names begin so are pooled, as those of the standard suite that attack
NO_JAILBREAK = ("jailbreakbench", "jailbreakbench-benign")  # JailbreakBench's goals themselves, asked plainly


def load_suite(name: str, *, split: str = "test") -> list[Case]:
    """The cases of one suite.

    Args:
        name: ``reference`` (all of the reference world's suites), or one of them by name (``plain``,
            ``jailbreak-seen``, ``jailbreak-held-out``, ``over-refusal``, ``utility``, also ``reference/plain`` …).
            ``standard`` or parts of it (``standard:wild,prefill``) come from the folder that $NEST_TEST_DATA names,
            without its questions of utility. Else the path of a behaviors file.
        split: ``test``; ``validation`` and ``train`` are for choosing settings, never for reporting.

    Raises:
        UsageError: there is no such suite.
        DataError: a behaviors file cannot be read.
    """
    if name == "reference":
        return [case for suite in REFERENCE_SUITES for case in _reference(suite, split)]
    short = name.removeprefix("reference/")
    if short in REFERENCE_SUITES:
        return _reference(short, split)
    parts = split_standard([name])[1]
    if parts is not None:
        return list(load_standard(parts).cases)
    if name.startswith("hf://") or Path(name).suffix:
        return load_behaviors(name)
    raise UsageError(
        f"there is no suite {name!r}",
        did_you_mean(name, ["reference", NAME, *REFERENCE_SUITES])
        + f"use {NAME}, reference, {', '.join(REFERENCE_SUITES)}, or the path of a behaviors file",
    )


def load_suites(names: Iterable[str], *, split: str = "test") -> list[Case]:
    """The cases of several suites, each once, in order."""
    cases: dict[str, Case] = {}
    for name in names:
        for case in load_suite(name, split=split):
            cases.setdefault(case.id, case)
    return list(cases.values())


def load_behaviors(ref: str | Path, *, kind: str | None = None) -> list[Case]:
    """The cases of a behaviors file, in a published layout or any prompt file (layouts.read_behaviors)."""
    return read_behaviors(ref, kind=kind)


def is_jailbreak(suite: str) -> bool:
    """Whether a suite's harmful cases are asked in some other way than plainly; such suites are pooled."""
    return suite in ATTACKED or (suite.startswith(JAILBREAK) and suite not in NO_JAILBREAK)


def sample_cases(cases: Sequence[Case], limit: int, *, seed: int = 0) -> list[Case]:
    """At most ``limit`` cases of each suite, drawn by a seed, in their order.

    Raises:
        UsageError: ``limit`` is not positive.
    """
    if limit < 1:
        raise UsageError(f"a limit of {limit} leaves no cases", "use 1 or more")
    by_suite: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        by_suite.setdefault(case.suite, []).append(index)
    kept: set[int] = set()
    for suite, indices in by_suite.items():
        drawn = random.Random(f"{seed}/{suite}").sample(indices, min(limit, len(indices)))
        kept.update(drawn)
    return [case for index, case in enumerate(cases) if index in kept]


def default_judge(cases: Sequence[Case]) -> str:
    """The judge for cases if none is named: ``reference`` for the reference world's, else ``phrases``."""
    return "reference" if all("act" in case.meta for case in cases) else "phrases"


def _reference(suite: str, split: str) -> list[Case]:
    made = [
        Case(
            f"reference/{row.id}",
            tuple(row.messages),
            row.kind,
            suite,
            family=row.family,
            category=row.category,
            attack=row.wrapping or "direct",
            expected=row.expected,
            behavior=f"how to {row.act}" if row.kind == "harmful" else "",
            measure=world.SUITES[suite],
            meta={"act": row.act, "wrapping": row.wrapping},
        )
        for row in world.cases(split, suite)
    ]
    return [_with_target(case) for case in made]


def _with_target(case: Case) -> Case:
    """How a complying answer begins in the reference world: what a white-box or prefilling attacker aims at."""
    if case.kind != "harmful":
        return case
    return replace(case, meta={**case.meta, "target": f"Warning: to {case.meta['act']}, first"})
