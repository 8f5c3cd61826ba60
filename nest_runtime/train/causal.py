"""Which neurons the base's refusals rest on: what each one adds to the refusal's first tokens, to first order.

A probe finds neurons that tell harmful from benign, and does not ask whether they do anything. Here every neuron's raw
output is multiplied with the gradient that the refusal's log-probability has there, and summed over tokens and prompts.
That is, to first order, what the refusals lose when the neuron is set to zero (attribution patching, Syed et al. 2023,
arXiv 2310.10348). A pass and its backward pass over the harmful prompts measure all neurons at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nest_runtime.errors import UsageError
from nest_runtime.model.anatomy import Projection, is_experts, module_of
from nest_runtime.progress import Progress
from nest_runtime.train.batches import OPENING, Row, make_batch
from nest_runtime.train.forward import Readout, device_of, dtype_of, even_batches


def refusal_effects(
    model: Any,
    rows: Sequence[Row],
    projections: Sequence[Projection],
    pad: int,
    *,
    step_tokens: int = 512,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """The neurons' effects on the log-probability of the rows' first answer tokens, on average over the rows.

    Args:
        model: the bare base, in eval mode.
        rows: harmful prompts with their refusals; the first ``OPENING`` tokens of each count.
        projections: whose neurons to measure.
        pad: the padding token.
        step_tokens: padded tokens in one pass.
        progress: called as ``("causal", done, total)``.

    Returns:
        One (d_out,) float32 array per projection, in nats. Positive: the refusal is less likely without the neuron.

    Raises:
        UsageError: the FFN is one of routed experts, whose neurons see some tokens only.
    """
    modules = {projection.name: module_of(model, projection) for projection in projections}
    if any(is_experts(module) for module in modules.values()):
        raise UsageError("recipe: score is causal; this model's FFN is one of experts", "use score probe")
    rows = [replace(row, answer=row.answer[:OPENING]) for row in rows]
    sums = {id(module): torch.zeros(0) for module in modules.values()}
    readout, done = Readout(model), 0
    for positions in even_batches([len(row.prompt) + len(row.answer) for row in rows], step_tokens):
        batch = make_batch([rows[index] for index in positions], pad, device_of(model), dtype_of(model))
        outputs: dict[int, torch.Tensor] = {}
        with _kept_outputs(list(modules.values()), outputs), torch.enable_grad():
            logits = readout.logits(batch.ids, batch.mask, batch.where, batch.inputs)
            value = -cross_entropy(logits, batch.targets, reduction="sum")
        gradients = torch.autograd.grad(value, list(outputs.values()))
        for (key, output), gradient in zip(outputs.items(), gradients, strict=True):
            effect = (output.detach().float() * gradient.float()).reshape(-1, output.shape[-1]).sum(0).cpu()
            sums[key] = effect if not len(sums[key]) else sums[key] + effect
        done += len(positions)
        if progress is not None:
            progress("causal", done, len(rows))
    found = []
    for projection in projections:
        wanted = projection.rows(torch.arange(projection.each))
        found.append((sums[id(modules[projection.name])][wanted] / len(rows)).numpy())
    return found


@contextmanager
def _kept_outputs(modules: Sequence[nn.Module], outputs: dict[int, torch.Tensor]) -> Iterator[None]:
    """Within it, a pass leaves each module's output (…, d_out) in ``outputs``, by the module's id, with a gradient."""

    def keep(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:  # of the lowest one, below which the frozen base needs no gradient
            output.requires_grad_(True)
        outputs[id(module)] = output

    handles = [module.register_forward_hook(keep) for module in dict.fromkeys(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
