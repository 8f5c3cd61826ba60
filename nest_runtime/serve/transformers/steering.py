"""``model.generate`` under the hand of an engine: each row chooses by its own sampler, and ends by itself.

Which batch is answered, and what becomes of a pass that fails, is plain.py's business.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from nest_runtime.prompts.decoding import last_logits
from nest_runtime.serve.requests.jobs import Delivery, Job
from nest_runtime.serve.requests.sampling import NotFinite, Sampler, choose_tokens


class Steered(Protocol):
    """The engine whose batch is steered."""

    def let_in(self, batch: list[Job]) -> None:
        """Called between two passes; raises to interrupt the batch."""

    def took(self, job: Job, token: int) -> Delivery:
        """Keep a new token; returns what the client is to get for it."""

    def tell(self, deliveries: list[Delivery]) -> None:
        """Deliver a step's tokens."""


class Steering:
    """What happens at each token of one batch: every live row's sampler chooses, and rows end by themselves."""

    def __init__(self, engine: Steered, batch: list[Job]) -> None:
        self._engine, self._batch = engine, batch
        self.done = [False] * len(batch)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of each row, [rows] int64, from logits [rows, vocabulary]; 0 where a row has ended.

        Raises:
            NotFinite: values are not finite; it has rows of the batch.
        """
        self._engine.let_in(self._batch)
        chosen = torch.zeros(len(self._batch), dtype=torch.long, device=scores.device)
        self.done = [over or job.canceled for over, job in zip(self.done, self._batch, strict=True)]
        if not (rows := [row for row, over in enumerate(self.done) if not over]):
            return chosen
        try:
            chosen[rows] = choose_tokens(scores[rows].float(), [self._batch[row].sampler for row in rows])
        except NotFinite as error:
            raise NotFinite(str(error), tuple(rows[number] for number in error.rows)) from error
        deliveries = [
            self._engine.took(self._batch[row], token) for row, token in zip(rows, chosen[rows].tolist(), strict=True)
        ]
        for row, delivery in zip(rows, deliveries, strict=True):
            self.done[row] = delivery.finished
        self._engine.tell(deliveries)
        return chosen


class Chooser(LogitsProcessor):
    """Leaves generate's own greedy choice one token a row."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._steering.choose(scores)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class Look(LogitsProcessor):
    """Raises NotFinite if a sampler could choose nothing."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        choose_tokens(scores.float(), [self._sampler])
        return scores


class Ender(StoppingCriteria):
    """Ends generate's rows where the steering has ended them."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor(self._steering.done, device=input_ids.device)


def bare_generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int, **options: Any) -> Any:
    """``model.generate``, greedily, without anything of the model's own generation config.

    Args:
        model: a model.
        ids, mask: padded prompts, both [rows, tokens] int64.
        count: new tokens of each row.
        options: more of generate's arguments.
    """
    plain = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, **options.pop("settings", {}))
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        with torch.no_grad():
            options |= last_logits(model)
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=plain, **options)
    finally:
        model.generation_config = own
