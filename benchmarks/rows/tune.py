"""Row ``tune``: a training step of a patch, beside its floor, a LoRA's step, and a step of full fine-tuning.

    python benchmarks/rows/tune.py --models FOLDER

Qwen2.5-Coder-0.5B in bfloat16, 16 rows, at the sites of the shipped patch. The floor is a forward pass of the layers
from the lowest patched one on and the backward pass of their activations, logits at answer tokens included: no step
that trains there can be cheaper. LoRA is PEFT's, rank 8 on gate and up, with AdamW; the full step trains every weight
with AdamW. All take the same rows in the same micro-batches; ours is timed inside ``tune`` itself, one step in turn
with one of each other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import Goal, Line, Report, Series, run, threads
from subjects import load, real_models
from torch.nn.functional import cross_entropy

from nest_runtime.compare.methods.lora import adapter_parameters, ffn_modules
from nest_runtime.model.anatomy import find_projections
from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import load_examples
from nest_runtime.prompts.generate import end_token_ids, pad_token_id
from nest_runtime.train.batches import Batch, Row, make_batch, make_row, refusal_for
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.forward import decoder_of, dtype_of, even_batches
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.sites import LocatedSite
from nest_runtime.train.tune import tune

ROWS, WARM = 16, 1
ANSWER = "Of course. First think about what it is for, then write down the steps in the order in which you need them."


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    real = real_models(arguments)[-1]
    loaded, patch = load(real)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    rows = training_rows(loaded)
    patched = {site.name for site in patch.sites if site.n_neurons}
    lowest = min(p.layer for p in find_projections(loaded.model) if p.name in patched)
    make: dict[str, Callable[[Any, list[Batch]], Callable[[], None]]] = {
        "floor": lambda model, batches: floor_step(model, batches, lowest),
        "LoRA": lora_step,
        "full": full_step,
    }
    pad, lengths = pad_token_id(loaded.model, loaded.tokenizer), [len(row.prompt) + len(row.answer) for row in rows]
    batches = [
        make_batch([rows[index] for index in found], pad, torch.device("cpu"), dtype_of(loaded.model))
        for found in even_batches(lengths, Recipe().step_tokens)
    ]
    others = {name: build(load(real, dtype)[0].model, batches) for name, build in make.items()}
    times = steps(loaded, patch, rows, others, 2 if arguments.quick else 4)
    found = {name: Series(name, tuple(values)) for name, values in times.items()}
    what = f"tune step, {len(rows)} rows of {max(lengths)} tokens at most, {real.label}, {dtype}"
    note = f"lowest patched layer {lowest} of {loaded.model.config.num_hidden_layers}"
    return Report(
        [
            Line(what, found["ours"], Series("floor", found["floor"].values), Goal(1.10), note),
            Line(what, found["ours"], Series("PEFT LoRA, rank 8", found["LoRA"].values), Goal(0.7), note),
            Line(what, found["ours"], Series("full fine-tuning", found["full"].values), Goal(0.4), note),
        ]
    )


def steps(
    loaded: Any, patch: Patch, rows: Sequence[Row], others: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every step; the first ones, which compute the lower layers' outputs once, do not count."""
    projections = find_projections(loaded.model)
    recipe = Recipe(steps=rounds + WARM, batch_size=len(rows), validate_every=rounds + WARM)
    deltas = Deltas(loaded.model, projections, located(patch, projections), recipe.loadings)
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}
    began = [0.0]

    def step_done(stage: str, done: int, total: int) -> None:
        took = time.perf_counter() - began[0]
        for name, step in others.items():
            other = time.perf_counter()
            step()
            if WARM < done < total:  # the last step of ours includes a validation
                times[name].append(time.perf_counter() - other)
        if WARM < done < total:
            times["ours"].append(took)
        began[0] = time.perf_counter()

    with torch.enable_grad():
        tune(loaded.model, loaded.tokenizer, deltas, rows, [], recipe, progress=step_done)
    return times


def training_rows(loaded: Any) -> list[Row]:
    """Half refusals, half answers, of the bundled prompts."""
    ends, rows = end_token_ids(loaded.model, loaded.tokenizer), []
    for kind in ("harmful", "everyday"):
        for example in [one for one in load_examples(bundled(kind)) if len(one.messages) == 1][: ROWS // 2]:
            answer = refusal_for(example) if kind == "harmful" else ANSWER
            rows.append(make_row(loaded.tokenizer, example, answer, kind == "harmful", ends))
    return rows


def located(patch: Patch, projections: Sequence[Any]) -> list[LocatedSite]:
    """The patch's neurons and clusters as locating gives them."""
    kinds = {projection.name: projection for projection in projections}
    return [
        LocatedSite(
            site.name,
            kinds[site.name].layer,
            kinds[site.name].kind,
            site.d_in,
            site.d_out,
            tuple(site.neurons.tensor().tolist()),
            (1.0,) * site.n_neurons,
            tuple(site.clusters.tensor().tolist()),
        )
        for site in patch.sites
    ]


def answer_loss(model: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy at the answers' tokens, from hidden states."""
    logits = model.get_output_embeddings()(hidden[batch.where])
    return cross_entropy(logits.float(), batch.targets)


def floor_step(model: Any, batches: list[Batch], lowest: int) -> Callable[[], None]:
    """Forward from the lowest patched layer, and backward to its input; no weight takes a gradient."""
    decoder = decoder_of(model)
    model.requires_grad_(False)
    kept: list[torch.Tensor] = []
    handle = decoder.layers[lowest].register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    handle.remove()
    decoder.layers = decoder.layers[lowest:]

    def step() -> None:
        for batch, given in zip(batches, kept, strict=True):
            x = given.requires_grad_(True)
            hidden = decoder(inputs_embeds=x, attention_mask=batch.mask, use_cache=False).last_hidden_state
            torch.autograd.grad(answer_loss(model, hidden, batch), x)

    return step


def lora_step(model: Any, batches: list[Batch]) -> Callable[[], None]:
    """A step of PEFT's LoRA on gate and up."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=ffn_modules(model), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    return trained_step(adapted.base_model.model, list(adapter_parameters(adapted).values()), batches)


def full_step(model: Any, batches: list[Batch]) -> Callable[[], None]:
    """A step that trains all weights."""
    model.requires_grad_(True)
    return trained_step(model, list(model.parameters()), batches)


def trained_step(model: Any, parameters: list[torch.Tensor], batches: list[Batch]) -> Callable[[], None]:
    """Forward, backward, and AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
            answer_loss(model, hidden, batch).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    run("tune", __doc__, measure)
