"""Trains the reference model on samples of the corpus: batches, loss on answer tokens, schedule.

A plain single-machine CPU loop, the same for pretraining and for the weak safety stage. It knows
nothing of patches, and it is not meant for other models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nest_runtime.progress import Progress
from nest_runtime.reference.corpus import Sample
from nest_runtime.reference.tokenizer import ASSISTANT, END, SYSTEM, USER

_MARKS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
BATCHES_PER_SORT = 16  # batches drawn together and sorted by length, so that little is padding


@dataclass(frozen=True)
class Stage:
    """Settings of one training stage; ``warmup`` is in steps, the rate decays to a fiftieth by a cosine."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 50
    weight_decay: float = 0.01


def render_prompt(sample: Sample) -> str:
    """The prompt as the chat template writes it, made without the template for speed."""
    turns = [f"{_MARKS[message['role']]}{message['content'].strip()}{END}" for message in sample.messages]
    return "".join(turns) + ASSISTANT


def encode_samples(tokenizer: Any, samples: Sequence[Sample]) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and where the answer starts."""
    prompts = tokenizer([render_prompt(sample) for sample in samples], add_special_tokens=False)["input_ids"]
    answers = tokenizer([sample.answer + END for sample in samples], add_special_tokens=False)["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def train(
    model: Any, rows: list[tuple[list[int], int]], stage: Stage, *, seed: int, progress: Progress | None = None
) -> float:
    """Train every weight of ``model`` on ``rows`` (steps · batch_size of them), in place.

    Returns:
        The mean loss of the last 20 steps, in nats per answer token.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(_batches(rows, stage, seed)):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _rate(step, stage)
        loss = answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(stage.name, step + 1, stage.steps)
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def answer_loss(model: Any, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of a right-padded batch: a scalar, float32.

    The model is causal, so padding is never seen.
    """
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)  # (rows, width)
    answer = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, (ids, start) in enumerate(batch):
        tokens[i, : len(ids)] = torch.tensor(ids)
        answer[i, start : len(ids)] = True
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]  # (rows, width - 1, d)
    wanted = answer[:, 1:]
    return cross_entropy(model.lm_head(hidden[wanted]), tokens[:, 1:][wanted])


def _rate(step: int, stage: Stage) -> float:
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done)))


def _batches(rows: list[tuple[list[int], int]], stage: Stage, seed: int) -> Any:
    """Batches in a seeded order; within a group of batches rows are sorted by length."""
    rng = random.Random(f"batches/{stage.name}/{seed}")
    rows = rows[: stage.steps * stage.batch_size]
    group = BATCHES_PER_SORT * stage.batch_size
    for start in range(0, len(rows), group):
        part = sorted(rows[start : start + group], key=lambda row: len(row[0]))
        batches = [part[i : i + stage.batch_size] for i in range(0, len(part), stage.batch_size)]
        rng.shuffle(batches)
        yield from batches
