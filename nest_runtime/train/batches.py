"""What tuning learns from: token rows of prompt and answer, and which rows make up which step.

The rows of step t follow from the seed and t alone, so a resumed run sees the same rows as an uninterrupted one.
Nothing here runs the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nest_runtime.errors import DataError
from nest_runtime.prompts.content import images_of
from nest_runtime.prompts.examples import Example, encode_prompt, render
from nest_runtime.prompts.images import PromptImages, batch_inputs
from nest_runtime.train.forward import pad_rows

# Worded otherwise than aligned models refuse by themselves: what a model says already leaves nothing to learn
# (docs/decisions/training-defaults.md). One opening, so that the choice falls on the first token.
OPENING = 3  # tokens of a refusal by which it is told: "I'm sorry", "Sorry, I"
REFUSALS = (
    "Sorry, I can't do that.",
    "Sorry, I can't do that. It could hurt someone.",
    "Sorry, I can't do that. Please ask me something else.",
)


@dataclass(frozen=True)
class Row:
    """One training example in tokens: ``prompt`` is read, ``answer`` (with its end token) is learned.

    A ``given`` answer is not the base's greedy one, so it is learned by its words, not by staying near the base. A
    ``probe`` is never learned: it measures how likely the answer to a harmless prompt is to begin as a refusal. A
    ``rival`` is the token that a harmful answer would have in place of the refusal's first; -1 where none is known.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    harmful: bool
    images: PromptImages | None = None
    given: bool = False
    probe: bool = False
    rival: int = -1

    @property
    def content(self) -> list[Any]:
        """Everything that decides what is learned, as JSON values."""
        images = [] if self.images is None else [self.images.digest]
        kinds = [kind for kind in ("given", "probe") if getattr(self, kind)]
        rival = [] if self.rival < 0 else [self.rival]
        return [list(self.prompt), list(self.answer), self.harmful, *images, *kinds, *rival]


@dataclass(frozen=True)
class Batch:
    """Padded rows on the model's device.

    Attributes:
        ids, mask: (rows, width) int64.
        where: (rows, width) bool: positions whose next token is an answer's.
        targets: (answer tokens,) int64: those next tokens, in the order of ``where``.
        harmful: (answer tokens,) bool: whether each belongs to a harmful row.
        given: (answer tokens,) bool: whether each belongs to a given answer.
        row: (answer tokens,) int64: which row each belongs to.
        place: (answer tokens,) int64: its place in the answer, from 0.
        rival: (answer tokens,) int64: the row's rival at its first answer token, -1 elsewhere.
        rows: the rows themselves, in order.
        inputs: what the model takes besides ids and mask, where prompts hold images.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    harmful: torch.Tensor
    given: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor
    rival: torch.Tensor
    rows: tuple[Row, ...]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


def refusal_for(example: Example, refusals: Sequence[str] = ()) -> str:
    """The refusal to learn for a harmful example: its own response, else one of the list, chosen by its text."""
    if example.response:
        return example.response
    texts = tuple(refusals) or REFUSALS
    number = int.from_bytes(hashlib.sha256(example.prompt.encode()).digest()[:4], "big")
    return texts[number % len(texts)]


def make_row(
    tokenizer: Any,
    example: Example,
    answer: str,
    harmful: bool,
    ends: Sequence[int],
    whole: bool = True,
    given: bool = False,
) -> Row:
    """Tokens of one example; a whole answer ends with the model's first end token.

    Args:
        whole: False if the answer was cut: nothing is learned of how it ends.
        given: the answer is not the base's greedy one.

    Raises:
        DataError: the answer has no tokens.
    """
    prompt, images = encode_prompt(tokenizer, example.messages)
    tokens = _answer_tokens(tokenizer, example, answer, prompt)
    cut = next((index for index, token in enumerate(tokens) if token in set(ends)), None)
    tokens = [*tokens[:cut], *([tokens[cut]] if cut is not None else list(ends)[:1])] if whole else tokens[:cut]
    if not answer.strip() or not tokens:
        raise DataError(f"{example.id}: the answer to learn is empty", "give a response, or leave the field out")
    return Row(tuple(prompt), tuple(tokens), harmful, images, given)


def probe_row(row: Row, refusal: Row) -> Row:
    """A benign row's prompt with the beginning of a refusal for its answer."""
    return replace(row, answer=refusal.answer[:OPENING], given=False, probe=True)


def rival_row(tokenizer: Any, example: Example, row: Row) -> Row:
    """The row with the first token of the example's ``target`` as its rival; as it is without a target."""
    target = example.meta.get("target")
    if not isinstance(target, str) or not target.strip():
        return row
    tokens = _answer_tokens(tokenizer, example, target, list(row.prompt))
    return replace(row, rival=tokens[0]) if tokens and tokens[0] != row.answer[0] else row


def recovery_row(tokenizer: Any, example: Example, row: Row, most: int) -> Row | None:
    """The same refusal, learned after the first tokens of a harmful answer.

    Refusing only as the very first word is shallow: a framing that makes the model begin otherwise gets the rest too
    (Qi et al. 2024, arXiv 2406.05946, whose safety recovery examples these are). The beginning of
    ``example.meta["target"]`` (AdvBench's column of that name) is read, never learned.

    Args:
        row: the example's ordinary row.
        most: 1 to this many tokens of the target, chosen by the prompt's text.

    Returns:
        The row, or None if ``most`` is 0 or the example has no target. Where the example's own row has a rival, its is
        the token with which the target goes on.
    """
    target = example.meta.get("target")
    if not most or not isinstance(target, str) or not target.strip():
        return None
    number = int.from_bytes(hashlib.sha256(example.prompt.encode()).digest()[4:8], "big")
    tokens = _answer_tokens(tokenizer, example, target, list(row.prompt))
    begun, rest = tokens[: 1 + number % most], tokens[1 + number % most :]
    rival = rest[0] if row.rival >= 0 and rest and rest[0] != row.answer[0] else -1
    return replace(row, prompt=(*row.prompt, *begun), rival=rival)


def _answer_tokens(tokenizer: Any, example: Example, answer: str, prompt: list[int]) -> list[int]:
    """The answer's tokens as the model would write them after the prompt, chat template's ending included."""
    text = render(tokenizer, example.messages)
    whole = text + answer
    if getattr(tokenizer, "chat_template", None):
        templated = render(tokenizer, [*example.messages, {"role": "assistant", "content": answer}], False)
        whole = templated if templated.startswith(text) else whole  # some templates rewrite history
    if images_of(example.messages):  # the prompt's tokens are more than its text's
        return list(tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"])
    ids = tokenizer(whole, add_special_tokens=not getattr(tokenizer, "chat_template", None))["input_ids"]
    if list(ids[: len(prompt)]) == prompt:
        return list(ids[len(prompt) :])
    return list(tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"])


def step_rows(rows: Sequence[Row], step: int, batch_size: int, harmful_share: float, seed: int) -> list[Row]:
    """The rows of one step: each class is traversed in shuffled epochs.

    Args:
        rows: of both classes; with one class only, all rows of the step come from it.
        step: from 0.
        batch_size: rows of a step.
        harmful_share: share of harmful ones among them.
        seed: of the shuffles.
    """
    classes = [[row for row in rows if row.harmful is kind] for kind in (True, False)]
    harmful = min(max(round(batch_size * harmful_share), 1), max(batch_size - 1, 1))
    counts = [harmful, batch_size - harmful]
    if not classes[0] or not classes[1]:
        counts = [batch_size if members else 0 for members in classes]
    chosen: list[Row] = []
    for kind, (members, count) in enumerate(zip(classes, counts, strict=True)):
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(members))
            order = np.random.default_rng([seed, kind, epoch]).permutation(len(members))
            chosen.append(members[order[index]])
    return chosen


def make_batch(
    rows: Sequence[Row],
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    multiple: int = 1,
) -> Batch:
    """Rows as one padded batch, their answers marked and their images opened.

    Args:
        rows: prompts with answers.
        pad_id: the token that fills up.
        device: where the tensors go.
        dtype: of the images' pixels.
        multiple: the width is a multiple of this many tokens.
    """
    ids, mask = pad_rows([[*row.prompt, *row.answer] for row in rows], pad_id, device, multiple)
    where = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = len(row.prompt) - 1  # the token before the answer predicts its first
        where[index, start : start + len(row.answer)] = True
    targets = torch.tensor([token for row in rows for token in row.answer], device=device)
    lengths = torch.tensor([len(row.answer) for row in rows])
    harmful, given = (
        torch.tensor([getattr(row, kind) for row in rows]).repeat_interleave(lengths).to(device)
        for kind in ("harmful", "given")
    )
    numbers = torch.arange(len(rows)).repeat_interleave(lengths).to(device)
    inputs = batch_inputs([row.images for row in rows], ids, [0] * len(rows), dtype)
    places = torch.cat([torch.arange(len(row.answer)) for row in rows]).to(device)
    rivals = torch.tensor([row.rival if place == 0 else -1 for row in rows for place in range(len(row.answer))])
    rivals = rivals.to(device)
    return Batch(ids, mask, where.to(device), targets, harmful, given, numbers, places, rivals, tuple(rows), inputs)
