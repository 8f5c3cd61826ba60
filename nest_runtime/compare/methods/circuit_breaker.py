"""Circuit breakers: representation rerouting (Zou et al. 2024, arXiv 2406.04313) with LoRA by PEFT.

    loss = α·p · ‖h − h₀‖₂ / ‖h₀‖₂ over retained tokens, all layers
         + α·(1 − p) · ReLU(cos(h, h₀)) over harmful tokens, two middle layers,          p = step / (2 · steps)

h are the hidden states with the adapters on, h₀ the base's. Layers 10 and 20 of the published 32 are scaled to
the model's depth; α, rank and modules are the published ones; steps and batch are the comparison's. The distance is
relative to the length of h₀, which the published one is not. The published weight suits hidden states of one size. On
the reference model it kept everything where it was (the cosine stayed above 0.99 at every learning rate tried).

As published, harmful requests with harmful answers are rerouted where the training data bring the answers
(``target``, as in AdvBench), else the requests alone; ordinary exchanges and refusals are retained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nest_runtime.compare.methods.base import FitData, Learned, Method, Target
from nest_runtime.compare.methods.lora import (
    adapter_parameters,
    attention_modules,
    ffn_modules,
    injected,
    loaded,
    save_adapter,
)
from nest_runtime.errors import TrainingError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.progress import Progress
from nest_runtime.prompts.generate import end_token_ids, pad_token_id
from nest_runtime.train.batches import make_row, step_rows
from nest_runtime.train.forward import device_of, hidden_states, pad_rows
from nest_runtime.train.recipe import Recipe

RANK = 16
ALPHA_LORA = 16
DROPOUT = 0.05
ALPHA_LOSS = 10.0
PUBLISHED_DEPTH, PUBLISHED_TARGETS = 32, (10, 20)
_OTHERS = ("k_proj", "o_proj", "down_proj")


@dataclass(frozen=True)
class BreakerText:
    """Tokens to reroute (harmful) or to retain from ``kept_from`` on."""

    tokens: tuple[int, ...]
    harmful: bool
    kept_from: int = 0


class CircuitBreaker(Method):
    """Representation rerouting of harmful exchanges."""

    name = "circuit-breaker"
    title = "circuit breakers"
    place = 50
    look = ("#CC79A7", "X")
    needs = ("peft",)
    knob = "lr"
    grid = (1e-3, 3e-3, 1e-2, 3e-2)
    fallback = 1e-4

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Train the adapters; the last state ships, as published: the loss's two weights change with every step."""
        layers = target_layers(int(target.model.config.num_hidden_layers))
        names, adapted = modules(target.model), range(layers[-1] + 1)
        with injected(
            target.model, names, RANK, ALPHA_LORA, recipe.seed, dropout=DROPOUT, layers=adapted
        ) as peft_model:
            texts = make_texts(target, data)
            history = reroute(peft_model, target.tokenizer, texts, recipe, value, layers, progress)
            trainable = sum(parameter.numel() for parameter in adapter_parameters(peft_model).values())
            save_adapter(peft_model, folder, getattr(torch, recipe.delta_dtype))
        report = {"steps": recipe.steps, "layers": list(layers), "modules": names, "rank": RANK, "history": history}
        return Learned(folder, report, trainable, switch=lambda: loaded(target.model, folder))


def target_layers(depth: int) -> tuple[int, ...]:
    """The two rerouted layers (numbers of decoder layers), scaled from 10 and 20 of 32; one in very flat models."""
    scaled = {min(max(round(layer * depth / PUBLISHED_DEPTH), 1), depth) for layer in PUBLISHED_TARGETS}
    return tuple(sorted(layer - 1 for layer in scaled))


def modules(model: Any) -> list[str]:
    """Leaf names of what gets an adapter: all projections of attention and FFN that the architecture has."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted({*attention_modules(model), *ffn_modules(model), *(name for name in _OTHERS if name in leaves)})


def make_texts(target: Target, data: FitData) -> list[BreakerText]:
    """Rerouted: harmful prompts with their targets. Retained: benign exchanges, and the tokens of refusals."""
    ends = end_token_ids(target.model, target.tokenizer)
    texts = []
    for example in data.train_harmful:
        refusal = make_row(target.tokenizer, example, example.response or "", True, ends)
        answer = example.meta.get("target")
        harm = make_row(target.tokenizer, example, answer, True, ends).answer if isinstance(answer, str) else ()
        texts.append(BreakerText((*refusal.prompt, *harm), True))
        texts.append(BreakerText((*refusal.prompt, *refusal.answer), False, len(refusal.prompt)))
    return texts + [BreakerText((*row.prompt, *row.answer), False) for row in data.train if not row.harmful]


def reroute(
    peft_model: Any,
    tokenizer: Any,
    texts: Sequence[BreakerText],
    recipe: Recipe,
    lr: float,
    layers: Sequence[int],
    progress: Progress | None,
) -> list[dict[str, float]]:
    """Train the adapters in place at a constant learning rate.

    Args:
        peft_model: the base with its adapters.
        tokenizer: its tokenizer.
        texts: rerouted and retained.
        recipe: steps, batch size and seed count.
        lr: the learning rate.
        layers: whose representations are rerouted.
        progress: called as (stage, done, total).

    Returns:
        The losses every ``validate_every`` steps.
    """
    parameters = list(adapter_parameters(peft_model).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    pad, device = pad_token_id(peft_model, tokenizer), device_of(peft_model)
    history: list[dict[str, float]] = []
    peft_model.eval()
    _dropout(peft_model, True)
    for step in range(recipe.steps):
        chosen: list[Any] = step_rows(texts, step, recipe.batch_size, recipe.harmful_share, recipe.seed)  # type: ignore[arg-type]
        ids, mask = pad_rows([text.tokens for text in chosen], pad, device)
        moved, kept = (part.to(device) & mask.bool() for part in _roles(chosen, ids.shape[1]))
        optimizer.zero_grad()
        with torch.enable_grad():
            retain, reroute_loss = losses(peft_model, ids, mask, moved, kept, layers)
            share = step / (2 * recipe.steps)
            loss = ALPHA_LOSS * (share * retain + (1 - share) * reroute_loss)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(f"the loss is {float(loss.detach())} at step {step}", "lower lr")
        loss.backward()
        if recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
        optimizer.step()
        if (step + 1) % recipe.validate_every == 0 or step in (0, recipe.steps - 1):
            history.append(
                {"step": step + 1, "retain": float(retain.detach()), "reroute": float(reroute_loss.detach())}
            )
        if progress is not None:
            progress("tune", step + 1, recipe.steps)
    _dropout(peft_model, False)
    return history


def losses(
    peft_model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    moved: torch.Tensor,
    kept: torch.Tensor,
    layers: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms, unweighted.

    Args:
        peft_model: with the adapters on.
        ids, mask: (rows, width).
        moved, kept: (rows, width) bool: the tokens to reroute, and those to retain.
        layers: decoder layers to reroute at.

    Returns:
        Mean relative L2 distance of retained tokens over all layers; mean ReLU of rerouted ones' cosine at ``layers``.
    """
    with torch.no_grad(), peft_model.disable_adapter():
        before = _hidden(peft_model, ids, mask)
    after = _hidden(peft_model, ids, mask)  # (layers, rows, width, d)
    zero = after.new_zeros(())
    retain = _relative_distance(after[:, kept], before[:, kept]) if bool(kept.any()) else zero
    if not bool(moved.any()):
        return retain, zero
    chosen = list(layers)
    cosine = torch.nn.functional.cosine_similarity(after[chosen][:, moved], before[chosen][:, moved], dim=-1)
    return retain, torch.relu(cosine).mean()


def _relative_distance(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return ((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-6)).mean()


def _roles(texts: Sequence[BreakerText], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) bool each: tokens to reroute, tokens to retain; padding not yet left out."""
    harmful = torch.tensor([text.harmful for text in texts])[:, None]
    first = torch.tensor([text.kept_from for text in texts])[:, None]
    places = torch.arange(width)[None, :]
    return harmful.expand(-1, width), ~harmful & (places >= first)


def _dropout(peft_model: Any, on: bool) -> None:
    """The adapters' dropout on or off; the base stays in eval mode."""
    for name, module in peft_model.named_modules():
        if name.rpartition(".")[2] == "lora_dropout":
            module.train(on)


def _hidden(peft_model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every decoder layer's output, float32 (layers, rows, width, d), read by hooks that go away again."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(peft_model)]
    try:
        hidden_states(peft_model, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found).float()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers, in order: the modules that hold the FFN projections."""
    paths = {p.layer: re.match(r".*?\.\d+(?=\.)", p.module) for p in find_projections(model)}
    return [model.get_submodule(path.group()) for _, path in sorted(paths.items()) if path is not None]
