"""Running an evaluation: conversations in, answers and verdicts out, resumable at every batch.

Answers are greedy and kept under a key of conversation, model hash, patch digest and settings; verdicts
under a key of judge, case and answer. Nothing here makes cases or does arithmetic on results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import EvaluationError
from nest_runtime.evaluate.cases import Case, Message, assistant, check_cases, digest_of, user
from nest_runtime.evaluate.judges.base import Judge, Verdict, judge_answers
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.records import Record
from nest_runtime.evaluate.report import EvalResult

if TYPE_CHECKING:
    from nest_runtime.patch import Patch
    from nest_runtime.runtime import PatchRuntime

Progress = Callable[[str, int, int], None]
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


def evaluate(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    judge: Judge | Sequence[Judge],
    *,
    runtime: PatchRuntime | None = None,
    patch: Patch | None = None,
    model_name: str = "",
    base_hash: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
    workdir: str | Path | None = None,
) -> EvalResult:
    """Answer cases with a model under a patch, or with the bare base, and judge the answers.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        cases: what to ask; ids are unique.
        judge: one judge, or several: rates are the first one's, agreement is reported for the first two.
        runtime: the model's PatchRuntime, where it has one; its active patch is not touched.
        patch: the patch to evaluate; None is the bare base, whatever ``runtime`` has active.
        model_name: for the report.
        base_hash: the base's model hash where it is known; computed otherwise.
        batch_size, max_new_tokens: of generation. The batch size is no part of the key of kept answers.
        progress: called as ``(stage, done, total)``.
        workdir: where answers and verdicts are kept; a second run with the same cases goes on from there.

    Returns:
        Records and identity; rates, intervals and tables come from it.

    Raises:
        EvaluationError: no cases, an id twice, a judge that cannot work: all before anything is generated.
        BaseMismatch: the patch was made for another base.
    """
    check_cases(cases)
    judges = [judge] if isinstance(judge, Judge) else list(judge)
    check_judges(judges)
    with patched(model, runtime, patch, base_hash=base_hash) as known_hash:
        subject = Subject(
            model=model_name or str(getattr(model, "name_or_path", "")),
            model_hash=known_hash,
            patch=BASE if patch is None else patch.version,
            digest=None if patch is None else patch.digest,
            settings={"max_new_tokens": max_new_tokens, "decoding": "greedy"},
        )
        answer = model_answerer(model, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens)
        result = evaluate_answers(answer, cases, judges, subject=subject, progress=progress, workdir=workdir)
    return replace(result, notes=tuple(overlong_note(model, tokenizer, result.records, max_new_tokens)))


def evaluate_answers(
    answer: Answerer,
    cases: Sequence[Case],
    judges: Sequence[Judge],
    *,
    subject: Subject,
    progress: Progress | None = None,
    workdir: str | Path | None = None,
) -> EvalResult:
    """The same for anything that answers: a filter around a model, a system prompt, a remote server.

    Args:
        answer: see :data:`Answerer`.
        cases, judges, progress, workdir: as in :func:`evaluate`. The caller has checked the judges.
        subject: names what answers; part of the key under which answers are kept.
    """
    check_cases(cases)
    folder = None if workdir is None else Path(workdir)
    run = _Run(
        answer,
        list(judges),
        subject,
        Ledger(folder and folder / "answers.jsonl"),
        Ledger(folder and folder / "verdicts.jsonl"),
        progress or (lambda stage, done, total: None),
    )
    records = run.all(cases)
    costs = {judge.name: cost for judge in judges if (cost := judge.cost()) is not None}
    return EvalResult(
        model=subject.model,
        model_hash=subject.model_hash,
        patch=subject.patch,
        digest=subject.digest,
        judges=tuple(judge.name for judge in judges),
        settings=dict(subject.settings),
        records=tuple(records),
        seconds={key: round(value, 3) for key, value in run.seconds.items()},
        cost=costs,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check_judges(judges: Sequence[Judge]) -> None:
    """Have every judge show that it works, before answers are paid for."""
    names = [judge.name for judge in judges]
    if not names or len(set(names)) != len(names):
        raise EvaluationError(f"judges: {', '.join(names) or 'none'}", "name one or more judges, each once")
    for judge in judges:
        judge.check()


def model_answerer(model: Any, tokenizer: Any, *, batch_size: int = 64, max_new_tokens: int = 64) -> Answerer:
    """Greedy answers of a model, under whatever patch is active in the caller's context."""
    from nest_runtime.evaluate.prompting import PrefillView
    from nest_runtime.generate import generate_answers

    def answer(conversations: Sequence[Conversation], on_batch: OnBatch) -> list[str]:
        return generate_answers(
            model,
            PrefillView(tokenizer),
            conversations,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=on_batch,
        )

    return answer


def overlong_note(model: Any, tokenizer: Any, records: Sequence[Record], max_new_tokens: int) -> list[str]:
    """A note where conversations are longer than the model's context: such answers say little about safety."""
    from nest_runtime.evaluate.prompting import PrefillView
    from nest_runtime.train.data import encode

    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return []
    view = PrefillView(tokenizer)
    # A token is at least a byte, so most conversations need no counting.
    room = limit - max_new_tokens - 128  # for the chat template
    long = [r for r in records if sum(len(m["content"].encode()) + 16 for m in r.messages) > room]
    over = [r for r in long if len(encode(view, r.messages)) + max_new_tokens > limit]
    if not over:
        return []
    attacks = ", ".join(sorted({record.attack for record in over}))
    return [f"{len(over)} of {len(records)} conversations exceed the model's context of {limit} tokens ({attacks})"]


@contextmanager
def patched(
    model: Any, runtime: PatchRuntime | None, patch: Patch | None, *, base_hash: str | None = None
) -> Iterator[str]:
    """Put a patch on for this context only (None: the bare base), and give the base's hash.

    The model is left as it was: a patch that the runtime did not hold is taken out of it again, and where there
    was no runtime none stays.
    """
    from nest_runtime.fingerprint import model_hash

    with ExitStack() as stack:
        if runtime is None and patch is not None:
            from nest_runtime.runtime import PatchRuntime

            base_hash = base_hash or model_hash(model)
            runtime = stack.enter_context(PatchRuntime(model, base_hash=base_hash))
        if runtime is None:
            yield base_hash or model_hash(model)
            return
        if patch is not None and patch.digest not in {held.digest for held in runtime.patches.values()}:
            runtime.add(patch)
            stack.callback(runtime.remove, patch.digest)
        # A patch that was checked against the model knows its hash, also while rows are folded.
        checked = [held.base_hash for held in runtime.patches.values() if held.digest not in runtime.forced]
        known = base_hash or next(iter(checked), None) or model_hash(model)
        stack.enter_context(runtime.using(None if patch is None else patch.digest))
        yield known


class _Run:
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
            given = judge_answers(judge, [cases[i] for i in chunk], [texts[i] for i in chunk])
            fresh.update(zip(chunk, given, strict=True))
            # What could not be read is asked again next time.
            self.verdicts.add({keys[i]: fresh[i].to_json() for i in chunk if fresh[i].outcome != "unparsable"})
            self.progress(f"verdicts of {judge.name}", start + len(chunk), len(pending))
        return [fresh.get(i) or Verdict(**(self.verdicts.get(key) or {})) for i, key in enumerate(keys)]
