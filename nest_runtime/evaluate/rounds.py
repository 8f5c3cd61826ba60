"""One evaluation under way: waves of attempts, rounds of turns, and the two ledgers that make it resumable.

Answers are kept under a key of conversation, model hash, patch digest and settings; verdicts under a key of judge, case
and answer. run.py is the door to this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nest_runtime.evaluate.cases import Case, Message, assistant, digest_of, user
from nest_runtime.evaluate.judges.base import Judge, Verdict, judge_answers
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.records import Record
from nest_runtime.progress import Progress

OnBatch = Callable[[list[int], list[str]], None]
Conversation = list[Message]
# Answers conversations in order; calls on_batch(positions, answers) as they come, so that they are kept.
Answerer = Callable[[Sequence[Conversation], OnBatch], list[str]]

JUDGE_CHUNK = 64  # answers judged between two writes of the work file
BASE = "base"


@dataclass(frozen=True)
class Subject:
    """What is being evaluated, by name: the key under which answers are kept.

    Attributes:
        model: the model's name; model_hash: its hash.
        patch: the patch's version, ``base`` for none, or another method's name.
        digest: the patch's digest, or None; for another method whatever tells two of them apart.
        settings: what else decides the answers: JSON values.
    """

    model: str = ""
    model_hash: str = ""
    patch: str = BASE
    digest: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Rounds:
    """One evaluation under way: waves of attempts, rounds of turns, and the two ledgers."""

    def __init__(
        self,
        answer: Answerer,
        judges: list[Judge],
        subject: Subject,
        answers: Ledger,
        verdicts: Ledger,
        progress: Progress,
    ) -> None:
        self.answer, self.judges, self.subject = answer, judges, subject
        self.answers, self.verdicts, self.progress = answers, verdicts, progress
        self.seconds = {"answers": 0.0, "judging": 0.0}

    def all(self, cases: Sequence[Case]) -> list[Record]:
        """Records of all cases that were run: every first attempt, and later ones while none has succeeded."""
        records: dict[str, Record] = {}
        succeeded: set[tuple[str, str]] = set()
        for attempt in sorted({case.attempt for case in cases}):
            wave = [c for c in cases if c.attempt == attempt and (c.suite, c.trial) not in succeeded]
            for record in self._wave(wave, attempt):
                records[record.id] = record
                if record.hit:
                    succeeded.add((record.suite, record.trial))
        return [records[case.id] for case in cases if case.id in records]

    def _wave(self, cases: list[Case], attempt: int) -> list[Record]:
        label = "answers" if attempt == 0 else f"answers, attempt {attempt + 1}"
        began = time.perf_counter()
        talks, texts = self._converse(cases, label)
        middle = time.perf_counter()
        verdicts = {judge.name: self._judge(judge, cases, texts) for judge in self.judges}
        self.seconds["answers"] += middle - began
        self.seconds["judging"] += time.perf_counter() - middle
        return [
            Record.of(case, talk, text, {name: given[i] for name, given in verdicts.items()})
            for i, (case, talk, text) in enumerate(zip(cases, talks, texts, strict=True))
        ]

    def _converse(self, cases: list[Case], label: str) -> tuple[list[Conversation], list[str]]:
        """Each case's conversation up to its last answer, and that answer."""
        talks: list[Conversation] = [list(case.messages) for case in cases]
        texts = [""] * len(cases)
        for turn in range(1 + max((len(case.follow_ups) for case in cases), default=0)):
            live = [i for i, case in enumerate(cases) if turn <= len(case.follow_ups)]
            if turn:
                for i in live:
                    talks[i] += [assistant(texts[i]), user(cases[i].follow_ups[turn - 1])]
            stage = label if turn == 0 else f"{label}, turn {turn + 1}"
            found = self._answer([cases[i] for i in live], [talks[i] for i in live], stage)
            for i, text in zip(live, found, strict=True):
                texts[i] = text
        return talks, texts

    def _answer(self, cases: list[Case], talks: list[Conversation], stage: str) -> list[str]:
        keys = [self._key(case, talk) for case, talk in zip(cases, talks, strict=True)]
        known = [self.answers.get(key) for key in keys]
        pending = [i for i, row in enumerate(known) if row is None]
        done = len(known) - len(pending)
        texts = ["" if row is None else str(row["answer"]) for row in known]

        def on_batch(positions: list[int], batch: list[str]) -> None:
            """Keep a batch's answers, under the keys of their cases."""
            nonlocal done
            rows = {}
            for position, text in zip(positions, batch, strict=True):
                index = pending[position]
                texts[index] = text
                rows[keys[index]] = {"case": cases[index].id, "answer": text}
            self.answers.add(rows)
            done += len(positions)
            self.progress(stage, done, len(known))

        if pending:
            self.answer([talks[i] for i in pending], on_batch)
        return texts

    def _key(self, case: Case, talk: Conversation) -> str:
        subject = self.subject
        return digest_of([case.id, talk, subject.model_hash, subject.patch, subject.digest, subject.settings])

    def _judge(self, judge: Judge, cases: list[Case], texts: list[str]) -> list[Verdict]:
        keys = [digest_of([judge.identity, case.judged_digest, text]) for case, text in zip(cases, texts, strict=True)]
        pending = [i for i, key in enumerate(keys) if self.verdicts.get(key) is None]
        fresh: dict[int, Verdict] = {}
        for start in range(0, len(pending), JUDGE_CHUNK):
            chunk = pending[start : start + JUDGE_CHUNK]

            def keep(given: dict[int, Verdict], chunk: list[int] = chunk) -> None:
                # What could not be read is asked again next time.
                read = {chunk[at]: verdict for at, verdict in given.items() if verdict.outcome != "unparsable"}
                self.verdicts.add({keys[i]: verdict.to_json() for i, verdict in read.items()})

            given = judge_answers(judge, [cases[i] for i in chunk], [texts[i] for i in chunk], keep)
            fresh.update(zip(chunk, given, strict=True))
            self.progress(f"verdicts of {judge.name}", start + len(chunk), len(pending))
        return [fresh.get(i) or Verdict(**(self.verdicts.get(key) or {})) for i, key in enumerate(keys)]
