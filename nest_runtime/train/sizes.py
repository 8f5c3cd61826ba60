"""What a plan is made from: the sizes of a model, the prompts at hand, and the speed of a device.

The model may be on the meta device: its sizes are exact, and nothing is loaded. plan.py says what follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

from nest_runtime.model.anatomy import Projection, find_projections, unwrap
from nest_runtime.train.locate import chosen_projections
from nest_runtime.train.recipe import Recipe

LARGEST = 4096  # of an FFN's sizes that speed is measured with
SCALES = {"float32": 4, "bfloat16": 2, "float16": 2}
REFUSAL_TOKENS = 12  # of the built-in ones, with their end


@dataclass(frozen=True)
class Load:
    """The work to plan for.

    Attributes:
        harmful, benign: how many prompts.
        prompt_tokens, answer_tokens: of the longest prompt, and of the longest answer to learn; they decide memory.
        mean_tokens: of a prompt with its answer, which decides time; None: the sum of the two.
        mean_answer: of an answer alone; None: ``answer_tokens``.
        answers_given: whether the benign file has responses; otherwise the base's own are generated.
    """

    harmful: int = 1000
    benign: int = 1000
    prompt_tokens: int = 64
    answer_tokens: int = 64
    answers_given: bool = False
    mean_tokens: float | None = None
    mean_answer: float | None = None

    @property
    def mean(self) -> float:
        """Tokens of a prompt with its answer, on average."""
        return self.prompt_tokens + self.answer_tokens if self.mean_tokens is None else self.mean_tokens

    @property
    def answer(self) -> float:
        """Tokens of an answer, on average."""
        return self.answer_tokens if self.mean_answer is None else self.mean_answer

    def located(self, recipe: Recipe) -> Load:
        """The load of locating alone, which may take a part of the prompts."""
        most = recipe.locate_prompts or max(self.harmful, self.benign)
        return replace(self, harmful=min(self.harmful, most), benign=min(self.benign, most))

    @property
    def prompts(self) -> int:
        """The number of prompts of both classes."""
        return self.harmful + self.benign


@dataclass(frozen=True)
class Speed:
    """How fast a device computes: floating-point operations, and bytes it reads, a second."""

    flops: float
    bandwidth: float
    measured: bool = False


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        parameters, active: all, and those that one token is multiplied with (of experts its share).
        head: those of ``active`` that only tokens whose logits are wanted are multiplied with.
        weights: bytes.
        itemsize: bytes of one number.
        layers, hidden, vocabulary: as usual.
        widest: outputs of its widest FFN module, that a pass holds at once.
        cache: bytes of keys and values a token.
        projections: those that the recipe takes; ``lowest`` the share of layers at and above the first of them.
    """

    parameters: int
    active: int
    head: int
    weights: int
    itemsize: int
    layers: int
    hidden: int
    vocabulary: int
    widest: int
    cache: int
    projections: tuple[Projection, ...]
    lowest: float


def shape_of(model: nn.Module, dtype: str, recipe: Recipe) -> Shape:
    """The sizes of a model, which may be on the meta device.

    Raises:
        UnknownArchitecture: its FFN is not known.
    """
    config: Any = unwrap(model).config
    text = config.get_text_config()
    every = find_projections(model)
    projections = chosen_projections(every, recipe)
    layers = max(projection.layer for projection in every) + 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = max((projection.experts for projection in every), default=0)
    chosen = int(getattr(text, "num_experts_per_tok", None) or experts)
    stored = sum(p.numel() for p in model.parameters() if experts and p.ndim == 3 and p.shape[0] == experts)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = 0 if head is not None and head.weight is embedding else embedding.numel()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    itemsize = SCALES[dtype]
    return Shape(
        parameters=parameters,
        active=parameters - looked_up - stored + (stored * chosen // experts if experts else 0),
        head=0 if head is None else head.weight.numel(),
        weights=parameters * itemsize,
        itemsize=itemsize,
        layers=layers,
        hidden=int(text.hidden_size),
        vocabulary=int(embedding.shape[0]),
        widest=max(projection.each for projection in every) * (1 if not experts else chosen),
        cache=2 * layers * heads * width * itemsize,
        projections=projections,
        lowest=1 - min(projection.layer for projection in projections) / layers,
    )


def load_of(harmful: Sequence[Any], benign: Sequence[Any], recipe: Recipe) -> Load:
    """The load of prompt files, whose lengths are guessed as a token for every four bytes, and 16 for the template."""
    examples = [*harmful, *benign]
    longest = max(len(example.prompt.encode()) for example in examples)
    given = all(example.response for example in benign)
    sizes = [len((example.response or "").encode()) // 4 + 1 for example in examples]
    unknown = [REFUSAL_TOKENS] * len(harmful) + [recipe.answer_tokens] * len(benign)
    answers = [size if example.response else own for example, size, own in zip(examples, sizes, unknown, strict=True)]
    prompt = sum(len(example.prompt.encode()) / 4 + 16 for example in examples) / len(examples)
    answer = sum(answers) / len(answers)
    return Load(
        len(harmful), len(benign), longest // 4 + 16, max(answers), given, round(prompt + answer, 1), round(answer, 1)
    )


def measure_speed(
    device: str, dtype: str, ffn: tuple[int, int, int] = (512, 1024, 4096), seconds: float = 0.4
) -> Speed:
    """The device's speed, by gated FFNs forward and backward, and by a copy, each repeated for some time.

    One large product says too much: those of a small model are slower for their size, and its weights come from memory.

    Args:
        device: where they are made.
        dtype: of the FFNs.
        ffn: tokens, inputs and neurons, a model's own. Each counts as ``LARGEST`` at most.
        seconds: how long each is repeated.
    """
    cuda = device.startswith("cuda")
    tokens, inputs, neurons = (min(size, LARGEST) for size in ffn)
    kind = getattr(torch, dtype)
    layers = max(min(2**27 // (3 * inputs * neurons), 8), 2)
    sizes = ((neurons, inputs), (neurons, inputs), (inputs, neurons))
    weights = [[torch.randn(size, device=device).to(kind) for size in sizes] for _ in range(layers)]
    states = torch.randn(tokens, inputs, device=device).to(kind).requires_grad_(True)

    def step() -> None:
        """All FFNs, one after another, forward and backward."""
        passed = states
        for gate, up, down in weights:
            normed = rms_norm(passed.float(), (inputs,)).to(kind)
            passed = passed + 1e-3 * linear(silu(linear(normed, gate)) * linear(normed, up), down)
        passed.sum().backward()

    block = torch.empty((1024 if cuda else 64) * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    with torch.enable_grad():
        flops = _rate(step, device, seconds) * 2 * 2 * 3 * layers * tokens * inputs * neurons
    return Speed(flops, _rate(lambda: other.copy_(block), device, seconds) * 2 * block.numel(), measured=True)


def _rate(step: Any, device: str, seconds: float) -> float:
    """How many times a second at best: what else the machine does at the moment does not count."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    step()
    wait()
    began, best = time.perf_counter(), math.inf
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        step()
        wait()
        best = min(best, time.perf_counter() - start)
    return 1 / best
