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
from nest_runtime.evaluate.cases import digest_of, user
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.rounds import BASE, Subject
from nest_runtime.progress import Progress

if TYPE_CHECKING:
    import torch

    from nest_runtime.runtime import PatchRuntime

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


def measure_utility(
    model: Any,
    tokenizer: Any,
    questions: Questions,
    subject: Subject,
    *,
    runtime: PatchRuntime | None = None,
    batch_size: int = 64,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Scores of a model under whatever patch is active in the caller's context.

    Args:
        model, tokenizer: a causal LM and its tokenizer; neither is changed.
        questions: what to ask.
        subject: names what answers; part of the key under which figures are kept.
        runtime: what takes the patch off again, for the base's own answers; needed under a patch.
        batch_size: of the answers to instructions.
        workdir: where figures are kept; a second run continues from there.
        progress: called as ``(stage, done, total)``.

    Returns:
        ``mmlu acc``, ``gsm8k nats_per_token``, ``alpaca kl_to_base``, ``answer_tokens`` and ``ended``, as far as asked.
    """
    ledger = Ledger(None if workdir is None else Path(workdir) / "utility.jsonl")
    asker = _Asker(model, tokenizer, questions, subject, ledger, runtime, batch_size, progress)
    scores: list[Score] = []
    if questions.choices:
        right = asker.each("mmlu", questions.choices, asker.choice)
        scores.append(_mean("mmlu", "acc", [row["right"] for row in right], better=True))
    if questions.solutions:
        found = asker.each("gsm8k", questions.solutions, asker.solution)
        scores.append(_per_token("gsm8k", "nats_per_token", found))
    if questions.instructions:
        moved = asker.divergence()
        answers = asker.answers(subject)
        scores.append(_per_token("alpaca", "kl_to_base", moved))
        scores.append(_mean("alpaca", "answer_tokens", [row["tokens"] for row in answers], better=None))
        scores.append(_mean("alpaca", "ended", [float(row["whole"]) for row in answers], better=None))
    return tuple(scores)


class _Asker:
    """One measurement under way."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Questions,
        subject: Subject,
        ledger: Ledger,
        runtime: PatchRuntime | None,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        from nest_runtime.train.forward import Readout

        self.model, self.tokenizer, self.questions, self.subject = model, tokenizer, questions, subject
        self.ledger, self.runtime, self.batch_size = ledger, runtime, batch_size
        self.progress = progress or (lambda stage, done, total: None)
        # The readout is tried once on the bare base, so that a patch cannot change how it reads.
        with self.bare():
            self.readout = Readout(model)

    def bare(self) -> AbstractContextManager[Any]:
        """The base, for as long as the context lasts."""
        return nullcontext() if self.runtime is None else self.runtime.using(None)

    def each(self, name: str, items: Sequence[Any], work: Callable[[Any], dict[str, float]]) -> list[dict[str, Any]]:
        """The work's figures for every item, those that are kept taken from there."""
        rows: list[dict[str, Any]] = []
        for done, item in enumerate(items, 1):
            key = self._key(name, vars(item) if isinstance(item, Solved) else item, self.subject)
            row = self.ledger.get(key)
            if row is None:
                row = work(item)
                self.ledger.add({key: dict(row)})
            rows.append(row)
            self.progress(name, done, len(items))
        return rows

    def choice(self, item: Solved) -> dict[str, float]:
        """Whether the likeliest of the four letters is the right one."""
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
        first = self.log_probabilities(item.question + ASK, letters[:1])[0, letters]
        return {"right": float(LETTERS[int(first.argmax())] == item.answer.strip()[:1])}

    def solution(self, item: Solved) -> dict[str, float]:
        """The nats that the worked solution costs, and its tokens."""
        ids = self.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        found = self.log_probabilities(item.question, ids)
        return {"nats": -float(found[range(len(ids)), ids].sum()), "tokens": len(ids)}

    def answers(self, subject: Subject) -> list[dict[str, Any]]:
        """Answers to the instructions: text, tokens, and whether each ended by itself."""
        from nest_runtime.prompts.generate import ModelAnswer, answer_conversations

        asked, limit = self.questions.instructions, self.questions.answer_tokens
        keys = [self._key(f"answer of {limit}", text, subject) for text in asked]
        pending = [index for index, key in enumerate(keys) if self.ledger.get(key) is None]
        done = len(asked) - len(pending)
        stage = "answers to instructions" + (" (base)" if subject != self.subject else "")

        def keep(positions: list[int], batch: list[ModelAnswer]) -> None:
            """Keep a batch's answers with their lengths in tokens."""
            nonlocal done
            rows = {}
            for position, answer in zip(positions, batch, strict=True):
                count = len(self.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
                rows[keys[pending[position]]] = {"answer": answer.text, "tokens": count, "whole": answer.whole}
            self.ledger.add(rows)
            done += len(positions)
            self.progress(stage, done, len(asked))

        if pending:
            answer_conversations(
                self.model,
                self.tokenizer,
                [[user(asked[index])] for index in pending],
                max_new_tokens=limit,
                batch_size=self.batch_size,
                on_batch=keep,
            )
        return [self.ledger.get(key) or {} for key in keys]

    def divergence(self) -> list[dict[str, Any]]:
        """KL(base ‖ this) over the base's own answers: nats and tokens of each. Nothing for the base itself."""
        if self.subject.digest is None or self.runtime is None:
            return [{"nats": 0.0, "tokens": row["tokens"]} for row in self.answers(self.subject)]
        base = replace(self.subject, patch=BASE, digest=None)
        with self.bare():
            answers = self.answers(base)
        pairs = list(zip(self.questions.instructions, (row["answer"] for row in answers), strict=True))
        return self.each("kl to base", pairs, self._moved)

    def _moved(self, pair: tuple[str, str]) -> dict[str, float]:
        text, answer = pair
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            return {"nats": 0.0, "tokens": 0}
        with self.bare():
            before = self.log_probabilities(text, ids)
        after = self.log_probabilities(text, ids)
        return {"nats": float((before.exp() * (before - after)).sum()), "tokens": len(ids)}

    def log_probabilities(self, prompt: str, answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities at each token of an answer. ``(answer tokens, vocabulary)`` float32."""
        import torch

        from nest_runtime.prompts.examples import encode
        from nest_runtime.train.forward import device_of

        asked = encode(self.tokenizer, [user(prompt)])
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
