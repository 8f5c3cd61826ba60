"""The model as lm-eval asks it: answers are kept in a ledger, and progress is ours. Imported where lm-eval is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from nest_runtime.evaluate.cases import digest_of
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.rounds import Subject
from nest_runtime.progress import Progress

CHUNK = 8  # batches between two writes of the work file


class Harness(HFLM):
    """Asks the model chunk by chunk, longest prompts first; what the ledger has is not asked again."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ledger: Ledger,
        subject: Subject,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._ledger, self._progress = ledger, progress or (lambda stage, done, total: None)
        self._who = [subject.model_hash, subject.patch, subject.digest]
        self._chunk = CHUNK * batch_size

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log-likelihoods as lm-eval defines them, those in the ledger not computed again."""
        return self._kept("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log-likelihoods of whole texts as lm-eval defines them, those in the ledger not computed again."""
        return self._kept("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Generated texts as lm-eval defines them, those in the ledger not generated again."""
        return self._kept("generate_until", requests, super().generate_until)

    def _kept(self, kind: str, requests: list[Any], ask: Callable[..., list[Any]]) -> list[Any]:
        keys = [digest_of([*self._who, kind, list(request.args)]) for request in requests]
        pairs = zip(keys, requests, strict=True)
        rows = [None if _sampled(request) else self._ledger.get(key) for key, request in pairs]
        answers = [None if row is None else _plain(row["answer"]) for row in rows]
        missing = [i for i, row in enumerate(rows) if row is None]
        missing.sort(key=lambda i: (-len(requests[i].args[0]), requests[i].args[0]))
        for start in range(0, len(missing), self._chunk):
            places = missing[start : start + self._chunk]
            for i, answer in zip(places, ask([requests[i] for i in places], disable_tqdm=True), strict=True):
                answers[i] = answer
            self._ledger.add({keys[i]: {"answer": answers[i]} for i in places if not _sampled(requests[i])})
            self._progress(f"lm-eval {kind}", start + len(places), len(missing))
        return answers


def _sampled(request: Any) -> bool:
    """Whether the answer is drawn at random: such answers are never reused."""
    options = request.args[1] if len(request.args) > 1 else None
    return isinstance(options, Mapping) and bool(options.get("do_sample"))


def _plain(answer: Any) -> Any:
    """An answer read from JSON, as lm-eval gives it: pairs are tuples."""
    return tuple(answer) if isinstance(answer, list) else answer
