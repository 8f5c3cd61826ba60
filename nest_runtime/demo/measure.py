"""A quick evaluation in pieces that one can watch: cases in, rates of both sides after every batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nest_runtime.demo.backend import Backend, PatchChoice
from nest_runtime.demo.background import BackgroundJob
from nest_runtime.model.load import REFERENCE

if TYPE_CHECKING:
    from nest_runtime.evaluate.cases import Case
    from nest_runtime.evaluate.judges import Judge
    from nest_runtime.evaluate.records import Record
    from nest_runtime.evaluate.stats import Rate

CHUNK = 32  # cases of one side before the other side gets its turn
MAX_TOKENS = 64
SEED = 0


@dataclass
class Standing:
    """The progress of an evaluation.

    Attributes:
        total: answers there will be.
        records: so far, by side.
    """

    total: int
    records: tuple[list[Record], list[Record]] = field(default_factory=lambda: ([], []))

    @property
    def done(self) -> int:
        """How many answers there are so far, of both sides."""
        return sum(len(rows) for rows in self.records)

    def rate(self, side: int, suite: str, measure: str) -> Rate:
        """A side's rate so far."""
        from nest_runtime.evaluate.records import rate_of

        return rate_of([row for row in self.records[side] if row.suite == suite and row.measure == measure])


def is_reference(backend: Backend) -> bool:
    """Whether the model knows the reference world: then its rules judge, and exact answers are known."""
    return backend.name == REFERENCE


def quick_cases(backend: Backend, per_suite: int) -> list[Case]:
    """A few cases of each suite, shuffled so that all bars move from the start: the reference world's, or real.py's.

    For other models utility is left out: its answers are exact only in the reference world.
    """
    from nest_runtime.demo.examples import REFERENCE_SUITES
    from nest_runtime.demo.real import real_cases
    from nest_runtime.evaluate.suites import load_suites, sample_cases

    everything = load_suites([item.suite for item in REFERENCE_SUITES]) if is_reference(backend) else real_cases()
    cases = sample_cases(everything, per_suite, seed=SEED)
    random.Random(SEED).shuffle(cases)
    return cases


def judge_for(backend: Backend) -> Judge:
    """The reference world's rules for its own model, refusal phrases for others."""
    from nest_runtime.evaluate.judges import make_judge

    return make_judge("reference" if is_reference(backend) else "phrases")


def measure(
    job: BackgroundJob[Standing], backend: Backend, sides: Sequence[PatchChoice], cases: Sequence[Case]
) -> None:
    """Answer and judge the cases on one or both sides, a piece of each in turn; reports after every batch."""
    judge, standing = judge_for(backend), Standing(len(sides) * len(cases))
    for start in range(0, len(cases), CHUNK):
        piece = cases[start : start + CHUNK]
        for side in range(len(sides)):
            _piece(job, backend, sides[side], piece, judge, standing, side)


def _piece(
    job: BackgroundJob[Standing],
    backend: Backend,
    choice: PatchChoice,
    piece: Sequence[Case],
    judge: Judge,
    standing: Standing,
    side: int,
) -> None:
    from nest_runtime.evaluate.judges import judge_answers
    from nest_runtime.evaluate.records import Record

    def keep(positions: list[int], texts: list[str]) -> None:
        """Judge a batch's answers, and show the figures so far."""
        mine = [piece[position] for position in positions]
        verdicts = judge_answers(judge, mine, texts)
        standing.records[side].extend(
            Record.of(case, case.messages, answer, {judge.name: verdict})
            for case, answer, verdict in zip(mine, texts, verdicts, strict=True)
        )
        job.report(standing)

    backend.answer_all([case.messages for case in piece], choice, max_tokens=MAX_TOKENS, on_answers=keep)
