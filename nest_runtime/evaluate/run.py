"""Running an evaluation: conversations in, greedy answers and verdicts out, resumable at every batch.

Nothing here makes cases or does arithmetic on results; rounds.py asks and keeps, lm_eval.py runs lm-eval's tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import EvaluationError
from nest_runtime.evaluate.cases import Case, check_cases
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.records import Record
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.rounds import BASE, Answerer, Conversation, OnBatch, Rounds, Subject
from nest_runtime.progress import Progress

if TYPE_CHECKING:
    from nest_runtime.evaluate.lm_eval import Tasks
    from nest_runtime.evaluate.standard import SuiteSource
    from nest_runtime.evaluate.utility import Questions
    from nest_runtime.patch.patch import Patch
    from nest_runtime.runtime import PatchRuntime


def evaluate(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    judge: Judge | Sequence[Judge],
    *,
    tasks: Tasks | None = None,
    questions: Questions | None = None,
    sources: Mapping[str, SuiteSource] | None = None,
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
        tasks: lm-eval tasks (lm_eval.load_tasks) to measure general ability with; there may be no cases then.
        questions: of utility (standard.load_standard); there may be no cases then.
        sources: where suites come from, for the report.
        runtime: the model's PatchRuntime, if it has one; its active patch is not touched.
        patch: the patch to evaluate; None is the bare base, whatever ``runtime`` has active.
        model_name: for the report.
        base_hash: the base's model hash where it is known; computed otherwise.
        batch_size, max_new_tokens: of generation. The batch size is no part of the key of kept answers.
        progress: called as ``(stage, done, total)``.
        workdir: where answers and verdicts are kept; a second run with the same cases continues from there.

    Returns:
        Records and identity; rates, intervals and tables come from it.

    Raises:
        EvaluationError: no cases, an id twice, a judge that cannot work: all before anything is generated.
        BaseMismatch: the patch was made for another base.
    """
    judges = [judge] if isinstance(judge, Judge) else list(judge)
    if cases or (tasks is None and questions is None):
        check_cases(cases)
        check_judges(judges)
    with patched(model, runtime, patch, base_hash=base_hash) as (known_hash, held):
        subject = _subject(model_name or str(getattr(model, "name_or_path", "")), known_hash, patch, max_new_tokens)
        if cases:
            answer = model_answerer(model, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens)
            result = evaluate_answers(answer, cases, judges, subject=subject, progress=progress, workdir=workdir)
        else:
            result = _result(subject, [], [], {})
        plain = getattr(tokenizer, "plain", tokenizer)
        if tasks is not None:
            result = _with_ability(result, model, plain, tasks, subject, batch_size, workdir, progress)
        if questions is not None:
            result = _with_utility(result, model, plain, questions, subject, held, batch_size, workdir, progress)
    notes = tuple(overlong_note(model, tokenizer, result.records, max_new_tokens))
    return replace(result, notes=notes, suites=dict(sources or {}))


def _subject(model_name: str, model_hash: str, patch: Patch | None, max_new_tokens: int) -> Subject:
    """What answers: a model under a patch, or the bare base."""
    return Subject(
        model=model_name,
        model_hash=model_hash,
        patch=BASE if patch is None else patch.version,
        digest=None if patch is None else patch.digest,
        settings={"max_new_tokens": max_new_tokens, "decoding": "greedy"},
    )


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
    run = Rounds(
        answer,
        list(judges),
        subject,
        Ledger(folder and folder / "answers.jsonl"),
        Ledger(folder and folder / "verdicts.jsonl"),
        progress or (lambda stage, done, total: None),
    )
    records = run.all(cases)
    return _result(subject, judges, records, run.seconds)


def _result(
    subject: Subject, judges: Sequence[Judge], records: Sequence[Record], seconds: dict[str, float]
) -> EvalResult:
    costs = {judge.name: cost for judge in judges if (cost := judge.cost()) is not None}
    return EvalResult(
        model=subject.model,
        model_hash=subject.model_hash,
        patch=subject.patch,
        digest=subject.digest,
        judges=tuple(judge.name for judge in judges),
        settings=dict(subject.settings),
        records=tuple(records),
        seconds={key: round(value, 3) for key, value in seconds.items()},
        cost=costs,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _with_ability(
    result: EvalResult,
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    subject: Subject,
    batch_size: int,
    workdir: str | Path | None,
    progress: Progress | None,
) -> EvalResult:
    """The result with scores of general ability, and how they were measured."""
    from nest_runtime.evaluate.lm_eval import measure, settings

    began = time.perf_counter()
    scores = measure(model, tokenizer, tasks, subject, batch_size=batch_size, workdir=workdir, progress=progress)
    seconds = {**result.seconds, "ability": round(time.perf_counter() - began, 3)}
    kept = {**result.settings, "ability": settings(tasks, tokenizer)}
    return replace(result, ability=scores, seconds=seconds, settings=kept)


def _with_utility(
    result: EvalResult,
    model: Any,
    tokenizer: Any,
    questions: Questions,
    subject: Subject,
    runtime: PatchRuntime | None,
    batch_size: int,
    workdir: str | Path | None,
    progress: Progress | None,
) -> EvalResult:
    """The result with scores of utility beside those it has."""
    from nest_runtime.evaluate.utility import Way, measure_utility

    began = time.perf_counter()
    scores = measure_utility(
        model,
        tokenizer,
        questions,
        subject,
        way=None if runtime is None else Way(off=lambda: runtime.using(None)),
        batch_size=batch_size,
        workdir=workdir,
        progress=progress,
    )
    seconds = {**result.seconds, "utility": round(time.perf_counter() - began, 3)}
    kept = {**result.settings, "utility": {"answer_tokens": questions.answer_tokens}}
    return replace(result, ability=(*result.ability, *scores), seconds=seconds, settings=kept)


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
    from nest_runtime.prompts.generate import generate_answers

    def answer(conversations: Sequence[Conversation], on_batch: OnBatch) -> list[str]:
        """Answer conversations greedily, batch by batch."""
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
    from nest_runtime.prompts.content import text_of
    from nest_runtime.prompts.examples import encode

    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return []
    view = PrefillView(tokenizer)
    # A token is at least a byte, so most conversations need no counting.
    room = limit - max_new_tokens - 128  # for the chat template
    long = [r for r in records if sum(len(text_of(m["content"]).encode()) + 16 for m in r.messages) > room]
    over = [r for r in long if len(encode(view, r.messages)) + max_new_tokens > limit]
    if not over:
        return []
    attacks = ", ".join(sorted({record.attack for record in over}))
    return [f"{len(over)} of {len(records)} conversations exceed the model's context of {limit} tokens ({attacks})"]


@contextmanager
def patched(
    model: Any, runtime: PatchRuntime | None, patch: Patch | None, *, base_hash: str | None = None
) -> Iterator[tuple[str, PatchRuntime | None]]:
    """Put a patch on for this context only (None: the bare base); returns the base's hash, and the runtime if any.

    The model is left as it was: a patch that the runtime did not hold is taken out of it again, and where there
    was no runtime none stays.
    """
    from nest_runtime.model.fingerprint import model_hash

    with ExitStack() as stack:
        if runtime is None and patch is not None:
            from nest_runtime.runtime import PatchRuntime

            base_hash = base_hash or model_hash(model)
            runtime = stack.enter_context(PatchRuntime(model, base_hash=base_hash))
        if runtime is None:
            yield base_hash or model_hash(model), None
            return
        if patch is not None and patch.digest not in {held.digest for held in runtime.patches.values()}:
            runtime.add(patch)
            stack.callback(runtime.remove, patch.digest)
        # A patch that was checked against the model knows its hash, also while rows are folded.
        checked = [held.base_hash for held in runtime.patches.values() if held.digest not in runtime.forced]
        known = base_hash or next(iter(checked), None) or model_hash(model)
        stack.enter_context(runtime.using(None if patch is None else patch.digest))
        yield known, runtime
