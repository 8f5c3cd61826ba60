"""Row ``swap``: from one patch to another on a live model, as a hook and folded into the weights.

    python benchmarks/rows/swap.py --models FOLDER

Beside it PEFT changes between two adapters that compute the same: by ``set_adapter``, and by ``hotswap_adapter``, which
reads the next one from disk. A fold is beside a memcpy of the rows that it writes. SmolLM2 in float32 and bfloat16, and
random weights of Llama-3.2-1B's shapes (4 of its 16 layers).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Goal, Line, Report, Series, in_turns, run, threads
from subjects import SOME_HASH, adapters, llama_1b, load, random_patch, smallest, twin

from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    report = Report()
    for dtype in ("float32", "bfloat16"):
        loaded, patch = load(smallest(arguments), dtype)
        patches = [patch, twin(patch, "twin", -1.0)]
        with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
            for one in patches:
                runtime.add(one)
            report.lines += folds(runtime, patches, f"SmolLM2, {dtype}", arguments)
            if dtype == "float32":
                report.lines[:0] = hooks(runtime, patches, arguments)
    if not arguments.quick:
        model = llama_1b(4, arguments.seed)
        patch = random_patch(model, "v1", share=0.015, clusters=3, base_hash=SOME_HASH, seed=arguments.seed)
        patches = [patch, twin(patch, "twin", -1.0)]
        with PatchRuntime(model, base_hash=SOME_HASH) as runtime:
            for one in patches:
                runtime.add(one)
            report.lines += folds(runtime, patches, "Llama-3.2-1B's shapes, 4 layers, bfloat16", arguments)
    return report


def hooks(runtime: PatchRuntime, patches: list[Patch], arguments: argparse.Namespace) -> list[Line]:
    """A switch by assignment, beside what PEFT has."""
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    with TemporaryDirectory() as name:
        folders = adapters(patches, runtime.model, Path(name))
        other = PeftModel.from_pretrained(copy_of(runtime), folders[0], "a")
        other.load_adapter(folders[1], "b")
        turn = [0]

        def ours() -> None:
            turn[0] += 1
            runtime.activate(patches[turn[0] % 2].version, mode="hook")

        def set_adapter() -> None:
            turn[0] += 1
            other.set_adapter("ab"[turn[0] % 2])

        def hotswap() -> None:
            turn[0] += 1
            hotswap_adapter(other, str(folders[turn[0] % 2]), "a", torch_device="cpu")

        def reset(way: str) -> None:
            if way == "hotswap_adapter":
                other.set_adapter("a")

        ways = {"hook": ours, "set_adapter": set_adapter, "hotswap_adapter": hotswap}
        found = in_turns(ways, 5 if arguments.quick else 30, before=reset)
        runtime.deactivate()
    what = "hook, v1 ↔ twin, SmolLM2"
    return [
        Line(what, found["hook"], goal=Goal(100e-6)),
        Line(what, found["hook"], _named(found["set_adapter"], "PEFT set_adapter")),
        Line(what, found["hook"], _named(found["hotswap_adapter"], "PEFT hotswap_adapter"), Goal(1 / 50)),
    ]


def folds(runtime: PatchRuntime, patches: list[Patch], label: str, arguments: argparse.Namespace) -> list[Line]:
    """Base to folded, back, and from one patch to the other; beside a memcpy of the rows, read and written."""
    sources = written_rows(runtime, patches[0])
    targets = [source.clone() for source in sources]

    def copy_rows() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def start(way: str) -> None:
        if way == "on":
            runtime.deactivate()
        elif way in ("off", "swap"):
            runtime.activate(patches[0].version, mode="fold")

    ways = {
        "on": lambda: runtime.activate(patches[0].version, mode="fold"),
        "off": runtime.deactivate,
        "swap": lambda: runtime.activate(patches[1].version, mode="fold"),
        "memcpy": copy_rows,
    }
    found = in_turns(ways, 5 if arguments.quick else 60, before=start)
    runtime.deactivate()
    limit = _named(found["memcpy"], "memcpy of the rows")
    words = {"on": "fold on", "off": "fold off", "swap": "fold, v1 → twin"}
    size = sum(len(source) for source in sources)
    return [
        Line(f"{words[way]}, {label}", found[way], limit, Goal(2.0), f"{size:,} rows at {len(sources)} sites")
        for way in words
    ]


def written_rows(runtime: PatchRuntime, patch: Patch) -> list[torch.Tensor]:
    """A copy of the rows that a patch writes, site by site."""
    modules = dict(runtime.model.named_modules())
    return [
        modules[site.name].weight.detach()[site.neurons.tensor().long()]  # type: ignore[index,union-attr]
        for site in patch.sites
        if site.n_neurons
    ]


def copy_of(runtime: PatchRuntime) -> Any:
    """A second copy of the model, with no runtime on it."""
    model = type(runtime.model)(copy.deepcopy(runtime.model.config))  # type: ignore[arg-type,call-arg]
    model.load_state_dict(runtime.model.state_dict(), strict=False)
    model.tie_weights()  # type: ignore[operator]
    return model.to(runtime.model.dtype).eval()  # type: ignore[arg-type]


def _named(series: Series, name: str) -> Series:
    return Series(name, series.values, series.unit)


if __name__ == "__main__":
    run("swap", __doc__, measure)
