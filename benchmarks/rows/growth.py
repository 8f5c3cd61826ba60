"""Row ``growth``: how costs grow with patches in a store, sites of a patch, prompts, and clients of a server.

    python benchmarks/rows/growth.py

A figure is the exponent between the two largest sizes of each: 1 is linear, 2 quadratic. What a size costs is in the
row's plots. The models are small random ones: what grows is ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import Goal, Line, Report, Series, in_turns, run, seconds, threads
from subjects import SOME_HASH, random_patch

sys.path.insert(0, str(Path(__file__).parents[1]))
LINEAR = Goal(1.15)  # of the exponent: near-linear
COLD = "fold on, cold caches"
CACHES = 96 << 20  # bytes, more than a processor's caches hold


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    report = Report(more={"plots": {}})
    for name, grow in {"store": store, "sites": sites, "prompts": prompts, "clients": clients}.items():
        sizes, figures, unit = grow(arguments)
        lines: dict[str, list[float]] = {name: [float(size) for size in sizes]}
        for what, values in figures.items():
            lines[what] = [statistics.median(one) for one in values]
            report.lines.append(exponent(f"{name}, {sizes[-2]:,} to {sizes[-1]:,}: {what}", sizes, values))
        report.more["plots"][name] = {"title": name, "x": name, "y": unit, "lines": lines}
    return report


def exponent(what: str, sizes: Sequence[int], values: Sequence[Sequence[float]]) -> Line:
    """The growth between the last two sizes."""
    step = math.log(sizes[-1] / sizes[-2])
    found = [math.log(b / a) / step for a, b in zip(values[-2], values[-1], strict=True)]
    return Line(what, Series("exponent", tuple(found), "exponent"), goal=LINEAR)


def store(arguments: argparse.Namespace) -> tuple[Sequence[int], dict[str, list[tuple[float, ...]]], str]:
    """Listing, finding and adding in a store that holds many patches."""
    from dataclasses import replace as changed

    from nest_runtime.resolve import load_patch
    from nest_runtime.store.entries import entry_of
    from nest_runtime.store.index import Index
    from nest_runtime.store.store import Store

    sizes = (10, 100) if arguments.quick else (10, 100, 1000, 10_000)
    patch = load_patch(Path(__file__).parents[2] / "patches" / "v3.safetensors")
    figures: dict[str, list[tuple[float, ...]]] = {"list": [], "find": [], "add": []}
    for size in sizes:
        with TemporaryDirectory() as name:
            found = Store(name)
            found.add(patch.evolve(name="first", version="v0"))
            entry = entry_of(patch, 1)
            digests = (f"sha256:{number:064x}" for number in range(size))
            entries = [changed(entry, version=f"n{number}", digest=digest) for number, digest in enumerate(digests)]
            index = Index(entries)
            found._index_path.write_bytes(index.to_bytes())  # the state that many commands would have left
            new = iter(range(10_000))
            ways: dict[str, Callable[[], Any]] = {
                "list": found.list,
                "find": lambda found=found, size=size: found.find(f"{patch.name}@n{size - 1}"),  # type: ignore[misc]
                "add": lambda found=found, new=new: found.add(patch.evolve(version=f"m{next(new)}")),  # type: ignore[misc]
            }
            timed = in_turns(ways, 2 if arguments.quick else 5)
            for way, series in timed.items():
                figures[way].append(series.values)
    return sizes, figures, "seconds"


def sites(arguments: argparse.Namespace) -> tuple[Sequence[int], dict[str, list[tuple[float, ...]]], str]:
    """Reading, adding, hooking and folding a patch of many sites.

    A patch of 100 sites and all that folding touches lie in the processor's caches, a patch of 1,000 does not. So
    folding is timed once more with the caches emptied before: what grows then is the work alone.
    """
    import numpy as np

    from nest_runtime.patch.file import read_patch
    from nest_runtime.runtime import PatchRuntime

    sizes = (10, 100) if arguments.quick else (10, 100, 1000)
    ways = ("read", "add", "hook on", "fold on", COLD)
    other = np.zeros(CACHES, np.uint8)  # whose bytes take the caches' place
    figures: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for size in sizes:
        model = random_llama(size // 2)
        patch = random_patch(model, "v1", share=0.05, clusters=2, base_hash=SOME_HASH, seed=0)
        times: dict[str, list[float]] = {way: [] for way in ways}
        with TemporaryDirectory() as name:
            file = patch.save(Path(name) / "v1.safetensors")
            for _ in range(2 if arguments.quick else 5):
                times["read"].append(seconds(lambda file=file: read_patch(file)))  # type: ignore[misc]
                with PatchRuntime(model, base_hash=SOME_HASH) as runtime:
                    times["add"].append(seconds(lambda runtime=runtime, patch=patch: runtime.add(patch)))  # type: ignore[misc]
                    for way, mode in {"hook on": "hook", "fold on": "fold", COLD: "fold"}.items():
                        runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
                        runtime.deactivate()
                        if way == COLD:
                            np.add(other, 1, out=other)
                        switch = lambda runtime=runtime, mode=mode: runtime.activate("v1", mode=mode)  # noqa: E731
                        times[way].append(seconds(switch))
                        runtime.deactivate()
        for way in ways:
            figures[way].append(tuple(times[way]))
    return sizes, figures, "seconds"


def prompts(arguments: argparse.Namespace) -> tuple[Sequence[int], dict[str, list[tuple[float, ...]]], str]:
    """Reading prompts, and locating with them."""
    from nest_runtime.model.anatomy import find_projections
    from nest_runtime.model.load import load_model
    from nest_runtime.prompts.examples import load_examples
    from nest_runtime.train.activations import pooled_activations
    from nest_runtime.train.cluster import cluster
    from nest_runtime.train.locate import locate
    from nest_runtime.train.recipe import Recipe

    sizes = (200, 400) if arguments.quick else (1_000, 10_000, 100_000)
    tokenizer, model, recipe = load_model("reference", device="cpu").tokenizer, random_llama(1), Recipe()
    figures: dict[str, list[tuple[float, ...]]] = {"read": [], "pass": [], "probes and clusters": []}
    for size in sizes:
        with TemporaryDirectory() as name:
            file = Path(name) / "prompts.jsonl"
            rows = ({"prompt": f"please tell me about number {number}"} for number in range(size))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            times = [seconds(lambda file=file: load_examples(file)) for _ in range(3)]  # type: ignore[misc]
            figures["read"].append(tuple(times))
            talks = [list(example.messages) for example in load_examples(file)]
            kept: list[Any] = []

            def forward(talks: list[Any] = talks, kept: list[Any] = kept) -> None:
                kept.append(pooled_activations(model, tokenizer, talks, find_projections(model)))

            def probes(kept: list[Any] = kept, size: int = size) -> None:
                labels = [number % 2 for number in range(size)]
                cluster(kept[0], locate(kept[0], labels, recipe), recipe)

            figures["pass"].append((seconds(forward),))
            figures["probes and clusters"].append((seconds(probes),))
    return sizes, figures, "seconds"


def clients(arguments: argparse.Namespace) -> tuple[Sequence[int], dict[str, list[tuple[float, ...]]], str]:
    """A server of the reference model: seconds until all clients have their answer."""
    import serving  # both servers, beside this folder

    sizes = (1, 8) if arguments.quick else (1, 4, 16, 64, 256)
    figures: list[tuple[float, ...]] = []
    model, patches = serving.reference()
    with TemporaryDirectory() as name:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with serving.ours(model, patches, arguments.threads, Path(name)) as (server, served):

            async def all_of_them(count: int) -> None:
                await asyncio.gather(*(serving.ask(server.port, served, f"What is {n}?", 16) for n in range(count)))

            for size in sizes:
                took = [seconds(lambda size=size: asyncio.run(all_of_them(size))) for _ in range(4)]  # type: ignore[misc]
                figures.append(tuple(took[1:]))
    return sizes, {"answers for all": figures}, "seconds"


def random_llama(layers: int) -> Any:
    """A small random model with two sites a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    run("growth", __doc__, measure)
