"""What every FFN neuron did on every prompt: raw gate and up outputs, pooled over the prompt's tokens.

One forward pass over all prompts, batched by length, without the language-model head. Each batch's pooled rows go
straight to disk, one file per projection. So memory holds one batch here and one projection at a time later (locate,
cluster), never layers × prompts × neurons.

Memory beyond the model, for 8B (32 layers × 2 projections × 14,336 neurons, bf16) and 10,000 prompts:

- this pass: a batch of at most 8,192 padded tokens (``batch_tokens``): one projection's output 235 MB and its
  masked copy 235 MB, the block's own intermediates about 0.9 GB at the peak; pooled rows 0.1 GB. Below 1.5 GiB.
- locate and cluster: one projection in float32 is 10,000 × 14,336 × 4 B = 573 MB, the probe's rows again 459 MB,
  and its working vectors. Below 1.5 GiB.
- on disk: 10,000 × 917,504 neurons × 2 B = 18.4 GB (float16; a float32 model is kept in float32).

The prompts must run without any patch; otherwise the patched model would be located instead of the base.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nest_runtime.errors import TrainingError
from nest_runtime.io import read_json, write_json
from nest_runtime.model.anatomy import Projection, is_experts, module_of
from nest_runtime.model.experts import Routed, first_outputs, routed
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import encode_prompt
from nest_runtime.prompts.generate import pad_token_id
from nest_runtime.prompts.images import PromptImages, batch_inputs
from nest_runtime.train.forward import device_of, dtype_of, hidden_states, length_batches, pad_rows
from nest_runtime.train.stages import stage_folder, stage_key
from nest_runtime.train.workers import Workers

FLOAT16_MAX = 65504.0


class PooledActivations:
    """Pooled activations on disk; reads one projection at a time.

    Attributes:
        folder: where the files are.
        projections: whose activations they are, in order.
        prompts: how many prompts.
    """

    def __init__(
        self, folder: Path, projections: Sequence[Projection], order: Sequence[int], dtype: str, owned: Any = None
    ) -> None:
        self.folder, self.projections, self.prompts = folder, tuple(projections), len(order)
        self._index = {projection.name: number for number, projection in enumerate(self.projections)}
        self._order, self._dtype, self._owned = np.asarray(order), np.dtype(dtype), owned

    def read(self, name: str) -> np.ndarray:
        """One projection's pooled activations, float32 (prompts, d_out), in the order of the prompts."""
        number = self._index[name]
        d_out = self.projections[number].d_out
        stored = np.fromfile(_file(self.folder, number), dtype=self._dtype)
        result = np.empty((self.prompts, d_out), dtype=np.float32)
        result[self._order] = stored.reshape(self.prompts, d_out)
        return result


def pooled_activations(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    projections: Sequence[Projection],
    *,
    pooling: str = "max",
    batch_size: int = 64,
    batch_tokens: int = 8192,
    workdir: Path | None = None,
    key: str = "",
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> PooledActivations:
    """Run the prompts once and pool every projection's raw output over each prompt's tokens.

    Args:
        model: the bare base, in eval mode.
        tokenizer: its tokenizer.
        conversations: prompts as messages, ending with the user's turn.
        projections: whose outputs to keep (``anatomy.find_projections``).
        pooling: ``max``, ``mean`` or ``last`` token. Padding never counts.
        batch_size, batch_tokens: rows, and padded tokens, of one forward pass.
        workdir: keep the files here and take up an interrupted pass; None uses a temporary folder.
        key: what else the result depends on (the model's hash).
        workers: the processes that share the batches, with one ``workdir``; None is this one alone.
        progress: called as ``("activations", done, total)``.

    Raises:
        TrainingError: no room on the disk, or the model's outputs are not finite.
    """
    team = workers or Workers()
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    rows = [ids for ids, _ in prompts]
    pictures = [image.digest for _, image in prompts if image is not None]
    batches = length_batches([len(row) for row in rows], batch_size, batch_tokens)
    dtype = "float32" if next(model.parameters()).dtype == torch.float32 else "float16"
    owned = tempfile.TemporaryDirectory(prefix="nest-activations-") if workdir is None else None
    names = [projection.name for projection in projections]
    sizes = [batch_size, batch_tokens]
    digest = stage_key(rows=rows, names=names, pooling=pooling, batches=sizes, dtype=dtype, key=[key, *pictures])
    with team.main_first():
        folder = stage_folder(Path(owned.name) if owned else Path(workdir or "."), "activations", digest)
    if not any(folder.iterdir()):
        _check_room(folder, len(rows) * sum(p.d_out for p in projections) * np.dtype(dtype).itemsize)
    _run(model, tokenizer, prompts, batches, projections, pooling, folder, dtype, team, progress)
    team.wait()
    return PooledActivations(folder, projections, [index for batch in batches for index in batch], dtype, owned)


def _run(
    model: Any,
    tokenizer: Any,
    prompts: list[tuple[list[int], PromptImages | None]],
    batches: list[list[int]],
    projections: Sequence[Projection],
    pooling: str,
    folder: Path,
    dtype: str,
    team: Workers,
    progress: Progress | None,
) -> None:
    """Run this process's batches that are not on disk yet; ``state.json`` counts the ones that are."""
    state = team.file(folder, "state.json")
    done = int((read_json(state) or {}).get("batches", 0))
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    for number in team.share(range(len(batches)))[done:]:
        batch, offset = batches[number], int(starts[number])
        ids, mask = pad_rows([prompts[index][0] for index in batch], pad_token_id(model, tokenizer), device_of(model))
        inputs = batch_inputs([prompts[index][1] for index in batch], ids, [0] * len(batch), dtype_of(model))
        pooled: dict[int, torch.Tensor] = {}
        with _pooling_hooks(model, projections, mask, pooling, pooled), torch.no_grad(), suppress(_Pooled):
            hidden_states(model, ids, mask, inputs)
        for index, values in sorted(pooled.items()):  # values (rows of the batch, d_out)
            _append(folder, index, offset, values, dtype)
        done += 1
        write_json(state, {"batches": done})
        if progress is not None:
            progress("activations", offset + len(batch), len(prompts))


@contextmanager
def _pooling_hooks(
    model: Any, projections: Sequence[Projection], mask: torch.Tensor, pooling: str, pooled: dict[int, torch.Tensor]
) -> Iterator[None]:
    """Hooks that pool each module's output for one forward pass.

    Args:
        model: the base.
        projections: whose modules get hooks.
        mask: (rows, width) int64, 0 at padding.
        pooling: ``max``, ``mean`` or ``last``.
        pooled: receives (rows, d_out) by projection number.
    """
    by_module: dict[nn.Module, list[int]] = {}
    for number, projection in enumerate(projections):
        by_module.setdefault(module_of(model, projection), []).append(number)
    whole = whole_columns(mask)

    def keep(module: nn.Module, values: torch.Tensor) -> None:  # (rows, outputs) or (rows, experts, outputs)
        for number in by_module[module]:
            projection = projections[number]
            wanted = projection.rows(torch.arange(projection.each))
            pooled[number] = values[..., wanted].reshape(len(values), projection.d_out)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        """Keep a module's raw outputs [rows, width, outputs], pooled in float32; the last ends the pass."""
        if is_experts(module):
            keep(module, pool_experts(module, routed(args, kwargs), mask, pooling).float().cpu())
        else:  # some models flatten rows and tokens before their FFN
            keep(module, pool(output.reshape(*mask.shape, -1), mask, pooling, whole).float().cpu())
        if len(pooled) == len(projections):
            raise _Pooled

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in by_module]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Pooled(Exception):
    """All projections are pooled: the layers above them need not run."""


def whole_columns(mask: torch.Tensor) -> int:
    """How many columns of ``mask`` (rows, width) int64 at its beginning are 1 in every row."""
    return int((mask != 0).all(dim=0).long().cumprod(dim=0).sum())


def pool(values: torch.Tensor, mask: torch.Tensor, pooling: str, whole: int | None = None) -> torch.Tensor:
    """Pool over the tokens where the mask is 1.

    Args:
        values: (rows, width, d), any floating-point dtype.
        mask: (rows, width) int64.
        pooling: ``max``, ``mean`` or ``last``.
        whole: ``whole_columns`` of the mask, if the caller has it: only the columns behind them are copied and masked.

    Returns:
        (rows, d) in the dtype of the values.
    """
    mask = mask.to(values.device)
    if pooling == "max":
        whole = whole_columns(mask) if whole is None else whole
        parts = [values[:, :whole].amax(dim=1)] if whole else []
        if whole < mask.shape[1]:
            parts.append(values[:, whole:].masked_fill(mask[:, whole:, None] == 0, -torch.inf).amax(dim=1))
        return parts[0] if len(parts) == 1 else torch.maximum(*parts)
    if pooling == "mean":
        weights = mask[..., None].to(torch.float32)
        return (values.float() * weights).sum(dim=1) / weights.sum(dim=1)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # (rows,)
    return values[torch.arange(len(values), device=values.device), last]


def pool_experts(module: nn.Module, call: Routed, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool the raw outputs of a layer's experts over the tokens that are routed to each.

    A prompt without a token for an expert has 0 there. With ``pooling`` ``last``, so has a prompt whose last token goes
    to another expert.

    Returns:
        (rows, experts, 2F) float32.
    """
    x, mask = call[0], mask.to(call[0].device)
    rows, width = mask.shape
    ends = width - 1 - mask.flip(1).argmax(dim=1)  # (rows,)
    counted = mask if pooling != "last" else torch.zeros_like(mask).scatter_(1, ends[:, None], 1)
    weight: torch.Tensor = module.gate_up_proj  # type: ignore[assignment]
    result = x.new_zeros(rows, len(weight), weight.shape[-1 if module.is_transposed else -2], dtype=torch.float32)
    for expert, token, values in first_outputs(module, call):
        kept = counted.reshape(-1)[token] != 0
        row, counting = token[kept] // width, values[kept].float()  # (t,), (t, 2F)
        index = row[:, None].expand_as(counting)
        how = "amax" if pooling == "max" else "mean"
        result[:, expert] = result[:, expert].scatter_reduce(0, index, counting, how, include_self=False)
    return result


def _append(folder: Path, number: int, offset: int, values: torch.Tensor, dtype: str) -> None:
    """Write one batch's rows [rows, d_out] at their place; a batch cut short by an interrupt is overwritten."""
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(
            f"projection {number} gives NaN or infinite activations on the prompts",
            "load the model in another dtype (bfloat16 or float32)",
        )
    array = values.clamp(-FLOAT16_MAX, FLOAT16_MAX).numpy() if dtype == "float16" else values.numpy()
    path = _file(folder, number)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:  # others may be writing it too
        file.seek(offset * values.shape[1] * np.dtype(dtype).itemsize)
        file.write(np.ascontiguousarray(array, dtype=dtype).tobytes())


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.bin"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"pooled activations need {needed / 1e9:.1f} GB at {folder}; {free / 1e9:.1f} GB are free",
            "give a work folder on a larger disk, or fewer prompts",
        )
