"""What locating in an 8B-shaped model takes beyond the model, measured with few layers and extrapolated to all.

    python benchmarks/locate_memory.py                 # layers of Llama-3.1-8B's shape, bfloat16, random weights
    python benchmarks/locate_memory.py --prompts 2000 --tokens 64 --json

The pass over full batches (8,192 tokens) for two layers and for four, the probe of one projection over all prompts, and
the clusters of its kept neurons. Memory is the high-water mark of the process (VmHWM, reset before each stage) less
what it held before. Of more layers the pass keeps pooled rows and nothing else: the extrapolation adds for each what
the third and fourth added, and at least those rows. (With one layer the embeddings' output is its only input, and
freed with it: two are the least that show what a deeper model holds.) Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.load import skeleton
from nest_runtime.train.activations import PooledActivations, pooled_activations
from nest_runtime.train.cluster import cluster
from nest_runtime.train.locate import locate
from nest_runtime.train.plan import pass_memory, probe_memory
from nest_runtime.train.recipe import RECIPES
from nest_runtime.train.sizes import Load, shape_of

LAYERS, FEW, MORE = 32, 2, 4
LIMIT = 4 * 2**30
SIZES = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,  # the head plays no part in locating
    "dtype": "bfloat16",
}
EVERYWHERE = {"depth_from": 0.0, "depth_to": 1.0}


class Words:
    """A tokenizer of random ids: what prompts say makes no difference to memory."""

    chat_template = None
    pad_token_id, eos_token_id, bos_token_id = 0, 2, 1

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        seed = int(text)
        return {"input_ids": np.random.default_rng(seed).integers(3, 128000, self.tokens).tolist()}


@contextmanager
def peak(into: dict[str, int], stage: str) -> Iterator[None]:
    """Note how far the process grows beyond what it holds at the start."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _status("VmRSS")
    yield
    into[stage] = _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure_pass(layers: int, tokens: int, sizes: dict[str, Any] | None = None, rows: int = 64) -> dict[str, Any]:
    """Two full batches through some layers; peak and seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SIZES, **(sizes or {}), "num_hidden_layers": layers})
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    found: dict[str, int] = {}
    prompts = [[{"role": "user", "content": str(number)}] for number in range(2 * rows)]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, peak(found, "pass"):
        pooled_activations(model, Words(tokens), prompts, find_projections(model), batch_size=rows, workdir=Path(name))
    return {"bytes": found["pass"], "seconds": round(time.perf_counter() - began, 1)}


def measure_probe(prompts: int, neurons: int = 14336) -> dict[str, Any]:
    """One projection's probe and clusters, over stored activations in which some neurons tell the classes apart."""
    generator = np.random.default_rng(0)
    labels = [number % 2 for number in range(prompts)]
    found: dict[str, int] = {}
    recipe = RECIPES["reference"]
    with tempfile.TemporaryDirectory() as name:
        with (Path(name) / "0000.bin").open("wb") as file:
            for label in labels:
                values = generator.normal(size=neurons).astype(np.float32)
                values[:256] += label
                file.write(values.astype(np.float16).tobytes())
        config = {**SIZES, "model_type": "llama", "num_hidden_layers": 1, "intermediate_size": neurons}
        (Path(name) / "config.json").write_text(json.dumps(config))
        projection = find_projections(skeleton(name))[0]
        stored = PooledActivations(Path(name), [projection], range(prompts), "float16")
        began = time.perf_counter()
        with peak(found, "probe"):
            located = locate(stored, labels, recipe)
        middle = time.perf_counter()
        with peak(found, "cluster"):
            cluster(stored, located, recipe)
    seconds = {"probe": round(middle - began, 1), "cluster": round(time.perf_counter() - middle, 1)}
    return {"bytes": found, "seconds": seconds, "neurons": len(located[0].neurons)}


def counted(tokens: int, prompts: int) -> dict[str, int]:
    """What `nest-runtime plan` counts for the whole model."""
    recipe = RECIPES["reference"].evolve(**EVERYWHERE)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(
            json.dumps({**SIZES, "model_type": "llama", "num_hidden_layers": LAYERS})
        )
        shape = shape_of(skeleton(name), "bfloat16", recipe)
    load = Load(prompts // 2, prompts - prompts // 2, tokens)
    return {"pass": pass_memory(shape, recipe, load), "probe": probe_memory(shape, recipe, load)}


def extrapolate(few: int, more: int, rows: int = 64) -> int:
    """The pass's peak with all layers, from those with FEW and with MORE."""
    pooled = rows * 2 * SIZES["intermediate_size"] * 4  # type: ignore[operator]
    return more + (LAYERS - MORE) * max((more - few) // (MORE - FEW), pooled)


def _apart(*arguments: object) -> Any:
    """A stage in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Measure, extrapolate, compare with the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt; 64 of them make a batch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        kind, _, layers = arguments.stage.partition(":")
        stage = measure_pass(int(layers), arguments.tokens) if kind == "pass" else measure_probe(arguments.prompts)
        print(json.dumps(stage))
        return
    common = ("--tokens", arguments.tokens, "--prompts", arguments.prompts)
    few, more = (_apart("--stage", f"pass:{layers}", *common) for layers in (FEW, MORE))
    rest = _apart("--stage", "probe", *common)
    plan = counted(arguments.tokens, arguments.prompts)
    whole = extrapolate(few["bytes"], more["bytes"])
    rows = [
        (f"pass, {FEW} layers", few["bytes"], None, few["seconds"]),
        (f"pass, {MORE} layers", more["bytes"], None, more["seconds"]),
        (f"pass, {LAYERS} layers, extrapolated", whole, plan["pass"], None),
        (f"probe, {arguments.prompts:,} prompts", rest["bytes"]["probe"], plan["probe"], rest["seconds"]["probe"]),
        (f"clusters of {rest['neurons']:,} neurons", rest["bytes"]["cluster"], None, rest["seconds"]["cluster"]),
    ]
    highest = max(whole, *rest["bytes"].values())
    if arguments.json:
        print(json.dumps({"rows": rows, "peak_bytes": highest, "limit_bytes": LIMIT}, indent=1))
    else:
        print("| stage | beyond the model | counted by `plan` | seconds |\n|---|---|---|---|")
        for name, size, expected, seconds in rows:
            told = "–" if expected is None else f"{expected / 2**30:.2f} GiB"
            print(f"| {name} | {size / 2**30:.2f} GiB | {told} | {'–' if seconds is None else seconds} |")
        print(f"\npeak {highest / 2**30:.2f} GiB; the limit is {LIMIT / 2**30:.0f} GiB")
    sys.exit(0 if highest < LIMIT else 1)


if __name__ == "__main__":
    main()
