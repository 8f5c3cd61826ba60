"""How far two runtimes are apart on the same file: next tokens, logits, and whole greedy answers.

Our runtime goes first: its greedy answers to all prompts, base and patched, are the texts. Along them every position's
logits are compared with what another runtime computes for the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nest_runtime.export import export_gguf
from nest_runtime.export.gguf import ADAPTER
from nest_runtime.model.gguf.header import read_header
from nest_runtime.model.load import LoadedModel, load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import Example, encode, load_examples
from nest_runtime.prompts.generate import end_token_ids, pad_token_id
from nest_runtime.prompts.refusals import is_refusal
from nest_runtime.runtime import PatchRuntime

BASE, PATCHED = "base", "patched"
STATES = {BASE: 0.0, PATCHED: 1.0}  # and the adapter's scale in llama.cpp
TOKENS = 32
BATCH = 16
Logits = Callable[[list[int], int], torch.Tensor]  # ids and the first position → (positions from there on, vocabulary)


def prompts() -> tuple[list[Example], list[Example]]:
    """Harmful ones and harmless ones, 24 of each, drawn evenly from the bundled files; one turn each."""
    harmful = load_examples(bundled("harmful"))
    borderline, orders = load_examples(bundled("validation")), load_examples(bundled("imperatives-validation"))
    return _drawn(harmful, 24), [*_drawn(borderline, 14), *_drawn(orders, 10)]


def _drawn(examples: list[Example], count: int) -> list[Example]:
    return [examples[number * len(examples) // count] for number in range(count)]


@dataclass
class Agreement:
    """What was compared.

    Attributes:
        positions: next tokens compared.
        same: positions at which both have the same likeliest token.
        largest: the largest difference of any logit.
        sum: of the mean differences of the positions.
        margin: where the likeliest differs: the largest lead, in the first one's logits, of its token over the other's.
    """

    positions: int = 0
    same: int = 0
    largest: float = 0.0
    sum: float = 0.0
    margin: float = 0.0

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Compare logits (positions, vocabulary)."""
        assert one.shape == other.shape
        off = (one - other).abs()
        first, second = one.argmax(-1, keepdim=True), other.argmax(-1, keepdim=True)
        self.positions += len(one)
        self.same += int((first == second).sum())
        self.largest = max(self.largest, float(off.max()))
        self.sum += float(off.mean(-1).sum())
        self.margin = max(self.margin, float((one.gather(-1, first) - one.gather(-1, second)).max()))

    @property
    def rate(self) -> float:
        """The share of the same next tokens."""
        return self.same / self.positions

    @property
    def mean(self) -> float:
        """The mean difference of a logit."""
        return self.sum / self.positions

    def __str__(self) -> str:
        share = f"{self.same} of {self.positions} ({100 * self.rate:.1f} %)"
        return f"{share} | {self.largest:.2g} | {self.mean:.2g} | {self.margin:.2g}"


@dataclass
class Subject:
    """One real model with its patch, and our runtime's greedy answers to the prompts, in float32.

    Attributes:
        path: the GGUF file.
        patch: made for it.
        adapter: the patch as a GGUF adapter.
        loaded: the model.
        rows: the prompts' token ids, harmful ones first.
        harmful: how many those are.
        ends: tokens that end an answer.
        answers: by state, the answers' token ids.
    """

    path: Path
    patch: Patch
    adapter: Path
    loaded: LoadedModel
    rows: list[list[int]]
    harmful: int
    ends: list[int]
    answers: dict[str, list[list[int]]] = field(default_factory=dict)

    def text(self, tokens: list[int]) -> str:
        """An answer's words."""
        return str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def refused(self, answers: list[list[int]]) -> list[bool]:
        """Which answers refuse."""
        return [is_refusal(self.text(answer)) for answer in answers]


def subject(path: Path, patch: Patch, work: Path) -> Subject:
    """Load a model in float32, export its patch into ``work``, and let it answer the prompts."""
    export_gguf(patch, work / "adapter", architecture=read_header(path).architecture)
    loaded = load_model(path, device="cpu", dtype="float32")
    harmful, harmless = prompts()
    rows = [encode(loaded.tokenizer, example.messages) for example in [*harmful, *harmless]]
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    made = Subject(path, patch, work / "adapter" / ADAPTER, loaded, rows, len(harmful), ends)
    for state in STATES:
        with ours(loaded, patch, state):
            made.answers[state] = greedy(loaded, rows, ends)
    return made


@contextmanager
def ours(loaded: LoadedModel, patch: Patch, state: str) -> Iterator[None]:
    """Our runtime in a state."""
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        runtime.add(patch)
        if state == PATCHED:
            runtime.activate(patch.version, mode="hook")
        yield


def greedy(loaded: LoadedModel, rows: list[list[int]], ends: list[int]) -> list[list[int]]:
    """Greedy answers in token ids, without those that end them, in the order of the prompts."""
    found: dict[int, list[int]] = {}
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    pad = pad_token_id(loaded.model, loaded.tokenizer)
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        width = max(len(rows[number]) for number in numbers)
        ids = torch.full((len(numbers), width), pad)
        mask = torch.zeros_like(ids)
        for line, number in enumerate(numbers):
            ids[line, width - len(rows[number]) :] = torch.tensor(rows[number])
            mask[line, width - len(rows[number]) :] = 1
        with torch.no_grad():
            out = loaded.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, eos_token_id=ends, pad_token_id=pad
            )
        for number, answer in zip(numbers, out[:, width:].tolist(), strict=True):
            found[number] = answer[: next((k for k, token in enumerate(answer) if token in ends), TOKENS)]
    return [found[number] for number in range(len(rows))]


def logits_of(model: Any) -> Logits:
    """Our model's logits, as it is now."""

    def logits(ids: list[int], first: int) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, first:].float()

    return logits


def compared(found: Subject, state: str, one: Logits, other: Logits) -> Agreement:
    """Two runtimes along the answers of a state: behind each prompt, and behind each token of its answer."""
    agreement = Agreement()
    for row, answer in zip(found.rows, found.answers[state], strict=True):
        ids, first = [*row, *answer], len(row) - 1
        agreement.add(one(ids, first), other(ids, first))
    return agreement
