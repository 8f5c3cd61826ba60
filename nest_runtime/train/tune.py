"""Tuning: learn the cluster rows by supervised fine-tuning, everything else frozen.

NeST step 3: refusals to harmful prompts, the base's own answers to benign ones, cross-entropy on answer
tokens only. Gradients start at the lowest patched layer (nothing below needs any) and logits are
computed at answer tokens only. The trained numbers are float32 on a base of any dtype.
Checkpoints hold everything a rerun needs to give the same bits. Several processes (workers.py) share each
step's rows: every one adds up its part of the same loss, so that the sum of their gradients is one process's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from nest_runtime.errors import TrainingError
from nest_runtime.generate import pad_token_id
from nest_runtime.train.batches import Batch, Row, make_batch, step_rows
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.files import read_tensors, write_tensors
from nest_runtime.train.forward import Readout, device_of, dtype_of, length_batches
from nest_runtime.train.settings import Recipe
from nest_runtime.train.workers import Workers

Progress = Callable[[str, int, int], None]
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class TuneResult:
    """What tuning gave; the numbers themselves are in the Deltas that were tuned.

    Attributes:
        before, after: validation figures of the base (or the parent) and of the result as shipped:
            loss per answer token and share of rows whose every answer token is the likeliest, by class.
        history: one entry per validation: step, training loss, validation figures.
        best_step: the step whose state was kept.
        steps: steps made; fewer than asked after an early stop.
    """

    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    steps: int = 0


@dataclass
class _State:
    """Where a run stands: everything in it is in the checkpoint."""

    step: int = 0
    best_step: int = 0
    best_score: float = math.inf
    stale: int = 0
    stopped: bool = False
    before: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def tune(
    model: Any,
    tokenizer: Any,
    deltas: Deltas,
    train: Sequence[Row],
    validation: Sequence[Row],
    settings: Recipe,
    *,
    workdir: Path | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Train ``deltas`` in place and leave the best state in them, rounded to ``delta_dtype``.

    Args:
        model: the base; its weights are frozen meanwhile and never change.
        tokenizer: for the padding token.
        deltas: from zero, or warm-started from a parent.
        train: rows of both classes.
        validation: held-out rows; without any, the last state is kept.
        settings: the recipe; its tune fields count.
        workdir: keep a checkpoint here at every validation, and go on from one found.
        workers: the processes that share the rows; None is this one alone. All end with the same numbers.
        progress: called as ``("tune", done, total)``.

    Raises:
        TrainingError: nothing to train, or the loss is no longer finite.
    """
    if not deltas.parts:
        raise TrainingError("no neurons were located in any projection", "lower z, or give more prompts")
    if not train:
        raise TrainingError("no rows to train on", "give harmful and benign prompts")
    optimizer, state, team = _optimizer(deltas, settings), _State(), workers or Workers()
    best = deltas.copy()
    path = workdir / CHECKPOINT if workdir else None
    with _frozen(model), deltas.attached():
        readout, pad = Readout(model), pad_token_id(tokenizer)
        loaded = _load(path, deltas, optimizer)
        team.wait()  # nobody writes a checkpoint while another still reads one
        if loaded is not None:
            state, best = loaded
        else:
            state.before = measure(readout, pad, validation, settings, team)
        while state.step < settings.steps and not state.stopped:
            rows = step_rows(train, state.step, settings.batch_size, settings.harmful_share, settings.seed)
            state.losses.append(_step(readout, deltas, optimizer, rows, pad, settings, state.step, team))
            state.step += 1
            if state.step % settings.validate_every == 0 or state.step == settings.steps:
                best = _validate(readout, pad, deltas, validation, settings, state, best, team)
                if path is not None and team.main:
                    _save(path, deltas, optimizer, state, best)
            if progress is not None:
                progress("tune", state.step, settings.steps)
        deltas.load(best)
        deltas.round_to(getattr(torch, settings.delta_dtype))
        after = measure(readout, pad, validation, settings, team)
    return TuneResult(state.before, after, state.history, state.best_step, state.step)


def measure(
    readout: Readout, pad: int, rows: Sequence[Row], settings: Recipe, workers: Workers | None = None
) -> dict[str, float]:
    """Loss per answer token and share of rows answered token for token, by class; empty without rows."""
    team = workers or Workers()
    totals: dict[str, list[float]] = {"harmful": [0.0, 0.0, 0.0, 0.0], "benign": [0.0, 0.0, 0.0, 0.0]}
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    for positions in team.share(length_batches(lengths, settings.prompt_batch, settings.batch_tokens)):
        batch = make_batch([rows[index] for index in positions], pad, device_of(readout.model), dtype_of(readout.model))
        with torch.no_grad():
            logits = readout.logits(batch.ids, batch.mask, batch.where, batch.inputs)
        losses = cross_entropy(logits, batch.targets, reduction="none")
        wrong = torch.zeros(len(positions), device=losses.device)
        wrong.index_add_(0, batch.row, (logits.argmax(-1) != batch.targets).float())
        for kind, chosen in (("harmful", batch.harmful), ("benign", ~batch.harmful)):
            exact = [float(wrong[i] == 0) for i, p in enumerate(positions) if rows[p].harmful == (kind == "harmful")]
            for place, value in enumerate((float(losses[chosen].sum()), int(chosen.sum()), sum(exact), len(exact))):
                totals[kind][place] += value
    figures = {}
    for kind, sums in totals.items():
        loss, tokens, right, count = team.sum(sums)
        if count:
            figures[f"{kind}_loss"], figures[f"{kind}_exact"] = loss / tokens, right / count
    return figures


def _step(
    readout: Readout,
    deltas: Deltas,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    pad: int,
    settings: Recipe,
    step: int,
    team: Workers,
) -> float:
    """One step on some rows, of which this process takes its share; gives the loss over all of them."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor(step, settings)
    optimizer.zero_grad()
    share, loss = team.share(rows), None
    if share:
        batch = make_batch(share, pad, device_of(readout.model), dtype_of(readout.model))
        with torch.enable_grad():
            loss = loss_of(readout, deltas, batch, settings, answer_counts(rows))
    value = team.sum([0.0 if loss is None else float(loss.detach())])[0]
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} at step {step}", "lower lr, or train in bfloat16 or float32")
    if loss is not None:
        loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    team.sum_gradients(parameters)
    if settings.grad_clip:
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
    optimizer.step()
    return value


def answer_counts(rows: Sequence[Row]) -> tuple[int, int]:
    """Answer tokens of the harmful and of the benign rows."""
    harmful, benign = (sum(len(row.answer) for row in rows if row.harmful is kind) for kind in (True, False))
    return harmful, benign


def loss_of(
    readout: Readout, deltas: Deltas, batch: Batch, settings: Recipe, counts: tuple[int, int] | None = None
) -> torch.Tensor:
    """Mean cross-entropy of each class's answer tokens, added up, and kl_weight · KL(base ‖ patched) on benign ones.

    Args:
        readout, deltas, settings: as in ``tune``.
        batch: rows.
        counts: harmful and benign answer tokens of the whole step, where the batch is one process's share of it: the
            shares' losses then add up to the step's. None: the batch is the step.
    """
    whole = counts or (int(batch.harmful.sum()), int((~batch.harmful).sum()))
    logits = readout.logits(batch.ids, batch.mask, batch.where, batch.inputs)  # (answer tokens, vocabulary)
    losses = cross_entropy(logits, batch.targets, reduction="none")
    loss = logits.new_zeros(())
    for chosen, count in zip((batch.harmful, ~batch.harmful), whole, strict=True):
        if bool(chosen.any()):
            loss = loss + losses[chosen].sum() / count
    benign = ~batch.harmful
    if settings.kl_weight and bool(benign.any()):
        deltas.enabled = False
        try:
            with torch.no_grad():
                base = log_softmax(readout.logits(batch.ids, batch.mask, batch.where, batch.inputs)[benign], dim=-1)
        finally:
            deltas.enabled = True
        patched = log_softmax(logits[benign], dim=-1)
        loss = loss + settings.kl_weight * kl_div(patched, base, log_target=True, reduction="sum") / whole[1]
    return loss


def lr_factor(step: int, settings: Recipe) -> float:
    """Share of the full learning rate at a step: a linear warm-up, then the schedule, down to 2 % at the end."""
    warm = settings.warmup * settings.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - warm) / max(settings.steps - warm, 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return max(falling, 0.02)


def _validate(
    readout: Readout,
    pad: int,
    deltas: Deltas,
    validation: Sequence[Row],
    settings: Recipe,
    state: _State,
    best: dict[str, torch.Tensor],
    team: Workers,
) -> dict[str, torch.Tensor]:
    """Measure, note, and give the best state so far; without validation rows that is the present one."""
    figures = measure(readout, pad, validation, settings, team)
    loss = sum(state.losses) / max(len(state.losses), 1)
    state.history.append({"step": state.step, "loss": loss, **figures})
    state.losses = []
    score = sum(value for key, value in figures.items() if key.endswith("_loss"))
    if not figures or score < state.best_score:
        state.best_score, state.best_step, state.stale = score, state.step, 0
        return deltas.copy()
    state.stale += 1
    state.stopped = bool(settings.patience) and state.stale >= settings.patience
    return best


def _optimizer(deltas: Deltas, settings: Recipe) -> torch.optim.Optimizer:
    """One group per tensor, so that row-rms learning rates can differ by site."""
    groups = []
    for part in deltas.parts:
        unit = part.scale if settings.lr_unit == "row-rms" else 1.0
        groups.append({"params": [part.deltas], "lr": settings.lr * unit, "weight_decay": settings.weight_decay})
        if part.loadings is not None and part.loadings.requires_grad:
            groups.append({"params": [part.loadings], "lr": settings.loadings_lr, "weight_decay": 0.0})
    for group in groups:
        group["base_lr"] = group["lr"]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter of the model takes gradients, and dropout is off; both as before afterwards."""
    flags, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _save(
    path: Path, deltas: Deltas, optimizer: torch.optim.Optimizer, state: _State, best: dict[str, torch.Tensor]
) -> None:
    tensors = {f"now.{name}": tensor for name, tensor in deltas.tensors.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    notes = {**vars(state), "best_score": state.best_score if math.isfinite(state.best_score) else None}
    write_tensors(path, tensors, notes)


def _load(
    path: Path | None, deltas: Deltas, optimizer: torch.optim.Optimizer
) -> tuple[_State, dict[str, torch.Tensor]] | None:
    found = read_tensors(path) if path is not None else None
    if found is None:
        return None
    tensors, notes = found
    parts: dict[str, dict[str, torch.Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        parts[kind][name] = tensor
    saved = optimizer.state_dict()
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, key = name.partition(".")
        entries.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})
    deltas.load(parts["now"])
    score = math.inf if notes["best_score"] is None else notes["best_score"]
    return _State(**{**notes, "best_score": score}), parts["best"]
