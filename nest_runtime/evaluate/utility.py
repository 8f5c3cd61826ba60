"""Utility without graders: what a model's own probabilities say of known answers, and how far a patch moves it.

Multiple choice by the likeliest letter; worked solutions by nats a token; on ordinary instructions the KL divergence
from the base over the base's own answers, the length of answers, and how many end by themselves. One question is
computed at a time, so that figures do not depend on a batch size. Every question's figure is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.evaluate.ability import Score
from nest_runtime.evaluate.cases import Message, digest_of, user
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.rounds import BASE, Subject
from nest_runtime.progress import Progress

if TYPE_CHECKING:
    import torch


ASK = "\nAnswer with the letter alone."
LETTERS = "ABCD"
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Solved:
    """A question with its answer: the right letter, or a worked solution."""

    question: str
    answer: str


@dataclass(frozen=True)
class Questions:
    """What utility is measured with.

    Attributes:
        choices: multiple choice, of the letters A to D (MMLU).
        solutions: worked solutions (GSM8K).
        instructions: ordinary requests (Alpaca).
        answer_tokens: the longest answer to an instruction.
    """

    choices: tuple[Solved, ...] = ()
    solutions: tuple[Solved, ...] = ()
    instructions: tuple[str, ...] = ()
    answer_tokens: int = ANSWER_TOKENS

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` over all of it."""
        return digest_of([*map(vars, self.choices), *map(vars, self.solutions), self.instructions, self.answer_tokens])


@dataclass(frozen=True)
class Way:
    """How questions reach what is measured, where it is not simply what the model says as the caller left it.

    Attributes:
        on: puts it on the model, and takes it off again.
        off: takes off what the caller has put on, for the base's own figures. One of the two does nothing.
        rewrite: changes a conversation before the model reads it.
        screen: ``(conversation, answer or None) -> answer``, as compare/methods/base.py has it.
    """

    on: Callable[[], AbstractContextManager[Any]] = nullcontext
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    rewrite: Callable[[Sequence[Mapping[str, str]]], Sequence[Mapping[str, str]]] | None = None
    screen: Callable[[Sequence[Mapping[str, str]], str | None], str | None] | None = None


def measure_utility(
    model: Any,
    tokenizer: Any,
    questions: Questions,
    subject: Subject,
    *,
    way: Way | None = None,
    batch_size: int = 64,
    workdir: str | Path | None = None,
    base_workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Scores of a model under whatever patch is active in the caller's context, or under what ``way`` puts on.

    Args:
        model, tokenizer: a causal LM and its tokenizer; neither is changed.
        questions: what to ask.
        subject: names what answers; part of the key under which figures are kept. Without a digest it is the base.
        way: how it is put on, or taken off for the base's own answers; None is enough for the base.
        batch_size: of the answers to instructions.
        workdir: where figures are kept; a second run continues from there.
        base_workdir: where the base's own answers are kept; None keeps them with the rest.
        progress: called as ``(stage, done, total)``.

    Returns:
        ``mmlu acc``, ``gsm8k nats_per_token``, ``alpaca kl_to_base``, ``answer_tokens`` and ``ended``, as far as asked.
    """
    ledger = _ledger(workdir)
    kept = ledger if base_workdir is None or base_workdir == workdir else _ledger(base_workdir)
    way = way or Way()
    asker = _Asker(model, tokenizer, questions, subject, (ledger, kept), way, batch_size, progress)
    scores: list[Score] = []
    if questions.choices:
        right = asker.each("mmlu", questions.choices, asker.choice, way.on)
        scores.append(_mean("mmlu", "acc", [row["right"] for row in right], better=True))
    if questions.solutions:
        found = asker.each("gsm8k", questions.solutions, asker.solution, way.on)
        scores.append(_per_token("gsm8k", "nats_per_token", found))
    if questions.instructions:
        moved = asker.divergence()
        answers = asker.answers()
        scores.append(_per_token("alpaca", "kl_to_base", moved))
        scores.append(_mean("alpaca", "answer_tokens", [row["tokens"] for row in answers], better=None))
        scores.append(_mean("alpaca", "ended", [float(row["whole"]) for row in answers], better=None))
    return tuple(scores)


def _ledger(folder: str | Path | None) -> Ledger:
    return Ledger(None if folder is None else Path(folder) / "utility.jsonl")


class _Asker:
    """One measurement under way."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Questions,
        subject: Subject,
        ledgers: tuple[Ledger, Ledger],
        way: Way,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        from nest_runtime.train.forward import Readout

        self.model, self.tokenizer, self.questions, self.subject = model, tokenizer, questions, subject
        (self.ledger, self.base_ledger), self.way, self.batch_size = ledgers, way, batch_size
        self.progress = progress or (lambda stage, done, total: None)
        # The readout is tried once on the bare base, so that a patch cannot change how it reads.
        with way.off():
            self.readout = Readout(model)

    def each(
        self,
        name: str,
        items: Sequence[Any],
        work: Callable[[Any], dict[str, float]],
        within: Callable[[], AbstractContextManager[Any]],
    ) -> list[dict[str, Any]]:
        """The work's figures for every item, made in a context; those that are kept are taken from there."""
        keys = [self._key(name, vars(item) if isinstance(item, Solved) else item, self.subject) for item in items]
        pending = [index for index, key in enumerate(keys) if self.ledger.get(key) is None]
        done = len(items) - len(pending)
        self.progress(name, done, len(items))
        with within() if pending else nullcontext():
            for number, index in enumerate(pending, done + 1):
                self.ledger.add({keys[index]: dict(work(items[index]))})
                self.progress(name, number, len(items))
        return [self.ledger.get(key) or {} for key in keys]

    def asked(self, text: str) -> list[Message]:
        """The conversation that what is measured reads."""
        messages = [user(text)]
        return messages if self.way.rewrite is None else [dict(part) for part in self.way.rewrite(messages)]

    def screened(self, text: str, answer: str | None) -> str | None:
        """What a screen makes of a question (``answer`` None) or of an answer."""
        return answer if self.way.screen is None else self.way.screen([user(text)], answer)

    def choice(self, item: Solved) -> dict[str, float]:
        """Whether the likeliest of the four letters is the right one; a question that a screen blocks is not."""
        if self.screened(item.question + ASK, None) is not None:
            return {"right": 0.0}
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
        first = self.log_probabilities(self.asked(item.question + ASK), letters[:1])[0, letters]
        return {"right": float(LETTERS[int(first.argmax())] == item.answer.strip()[:1])}

    def solution(self, item: Solved) -> dict[str, float]:
        """The nats that the worked solution costs, and its tokens."""
        ids = self.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        found = self.log_probabilities(self.asked(item.question), ids)
        return {"nats": -float(found[range(len(ids)), ids].sum()), "tokens": len(ids)}

    def answers(self, *, base: bool = False) -> list[dict[str, Any]]:
        """Answers to the instructions, the subject's or the base's: text, tokens, and whether each ended by itself."""
        from nest_runtime.prompts.generate import ModelAnswer, answer_conversations

        subject = replace(self.subject, patch=BASE, digest=None) if base else self.subject
        ledger = self.base_ledger if base else self.ledger
        texts, limit = self.questions.instructions, self.questions.answer_tokens
        keys = [self._key(f"answer of {limit}", text, subject) for text in texts]
        stage = "answers to instructions" + (" (base)" if base else "")

        def add(index: int, text: str, whole: bool) -> None:
            """Keep an answer with its length in tokens."""
            count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            ledger.add({keys[index]: {"answer": text, "tokens": count, "whole": whole}})

        pending = []
        for index in [index for index, key in enumerate(keys) if ledger.get(key) is None]:
            blocked = None if base else self.screened(texts[index], None)
            pending.append(index) if blocked is None else add(index, blocked, True)
        done = len(texts) - len(pending)

        def keep(positions: list[int], batch: list[ModelAnswer]) -> None:
            """Keep a batch's answers."""
            nonlocal done
            for index, answer in zip([pending[position] for position in positions], batch, strict=True):
                text = answer.text if base else self.screened(texts[index], answer.text) or ""
                add(index, text, answer.whole or text != answer.text)
            done += len(positions)
            self.progress(stage, done, len(texts))

        if pending:
            with self.way.off() if base else self.way.on():
                answer_conversations(
                    self.model,
                    self.tokenizer,
                    [[user(texts[index])] if base else self.asked(texts[index]) for index in pending],
                    max_new_tokens=limit,
                    batch_size=self.batch_size,
                    on_batch=keep,
                )
        return [ledger.get(key) or {} for key in keys]

    def divergence(self) -> list[dict[str, Any]]:
        """KL(base ‖ this) over the base's own answers: nats and tokens of each. Nothing for the base itself."""
        if self.subject.digest is None:
            return [{"nats": 0.0, "tokens": row["tokens"]} for row in self.answers()]
        pairs = list(zip(self.questions.instructions, (row["answer"] for row in self.answers(base=True)), strict=True))
        return self.each("kl to base", pairs, self.moved, nullcontext)

    def moved(self, pair: tuple[str, str]) -> dict[str, float]:
        """KL over one answer of the base. Whatever is measured is put on and taken off here."""
        text, answer = pair
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            return {"nats": 0.0, "tokens": 0}
        with self.way.off():
            before = self.log_probabilities([user(text)], ids)
        with self.way.on():
            after = self.log_probabilities(self.asked(text), ids)
        return {"nats": float((before.exp() * (before - after)).sum()), "tokens": len(ids)}

    def log_probabilities(self, messages: Sequence[Message], answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities at each token of an answer to a conversation. ``(answer tokens, vocabulary)`` float32."""
        import torch

        from nest_runtime.prompts.examples import encode
        from nest_runtime.train.forward import device_of

        asked = encode(self.tokenizer, list(messages))
        ids = torch.tensor([[*asked, *answer]], device=device_of(self.model))
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[0, len(asked) - 1 : -1] = True
        with torch.no_grad():
            return self.readout.logits(ids, torch.ones_like(ids), where).log_softmax(-1)

    def _key(self, name: str, item: Any, subject: Subject) -> str:
        return digest_of([name, item, subject.model_hash, subject.patch, subject.digest])


def _mean(task: str, metric: str, values: Sequence[float], better: bool | None) -> Score:
    """A score that is the mean over questions."""
    samples = {f"{task}/{number}": float(value) for number, value in enumerate(values)}
    return Score(task, metric, "none", sum(values) / len(values), _error(values), len(values), better, samples=samples)


def _per_token(task: str, metric: str, rows: Sequence[Mapping[str, float]]) -> Score:
    """Nats a token over all questions: the mean of each question's nats over the mean number of tokens.

    The tokens are the same with and without a patch, so that questions can be paired.
    """
    tokens = max(sum(row["tokens"] for row in rows), 1) / len(rows)
    return _mean(task, metric, [row["nats"] / tokens for row in rows], better=False)


def _error(values: Sequence[float]) -> float | None:
    """The standard error of a mean."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return float((sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5)
