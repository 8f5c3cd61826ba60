"""Row ``locate``: pooled activations, probes and clusters, beside a plain forward pass over the same prompts.

    python benchmarks/rows/locate.py --models FOLDER

SmolLM2 in bfloat16, the bundled prompts, the layers of the default recipe. The plain pass runs the same batches through
all layers, without the head; ours stops at the last layer that it looks at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from measure import Goal, Line, Report, Series, run, threads
from subjects import load, smallest

from nest_runtime.model.anatomy import find_projections
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import encode_prompt, load_examples
from nest_runtime.prompts.generate import pad_token_id
from nest_runtime.train.activations import pooled_activations
from nest_runtime.train.cluster import cluster
from nest_runtime.train.forward import device_of, hidden_states, length_batches, pad_rows
from nest_runtime.train.locate import chosen_projections, locate
from nest_runtime.train.recipe import Recipe


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    loaded, _ = load(smallest(arguments))
    count, rounds = (16, 1) if arguments.quick else (128, 3)
    harmful, benign = (load_examples(bundled(kind))[:count] for kind in ("harmful", "everyday"))
    talks = [list(example.messages) for example in [*harmful, *benign]]
    labels = [1] * len(harmful) + [0] * len(benign)
    recipe = Recipe()
    times: dict[str, list[float]] = {"pass": [], "probes": [], "plain": []}
    for number in range(rounds + 1):
        order = ("plain", "ours") if number % 2 else ("ours", "plain")
        for way in order:
            took = plain(loaded, talks, recipe) if way == "plain" else ours(loaded, talks, labels, recipe)
            if number:
                for key, value in took.items():
                    times[key].append(value)
    series = {key: Series(key, tuple(values)) for key, values in times.items()}
    whole = Series("locate", tuple(a + b for a, b in zip(times["pass"], times["probes"], strict=True)))
    forward = Series("plain forward", series["plain"].values)
    what = f"{len(talks)} prompts, SmolLM2, bfloat16"
    return Report(
        [
            Line(f"locate's pass, {what}", series["pass"], forward, Goal(1.10)),
            Line(f"probes and clusters, {what}", series["probes"], forward, Goal(0.20)),
            Line(f"all of locate, {what}", whole, forward),
        ]
    )


def ours(loaded: Any, talks: Sequence[Any], labels: Sequence[int], recipe: Recipe) -> dict[str, float]:
    """Seconds of the pass that pools, and of probes and clusters."""
    projections = chosen_projections(find_projections(loaded.model), recipe)
    began = time.perf_counter()
    pooled = pooled_activations(
        loaded.model,
        loaded.tokenizer,
        talks,
        projections,
        pooling=recipe.pooling,
        batch_size=recipe.prompt_batch,
        batch_tokens=recipe.batch_tokens,
    )
    middle = time.perf_counter()
    cluster(pooled, locate(pooled, labels, recipe), recipe)
    return {"pass": middle - began, "probes": time.perf_counter() - middle}


def plain(loaded: Any, talks: Sequence[Any], recipe: Recipe) -> dict[str, float]:
    """Seconds of tokenizing and of a forward pass over the same batches."""
    began = time.perf_counter()
    rows = [encode_prompt(loaded.tokenizer, messages)[0] for messages in talks]
    batches = length_batches([len(row) for row in rows], recipe.prompt_batch, recipe.batch_tokens)
    with torch.no_grad():
        for batch in batches:
            pad = pad_token_id(loaded.model, loaded.tokenizer)
            ids, mask = pad_rows([rows[index] for index in batch], pad, device_of(loaded.model))
            hidden_states(loaded.model, ids, mask)
    return {"plain": time.perf_counter() - began}


if __name__ == "__main__":
    run("locate", __doc__, measure)
