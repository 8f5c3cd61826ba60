"""What locating, tuning and serving a model will take, from its configuration alone: nothing is loaded.

The model is made on the meta device, so its sizes (sizes.py) are exact. Memory is counted from the tensors that the
code holds at each stage's peak. The number of neurons kept, and time, rest on assumptions that the answer names.
benchmarks/locate_memory.py compares the count for locating with a real process.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from nest_runtime.train.lower import KEPT_BYTES
from nest_runtime.train.objective import SLICE_NUMBERS
from nest_runtime.train.passes import comes_again
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.sizes import SCALES, Load, Shape, Speed

EFFICIENCY = 0.45  # of the speed of its FFNs, in a whole model (measured on two models, docs/guide/scale.md)
HEAP = 1.5  # resident bytes for a byte of a step's tensors, at the peak (measured on two models, real-models.md)
FRAMED_TOKENS = 50  # that a framing adds to a prompt, on average of those within framed_characters (360)
PROBE_PASSES = 60  # of the L-BFGS probe over its activations, each reading them twice


def plan(shape: Shape, recipe: Recipe, load: Load, speed: Speed) -> dict[str, Any]:
    """Memory beyond the model, disk and time of each stage, in bytes and seconds; and the patch to expect."""
    patch, located = _patch(shape, recipe), load.located(recipe)
    answers = 0.0 if load.answers_given else _answers_seconds(shape, recipe, load, speed)
    return {
        "parameters": shape.parameters,
        "weights_bytes": shape.weights,
        "sites": len(shape.projections),
        "layers": shape.layers,
        "patched_layers": len({projection.layer for projection in shape.projections}),
        "patch": patch,
        "stages": {
            "answers": {"memory_bytes": _answers_memory(shape, recipe, load), "disk_bytes": 0, "seconds": answers},
            "locate": {
                "memory_bytes": max(pass_memory(shape, recipe, located), probe_memory(shape, recipe, located)),
                "disk_bytes": activations_disk(shape, located),
                "seconds": _locate_seconds(shape, located, speed),
            },
            "tune": {
                "memory_bytes": tune_memory(shape, recipe, load, patch["parameters"]),
                "disk_bytes": 16 * patch["parameters"],
                "seconds": _tune_seconds(shape, recipe, load, speed),
            },
            "serve": {"memory_bytes": shape.cache * 8192 + patch["bytes"], "disk_bytes": patch["bytes"], "seconds": 0},
        },
        "assumptions": _assumptions(recipe, load, speed),
    }


def pass_memory(shape: Shape, recipe: Recipe, load: Load) -> int:
    """Of the pass over the prompts: one decoder layer at work on a batch, a masked copy to pool, the pooled rows."""
    rows = _rows(recipe, load)
    tokens = rows * load.prompt_tokens
    stream = 6 * tokens * shape.hidden * max(shape.itemsize, 4) // 2  # residual and norms, which go by float32
    ffn = 4 * tokens * shape.widest * shape.itemsize  # gate, up, their product, the masked copy
    masks = rows * load.prompt_tokens**2 * 4
    pooled = rows * sum(projection.d_out for projection in shape.projections) * 4
    return stream + ffn + masks + pooled


def probe_memory(shape: Shape, recipe: Recipe, load: Load) -> int:
    """Of the widest probe: its activations, the part to fit on, and what standardizing takes meanwhile; float32."""
    widest = max(projection.d_out for projection in shape.projections)
    return int(load.prompts * widest * 4 * (1 + 2 * (1 - recipe.probe_holdout)))


def activations_disk(shape: Shape, load: Load) -> int:
    """Pooled activations of every prompt: float16, or float32 of a float32 model."""
    size = 4 if shape.itemsize == 4 else 2
    return load.prompts * sum(projection.d_out for projection in shape.projections) * size


def tune_memory(shape: Shape, recipe: Recipe, load: Load, trained: int) -> int:
    """Of a step: what the backward pass keeps above the lowest patched layer, logits of answers, the optimizer."""
    row = load.prompt_tokens + load.answer_tokens
    tokens = min(recipe.batch_size * row, max(recipe.step_tokens, row))
    kept = tokens * (shape.itemsize * (14 * shape.hidden + 4 * shape.widest) + 31 * shape.hidden)  # the last in float32
    layers = max(round(shape.layers * shape.lowest), 1)
    logits = min(recipe.batch_size * load.answer_tokens * shape.vocabulary, SLICE_NUMBERS) * 4 * 4
    again = comes_again(recipe, _training_rows(recipe, load))
    states = _rows_seen(recipe, load) * load.mean * shape.hidden * shape.itemsize if again else 0
    numbers = trained * 4 * 5  # value, gradient, two moments, the best so far
    return int(HEAP * (kept * layers + logits) + min(KEPT_BYTES, states) + numbers)


def kept_share(recipe: Recipe) -> float:
    """Share of neurons above the threshold if probe weights were normally distributed."""
    both = math.erfc(recipe.z / math.sqrt(2))
    return both if recipe.sign == "absolute" else both / 2


def _patch(shape: Shape, recipe: Recipe) -> dict[str, int]:
    neurons = round(kept_share(recipe) * sum(projection.d_out for projection in shape.projections))
    clusters = [min(recipe.k_max, round(kept_share(recipe) * each.d_out)) for each in shape.projections]
    shared = sum(count * each.d_in for count, each in zip(clusters, shape.projections, strict=True))
    own = round(sum(kept_share(recipe) * projection.d_out * projection.d_in for projection in shape.projections))
    rows = own if recipe.rows == "neuron" else shared
    numbers = rows + (neurons if recipe.loadings == "learned" else 0)
    size = rows * SCALES[recipe.delta_dtype] + neurons * (12 + (0 if recipe.loadings == "tied" else 4))
    return {
        "neurons": neurons,
        "clusters": neurons if recipe.rows == "neuron" else sum(clusters),
        "parameters": numbers,
        "bytes": size,
    }


def _rows(recipe: Recipe, load: Load) -> int:
    """Prompts in one pass of locate."""
    return max(min(recipe.prompt_batch, recipe.batch_tokens // load.prompt_tokens, load.prompts), 1)


def _answers_memory(shape: Shape, recipe: Recipe, load: Load) -> int:
    if load.answers_given:
        return 0
    return recipe.prompt_batch * (load.prompt_tokens + load.answer_tokens) * shape.cache + pass_memory(
        shape, recipe, load
    )


def _answers_seconds(shape: Shape, recipe: Recipe, load: Load, speed: Speed) -> float:
    prompts = load.benign
    if recipe.framings:  # no more than the steps will see, and those held out
        held = min(recipe.validation_fraction * load.benign, recipe.validation_most or load.benign)
        prompts = round(
            min(load.benign * (1 + _copies(recipe)), _rows_seen(recipe, load) * (1 - recipe.harmful_share)) + held
        )
    batches = math.ceil(prompts / recipe.prompt_batch)
    reading = shape.active * shape.itemsize / speed.bandwidth
    rows = prompts / max(batches, 1)
    step = max(reading, 2 * shape.active * rows / (speed.flops * EFFICIENCY))
    return batches * recipe.answer_tokens * step + _forward(shape, prompts * _prompt(recipe, load), speed)


def _locate_seconds(shape: Shape, load: Load, speed: Speed) -> float:
    numbers = load.prompts * sum(projection.d_out for projection in shape.projections)
    highest = (max(projection.layer for projection in shape.projections) + 1) / shape.layers  # the pass ends there
    passed = highest * _forward(shape, load.prompts * (load.mean - load.answer), speed)
    return passed + PROBE_PASSES * 2 * 4 * numbers / speed.bandwidth


def _tune_seconds(shape: Shape, recipe: Recipe, load: Load, speed: Speed) -> float:
    mean = _prompt(recipe, load) + load.answer
    rows = recipe.batch_size * mean
    upper = shape.lowest * _forward(shape, rows, speed)
    base = (1 - recipe.harmful_share) * upper if recipe.kl_weight else 0.0  # the base's own distributions, once a row
    once = (1 - shape.lowest) * _forward(shape, rows, speed)  # the layers below
    again = comes_again(recipe, _training_rows(recipe, load))
    new = _rows_seen(recipe, load) / (recipe.steps * recipe.batch_size) if again else 1.0
    head = 2 * 2 * shape.head * recipe.batch_size * load.answer / (speed.flops * EFFICIENCY)
    step = 2 * upper + new * (base + once) + head  # no gradient of frozen weights
    fraction, most = recipe.validation_fraction, recipe.validation_most
    held = sum(
        min(fraction * count, most or count) for count in (load.harmful * (2 if recipe.framings else 1), load.benign)
    )
    measured = (recipe.steps / recipe.validate_every + 2) * shape.lowest * _forward(shape, held * mean, speed)
    return recipe.steps * step + measured


def _forward(shape: Shape, tokens: float, speed: Speed) -> float:
    """Through all layers, without the head."""
    return 2 * (shape.active - shape.head) * tokens / (speed.flops * EFFICIENCY)


def _prompt(recipe: Recipe, load: Load) -> float:
    """Tokens of a prompt that is tuned on, framed ones among them, on average."""
    framed = _copies(recipe) / (1 + _copies(recipe))
    return load.mean - load.answer + framed * FRAMED_TOKENS


def _training_rows(recipe: Recipe, load: Load) -> int:
    """How many rows there are to tune on."""
    return (2 + _copies(recipe)) * load.prompts


def _rows_seen(recipe: Recipe, load: Load) -> float:
    """How many different ones the steps see at most."""
    return min(recipe.steps * recipe.batch_size, _training_rows(recipe, load))


def _copies(recipe: Recipe) -> int:
    """Framed copies of a prompt."""
    return recipe.framings + recipe.code_framings


def _assumptions(recipe: Recipe, load: Load, speed: Speed) -> dict[str, Any]:
    return {
        **asdict(load),
        "neurons_kept": round(kept_share(recipe), 4),
        "clusters_per_site": recipe.k_max,
        "flops": speed.flops,
        "bandwidth": speed.bandwidth,
        "speed": "measured here" if speed.measured else "as given",
        "efficiency": EFFICIENCY,
        "probe_passes": PROBE_PASSES,
        "served_tokens": 8192,
        "batch_tokens": recipe.batch_tokens,
        "batch_size": recipe.batch_size,
        "steps": recipe.steps,
    }
