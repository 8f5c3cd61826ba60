"""Tuning: learn the cluster rows by supervised fine-tuning, everything else frozen.

NeST step 3: refusals to harmful prompts, the base's own answers to benign ones; objective.py says what is minimized.
Gradients start at the lowest patched layer (the layers below run once, lower.py) and logits are computed at
answer tokens only, slice by slice. The trained numbers are float32 on a base of any dtype.
Checkpoints hold everything a rerun needs to give the same bits. Several processes (workers.py) share each
step's rows: every one adds up its part of the same loss, so that the sum of their gradients is one process's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nest_runtime.errors import TrainingError
from nest_runtime.heap import Trimmer
from nest_runtime.progress import Progress
from nest_runtime.prompts.generate import pad_token_id
from nest_runtime.train.batches import OPENING, Batch, Row, step_rows
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.forward import tuning_attention
from nest_runtime.train.objective import ONSET, BaseAnswer, margin, token_loss
from nest_runtime.train.passes import Passes
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.stages import read_tensors, write_tensors
from nest_runtime.train.workers import Workers

CHECKPOINT = "checkpoint.safetensors"
KEEP_SECONDS = 15.0  # of steps that an interrupt may cost


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
class _TuneState:
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
        workdir: keep a checkpoint here at every validation and every ``KEEP_SECONDS``, and continue from one found.
        workers: the processes that share the rows; None is this one alone. All end with the same numbers.
        progress: called as ``("tune", done, total)``.

    Raises:
        TrainingError: nothing to train, or the loss is no longer finite.
    """
    if not deltas.sites:
        raise TrainingError("no neurons were located in any projection", "lower z, or give more prompts")
    if not train:
        raise TrainingError("no rows to train on", "give harmful and benign prompts")
    optimizer, state, team = _optimizer(deltas, settings), _TuneState(), workers or Workers()
    best = deltas.copy()
    path = workdir / CHECKPOINT if workdir else None
    trimmer, kept = Trimmer(), time.monotonic()
    with _frozen(model), deltas.attached():
        passes = Passes(model, deltas, pad_token_id(model, tokenizer), settings)
        passes.prepare(train)
        loaded = _load(path, deltas, optimizer)
        team.wait()  # nobody writes a checkpoint while another still reads one
        if loaded is not None:
            state, best = loaded
        else:
            state.before = measure(passes, validation, team)
        while state.step < settings.steps and not state.stopped:
            rows = step_rows(train, state.step, settings.batch_size, settings.harmful_share, settings.seed)
            state.losses.append(_step(passes, optimizer, rows, state.step, team))
            state.step += 1
            trimmer.step_done()
            validated = state.step % settings.validate_every == 0 or state.step == settings.steps
            if validated:
                best = _validate(passes, validation, state, best, team)
            if path is not None and team.main and (validated or time.monotonic() - kept >= KEEP_SECONDS):
                _save(path, deltas, optimizer, state, best)
                kept = time.monotonic()
            if progress is not None:
                progress("tune", state.step, settings.steps)
        deltas.load(best)
        if settings.mask_weight:
            deltas.mask()
        deltas.scale(settings.strength)
        deltas.round_to(getattr(torch, settings.delta_dtype))
        after = measure(passes, validation, team)
    return TuneResult(state.before, after, state.history, state.best_step, state.step)


def _parts(rows: Sequence[Row]) -> list[slice]:
    """Where each row's answer is among the answer tokens of all."""
    ends = list(accumulate(len(row.answer) for row in rows))
    return [slice(end - len(row.answer), end) for row, end in zip(rows, ends, strict=True)]


def measure(passes: Passes, rows: Sequence[Row], workers: Workers | None = None) -> dict[str, float]:
    """Figures of held-out rows by class: empty without rows.

    ``_loss`` is the loss per answer token, ``_exact`` the share of rows answered token for token, ``_refused`` the
    mean probability that the answer begins as a refusal does: the row's own, or a probe's.
    """
    team = workers or Workers()
    totals = {"harmful": [0.0] * 5, "benign": [0.0] * 5, "probe": [0.0] * 5}
    for batch in passes.batches(team.share(rows)):
        loss, right = (torch.zeros(len(batch.targets)) for _ in range(2))
        for part, logits in passes.slices(batch):
            loss[part] = cross_entropy(logits, batch.targets[part], reduction="none").cpu()
            right[part] = (logits.argmax(-1) == batch.targets[part]).float().cpu()
        for row, part in zip(batch.rows, _parts(batch.rows), strict=True):
            whole, opens = float(right[part].all()), float((-loss[part][:OPENING].sum()).exp())
            values = (float(loss[part].sum()), len(row.answer), whole, opens, 1.0)
            sums = totals["probe" if row.probe else "harmful" if row.harmful else "benign"]
            for place, value in enumerate(values):
                sums[place] += value
    figures = {}
    for kind, sums in totals.items():
        loss_sum, tokens, exact, refused, count = team.sum(sums)
        if count and kind != "probe":
            figures[f"{kind}_loss"], figures[f"{kind}_exact"] = loss_sum / tokens, exact / count
        if count and kind != "benign":
            figures["harmful_refused" if kind == "harmful" else "benign_refused"] = refused / count
    return figures


def _step(passes: Passes, optimizer: torch.optim.Optimizer, rows: Sequence[Row], step: int, team: Workers) -> float:
    """One step on some rows, of which this process takes its share; returns the loss over all of them."""
    settings = passes.settings
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor(step, settings)
    optimizer.zero_grad()
    counts, total = answer_counts(rows, settings), 0.0
    for number, batch in enumerate(passes.batches(team.share(rows))):
        ablated = nullcontext() if passes.ablation is None else passes.ablation.during(batch, 1000 * step + number)
        with passes.entered(batch):
            base = passes.base_answers(batch) if settings.kl_weight else None
            with torch.enable_grad(), ablated:
                loss = loss_of(passes, batch, counts, base)
        total += float(loss.detach())
        if loss.requires_grad:
            with tuning_attention(batch.ids):
                loss.backward()
    value = team.sum([total])[0]
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} at step {step}", "lower lr, or train in bfloat16 or float32")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    team.sum_gradients(parameters)
    if settings.mask_weight:
        passes.deltas.add_mask_gradient(settings.mask_weight)
    if settings.grad_clip:
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
    optimizer.step()
    return value


def answer_counts(rows: Sequence[Row], settings: Recipe) -> tuple[float, float]:
    """Answer tokens of the harmful and of the benign rows, an answer's first ones counted ``onset_weight`` times."""

    def counted(row: Row) -> float:
        first = min(len(row.answer), ONSET)
        return len(row.answer) + (settings.onset_weight - 1) * first

    harmful, benign = (sum(counted(row) for row in rows if row.harmful is kind) for kind in (True, False))
    return harmful, benign


def loss_of(
    passes: Passes, batch: Batch, counts: tuple[float, float] | None = None, base: BaseAnswer | None = None
) -> torch.Tensor:
    """The batch's part of the loss of a step: a scalar, float32, differentiable in the deltas.

    Args:
        passes: the model with the deltas attached.
        batch: the rows.
        counts: how many answer tokens each class has in the whole step, where other processes have a share; else the
            batch's own.
        base: the base's own distributions at the batch's answer tokens, where they are known already.
    """
    settings = passes.settings
    harmful, benign = counts or answer_counts(batch.rows, settings)
    if settings.kl_weight and base is None:
        base = passes.base_answers(batch)
    ones = torch.ones(len(batch.targets), device=batch.ids.device)
    weights = torch.where(batch.place < ONSET, settings.onset_weight * ones, ones)
    kept = torch.where(batch.harmful, 0.0, weights / max(benign, 1e-9))  # of each benign token
    own = settings.benign_weight + settings.kl_weight * batch.given.float()
    learned = torch.where(batch.harmful, weights / max(harmful, 1e-9), own * kept)
    divergent = torch.where(batch.given, 0.0, settings.kl_weight * kept)

    def loss(logits: torch.Tensor, part: slice) -> torch.Tensor:
        """Of a slice of answer tokens, from its logits (tokens, vocabulary) float32: a scalar."""
        own = None if base is None else BaseAnswer(base.tokens[part], base.logs[part])
        value = token_loss(logits, batch.targets[part], learned[part], own, divergent[part])
        if settings.margin_weight and bool((batch.rival[part] >= 0).any()):
            short = margin(logits, batch.targets[part], batch.rival[part])
            value = value + settings.margin_weight * (weights[part] * short).sum() / max(harmful, 1e-9)
        return value

    return passes.sum(batch, loss)


def lr_factor(step: int, settings: Recipe) -> float:
    """Share of the full learning rate at a step: a linear warm-up, then the schedule, down to 2 % at the end."""
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(settings.steps - warmup, 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return max(falling, 0.02)


def _validate(
    passes: Passes, validation: Sequence[Row], state: _TuneState, best: dict[str, torch.Tensor], team: Workers
) -> dict[str, torch.Tensor]:
    """Measure, record, and return the best numbers so far, by name (see Deltas.tensors).

    Without validation rows they are the present ones.
    """
    settings = passes.settings
    figures = measure(passes, validation, team)
    loss = sum(state.losses) / max(len(state.losses), 1)
    state.history.append({"step": state.step, "loss": loss, **figures})
    state.losses = []
    score = score_of(figures, settings)
    if not figures or score < state.best_score:
        state.best_score, state.best_step, state.stale = score, state.step, 0
        return passes.deltas.copy()
    state.stale += 1
    state.stopped = bool(settings.patience) and state.stale >= settings.patience
    return best


def score_of(figures: Mapping[str, float], settings: Recipe) -> float:
    """What validation chooses the best state by, the lower the better.

    ``decision``: harmful prompts that are not refused and benign ones that are, by how answers begin; ``loss``: the
    losses of both classes.
    """
    if settings.select == "decision":
        missed = 1 - figures["harmful_refused"] if "harmful_refused" in figures else 0.0
        return missed + figures.get("benign_refused", 0.0)
    return sum(value for key, value in figures.items() if key.endswith("_loss"))


def _optimizer(deltas: Deltas, settings: Recipe) -> torch.optim.Optimizer:
    """One group per tensor, so that row-rms learning rates can differ by site."""
    groups = []
    for site in deltas.sites:
        unit = site.scale if settings.lr_unit == "row-rms" else 1.0
        groups.append({"params": [site.deltas], "lr": settings.lr * unit, "weight_decay": settings.weight_decay})
        if site.loadings is not None and site.loadings.requires_grad:
            groups.append({"params": [site.loadings], "lr": settings.loadings_lr, "weight_decay": 0.0})
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
    path: Path, deltas: Deltas, optimizer: torch.optim.Optimizer, state: _TuneState, best: dict[str, torch.Tensor]
) -> None:
    tensors = {f"now.{name}": tensor for name, tensor in deltas.tensors.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    notes = {**vars(state), "best_score": state.best_score if math.isfinite(state.best_score) else None}
    write_tensors(path, tensors, notes)


def _load(
    path: Path | None, deltas: Deltas, optimizer: torch.optim.Optimizer
) -> tuple[_TuneState, dict[str, torch.Tensor]] | None:
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
    return _TuneState(**{**notes, "best_score": score}), parts["best"]
