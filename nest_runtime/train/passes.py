"""Passes of the model for tuning: answer tokens only, logits slice by slice, lower layers and the base only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from nest_runtime.train.ablation import RefusalAblation
from nest_runtime.train.batches import Batch, Row, make_batch
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.forward import (
    Readout,
    device_of,
    dtype_of,
    even_batches,
    padded,
    tuning_attention,
    width_multiple,
)
from nest_runtime.train.lower import LowerLayers, decoder_layers
from nest_runtime.train.objective import BaseAnswer, slices_of, summed
from nest_runtime.train.recipe import Recipe

OFTEN = 2  # steps that a row must be in, on average, before what the base computes of it is worth keeping


def comes_again(settings: Recipe, rows: int) -> bool:
    """Whether rows come so often, out of so many, that what the base computes of a row is kept for its next step."""
    return settings.steps * settings.batch_size > OFTEN * rows


class Passes:
    """How rows go through the model while it is tuned, and what is kept from pass to pass.

    Args:
        model: the frozen base, ``deltas`` attached.
        deltas: what is trained.
        pad: the padding token.
        settings: the recipe.
    """

    def __init__(self, model: Any, deltas: Deltas, pad: int, settings: Recipe) -> None:
        self.model, self.deltas, self.pad, self.settings = model, deltas, pad, settings
        self.readout, self.lower = Readout(model), LowerLayers(model, deltas.lowest)
        self.ablation: RefusalAblation | None = None
        self.keeps = True  # whether what the base computes of a row is kept for the row's next step
        self._base: dict[tuple[int, ...], BaseAnswer] = {}  # of benign rows, by their tokens

    def prepare(self, train: Sequence[Row]) -> None:
        """See whether rows come again, and find the directions to ablate if the recipe asks for it."""
        self.keeps = comes_again(self.settings, len(train))
        lowest, classes = self.deltas.lowest, {row.harmful for row in train}
        layers, first = (None, 0) if lowest is None else decoder_layers(self.model, lowest)
        if self.settings.ablation and layers is not None and len(classes) == 2:
            self.ablation = RefusalAblation(self.model, layers, first, self.settings.ablation, self.settings.seed)
            with self.base():
                self.ablation.find(train, self.pad)

    @contextmanager
    def base(self) -> Iterator[None]:
        """A context in which the deltas do not act: the bare base."""
        self.deltas.enabled = False
        try:
            yield
        finally:
            self.deltas.enabled = True

    def batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """Rows in padded batches of similar length."""
        lengths = [padded(len(row.prompt) + len(row.answer)) for row in rows]
        for positions in even_batches(lengths, self.settings.step_tokens):
            chosen = [rows[index] for index in positions]
            multiple = width_multiple(self.model, max(lengths[index] for index in positions))
            yield make_batch(chosen, self.pad, device_of(self.model), dtype_of(self.model), multiple)

    def entered(self, batch: Batch) -> AbstractContextManager[None]:
        """A context in which the lower layers have been through the batch, where rows are not kept."""
        return nullcontext() if self.keeps else self.lower.entered(batch)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states (answer tokens, d) that the head reads, in the model's dtype."""
        return self.lower.hidden(batch, batch.rows)[batch.where]

    def sum(self, batch: Batch, loss: Any) -> torch.Tensor:
        """Σ ``loss(logits, part)`` over slices of the batch's answer tokens; ``logits`` are float32."""
        if self.readout.sliced:
            head = self.readout.head
            return summed(self.hidden(batch), self.readout.vocabulary, lambda piece, part: loss(head(piece), part))
        logits = self._whole(batch)
        return loss(logits, slice(0, len(logits)))

    def _whole(self, batch: Batch) -> torch.Tensor:
        """Logits float32 (answer tokens, vocabulary) by the model's own pass, where the head cannot be sliced."""
        with tuning_attention(batch.ids):
            return self.readout.logits(batch.ids, batch.mask, batch.where, batch.inputs)

    def slices(self, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits float32 (n, vocabulary) of the batch's answer tokens, slice by slice, without gradients."""
        with torch.no_grad():
            if not self.readout.sliced:
                logits = self._whole(batch)
                yield slice(0, len(logits)), logits
                return
            hidden = self.hidden(batch)
            for part in slices_of(len(hidden), self.readout.vocabulary):
                yield part, self.readout.head(hidden[part])

    def base_answers(self, batch: Batch) -> BaseAnswer:
        """The base's distributions at the batch's answer tokens; those of its own benign answers, zeros at others."""
        near = [row for row in batch.rows if stays_near_base(row)]
        if self.keeps:
            for row in near:
                if _key(row) not in self._base:  # each alone, as in lower.py
                    (alone,) = self.batches([row])
                    self._base[_key(row)] = self._base_answer(alone)
            known = self._base
        else:
            known = self._base_together(near, batch)
        width = next((known[_key(row)].tokens.shape[1] for row in near), 1)
        joined = BaseAnswer.join(
            [known[_key(row)] if stays_near_base(row) else _no_answer(len(row.answer), width) for row in batch.rows]
        )
        return BaseAnswer(joined.tokens.to(batch.ids.device), joined.logs.to(batch.ids.device))

    def _base_together(self, rows: Sequence[Row], batch: Batch) -> dict[tuple[int, ...], BaseAnswer]:
        """The base's distributions for some rows of a batch, by the rows' tokens, in one pass of the batch's width."""
        if not rows:
            return {}
        part = make_batch(rows, self.pad, batch.ids.device, dtype_of(self.model), batch.ids.shape[1])
        whole, lengths = self._base_answer(part), [len(row.answer) for row in rows]
        tokens, logs = whole.tokens.split(lengths), whole.logs.split(lengths)
        return {_key(row): BaseAnswer(*pair) for row, *pair in zip(rows, tokens, logs, strict=True)}

    def _base_answer(self, batch: Batch) -> BaseAnswer:
        """The base's distributions at all answer tokens of a batch."""
        with self.base():
            return BaseAnswer.join([BaseAnswer.of(part) for _, part in self.slices(batch)])


def stays_near_base(row: Row) -> bool:
    """Whether a row is learned by staying near the base."""
    return not row.harmful and not row.given


def _key(row: Row) -> tuple[int, ...]:
    return (len(row.prompt), *row.prompt, *row.answer)


def _no_answer(count: int, width: int) -> BaseAnswer:
    return BaseAnswer(torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width))
