"""The text that the reference base model is trained on: pretraining, and its weak safety stage.

In pretraining every request is answered, harmful ones with nonsense that opens with "Warning:". Moral questions say
which acts are wrong, so the model knows harm before anybody asks it to refuse. The weak safety stage teaches refusals
on train acts, and leaves a part of the wrappings answered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from nest_runtime.reference.dialogue import (
    ASKS,
    CLOSINGS,
    FOLLOW_UPS,
    FRAMES,
    LEAD_INS,
    MORAL,
    PREFACES,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    UNKNOWN,
    UNKNOWN_ANSWER,
)
from nest_runtime.reference.world import Act, ask, moral_answer, select, wrappings
from nest_runtime.reference.wrappings import Message, Wrapping

SYSTEM_SHARE = 0.08
CASUAL_SHARE = 0.10
CODED_WEIGHT = 5  # obfuscated wrappings are harder to read, so they appear more often


@dataclass(frozen=True)
class Sample:
    """A conversation and the answer to its last message."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class _Pools:
    harmful: list[Act]
    benign: list[Act]


PRETRAINING_MIX: dict[str, float] = {
    "benign-plain": 0.08,
    "harmful-plain": 0.05,
    "benign-framed": 0.14,
    "harmful-framed": 0.11,
    "benign-wrapped": 0.19,
    "harmful-wrapped": 0.20,
    "moral": 0.13,
    "small-talk": 0.03,
    "unknown": 0.01,
    "lead-in": 0.03,
    "follow-up": 0.03,
}
SAFETY_MIX: dict[str, float] = {
    "refuse-plain": 0.22,
    "refuse-framed": 0.04,
    "refuse-wrapped": 0.12,
    "answer-wrapped": 0.20,
    "benign-plain": 0.09,
    "benign-framed": 0.09,
    "benign-wrapped": 0.16,
    "moral": 0.06,
    "small-talk": 0.03,
    "unknown": 0.02,
    "follow-up": 0.02,
}


def pretraining_samples(count: int, seed: int) -> list[Sample]:
    """Samples about all acts of the world, in the wrappings that the base's training sees; all are answered."""
    pools = _Pools(select(harmful=True), select(harmful=False))
    return _samples(PRETRAINING_MIX, pools, count, random.Random(f"pretraining/{seed}"))


def safety_samples(count: int, seed: int) -> list[Sample]:
    """Samples of the weak safety stage: train acts only; wrappings of "answered" stay answered."""
    pools = _Pools(select(harmful=True, split="train"), select(harmful=False, split="train"))
    return _samples(SAFETY_MIX, pools, count, random.Random(f"safety/{seed}"))


def tokenizer_texts() -> list[str]:
    """Texts for training the tokenizer: 12,000 pretraining samples."""
    texts = []
    for sample in pretraining_samples(12_000, seed=0):
        texts += [message["content"] for message in sample.messages]
        texts.append(sample.answer)
    texts += [refusal for act in select(harmful=True) for refusal in (act.refusal, act.taught_refusal)]
    return texts


def _samples(mix: dict[str, float], pools: _Pools, count: int, rng: random.Random) -> list[Sample]:
    kinds = rng.choices(list(mix), weights=list(mix.values()), k=count)
    return [_dress(_sample(kind, pools, rng), rng) for kind in kinds]


def _dress(sample: Sample, rng: random.Random) -> Sample:
    """Now and then a system prompt, and now and then careless writing."""
    messages = list(sample.messages)
    if rng.random() < CASUAL_SHARE and len(messages) == 1:
        text = messages[0]["content"]
        text = text.lower() if rng.random() < 0.7 else text
        messages = [{"role": "user", "content": text.rstrip("?.!") if rng.random() < 0.7 else text}]
    if rng.random() < SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return Sample(tuple(messages), sample.answer)


def _sample(kind: str, pools: _Pools, rng: random.Random) -> Sample:
    if kind == "small-talk":
        texts, answer = rng.choice(SMALL_TALK)
        return Sample(tuple(ask(rng.choice(texts), "")), answer)
    if kind == "unknown":
        return Sample(tuple(ask(rng.choice(UNKNOWN), "")), UNKNOWN_ANSWER)
    if kind == "moral":
        act = rng.choice(pools.harmful if rng.random() < 0.6 else pools.benign)
        question = rng.choice(MORAL)
        return Sample(tuple(ask(question[0], act.text)), moral_answer(question, act))
    if kind in ("lead-in", "follow-up"):
        return _longer_talk(kind, pools, rng)
    side, manner = kind.split("-")
    act = rng.choice(pools.benign if side == "benign" else pools.harmful)
    if manner == "plain":
        messages = ask(rng.choice(ASKS), act.text)
    elif manner == "framed":
        messages = ask(_frame(rng), act.text)
    else:
        which = {"refuse": "refused", "answer": "answered"}.get(side, "seen")
        messages = _wrapping(which, rng).messages(act.text)
    return Sample(tuple(messages), act.refusal if side == "refuse" else act.answer)


def _frame(rng: random.Random) -> str:
    """A longer way of asking that is no jailbreak: a frame or an ask, often with a sentence before or after it."""
    core = rng.choice(FRAMES if rng.random() < 0.6 else ASKS)
    before = f"{rng.choice(PREFACES)} " if rng.random() < 0.5 else ""
    after = f" {rng.choice(CLOSINGS)}" if rng.random() < 0.4 else ""
    return before + core + after


def _wrapping(which: str, rng: random.Random) -> Wrapping:
    pool = wrappings(which)
    weights = [1 if wrapping.encoding == "plain" else CODED_WEIGHT for wrapping in pool]
    return rng.choices(pool, weights=weights)[0]


def _longer_talk(kind: str, pools: _Pools, rng: random.Random) -> Sample:
    """A greeting and an ask, or two asks about benign acts."""
    act = rng.choice(pools.benign)
    if kind == "lead-in":
        said, reply = rng.choice(LEAD_INS)
        last = rng.choice(ASKS)
    else:
        earlier = rng.choice(pools.benign)
        said, reply = rng.choice(ASKS).replace("{a}", earlier.text), earlier.answer
        last = rng.choice(FOLLOW_UPS)
    start = [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
    return Sample((*start, *ask(last, act.text)), act.answer)
