"""Where the time of the three shortest paths goes: a hook while it decodes, a fold, and a patch from disk.

    python benchmarks/profiles.py --models FOLDER                 # all three, about 4 minutes on 2 cores
    python benchmarks/profiles.py --models FOLDER --part fold

The table of speed (table.py) says what a path takes; this says why. Medians in microseconds.

hook: every operation of ``LinearDelta.apply`` timed by itself at every site, while the model decodes, and again with
nothing between two calls. The difference is the processor's caches. Each timed operation costs a clock call more.
fold: gathering the live rows, comparing them, and writing the others, beside the whole fold and a memcpy of the rows.
load: SHA-256 over the rows of an 8B-shaped model beside the whole way from a file to an active patch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "rows"))
import torch
from decode import BATCHES, stepper  # beside this file, as the next four
from load import hollow, rows_of_8b
from measure import MODELS, NotMeasured, threads
from subjects import SOME_HASH, llama_1b, load, random_patch, real_models, smallest
from swap import written_rows

from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.row_bytes import bits_of, row_bytes
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.runtime.delta import LinearDelta, live_projections, product

Times = dict[str, list[float]]


class Stopwatch:
    """Seconds of what came since the last lap, by name."""

    def __init__(self) -> None:
        self.times: Times = defaultdict(list)
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name].append(now - self._last)
        self._last = time.perf_counter()


def hook(arguments: argparse.Namespace) -> None:
    """The operations at a site, while the model decodes and warm."""
    for real in real_models(arguments):
        loaded, patch = load(real)
        for batch in BATCHES:
            watch = Stopwatch()
            calls, handles = hooked(loaded.model, patch, watch)
            decode = stepper(loaded.model, batch, arguments.seed)
            decode()  # builds what is kept
            watch.times.clear()
            for _ in range(2 if arguments.quick else 12):
                decode()
            for handle in handles:
                handle.remove()
            tell(f"hook, {real.label}, batch {batch}, {len(handles)} sites, decoding", watch.times)
            watch.times.clear()
            for _ in range(20 if arguments.quick else 5000):
                calls[0]()
            tell(f"hook, {real.label}, batch {batch}, one site again and again", watch.times)


def hooked(model: Any, patch: Patch, watch: Stopwatch) -> tuple[list[Callable[[], None]], list[Any]]:
    """A timed hook at every site of a patch; how to call each again with what it saw last, and the hooks' handles."""
    live = live_projections(model)
    again: list[Callable[[], None]] = []
    handles = []
    for site in patch.sites:
        if not site.n_neurons:
            continue
        here = live[site.name]
        delta = LinearDelta([(site, here.projection)])
        seen: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]
        again.append(partial(repeat, delta, seen, watch))

        def after(module: Any, call: Any, y: torch.Tensor, delta: LinearDelta = delta, seen: Any = seen) -> Any:
            seen[:] = call[0], y
            return timed(delta, call[0], y, watch)

        handles.append(here.module.register_forward_hook(after))
    return again, handles


def repeat(delta: LinearDelta, seen: list[torch.Tensor], watch: Stopwatch) -> None:
    """A site's update once more, with the last input and output."""
    timed(delta, seen[0], seen[1], watch)


def timed(delta: LinearDelta, x: torch.Tensor, y: torch.Tensor, watch: Stopwatch) -> torch.Tensor:
    """As ``LinearDelta.apply`` on a CPU, operation by operation."""
    with torch.inference_mode():
        tensors = delta.on(x.device, x.dtype)
        watch.start()
        update = product(x, tensors.deltas, tensors.wide)
        watch.lap("product")
        update = update.index_select(-1, tensors.clusters)
        watch.lap("select")
        if tensors.loadings is not None:
            update = update * tensors.loadings
            watch.lap("loadings")
        update = update.to(y.dtype)
        watch.lap("cast")
        places = delta.outputs(tensors.rows, y.numel() // y.shape[-1], y.shape[-1])
        watch.lap("places")
        changed = y.clone(memory_format=torch.contiguous_format)
        watch.lap("clone")
        changed.view(-1).index_add_(0, places, update.reshape(-1))
        watch.lap("add")
    return changed


def fold(arguments: argparse.Namespace) -> None:
    """The three passes over the rows."""
    for dtype in ("float32", "bfloat16"):
        loaded, patch = load(smallest(arguments), dtype)
        passes(loaded.model, patch, f"SmolLM2, {dtype}", arguments)
    if not arguments.quick:
        model = llama_1b(4, arguments.seed)
        patch = random_patch(model, "v1", share=0.015, clusters=3, base_hash=SOME_HASH, seed=arguments.seed)
        passes(model, patch, "Llama-3.2-1B's shapes, 4 layers, bfloat16", arguments)


def passes(model: Any, patch: Patch, label: str, arguments: argparse.Namespace) -> None:
    """Gather, compare and write of all sites, a whole fold, and a memcpy, in turns."""
    live = live_projections(model)
    with PatchRuntime(model, base_hash=patch.base_hash) as runtime:
        runtime.add(patch)
        sources = written_rows(runtime, patch)
        targets = [source.clone() for source in sources]
        sites = []
        for site, rows in zip((site for site in patch.sites if site.n_neurons), sources, strict=True):
            here = live[site.name]
            memory = row_bytes(here.module, here.projection, site.neurons.tensor())
            assert memory is not None, "plain memory of a CPU"
            assert memory.find() is rows.dtype
            held, bits, _ = bits_of(rows)
            sites.append((memory, held, bits, bits.copy()))
        watch = Stopwatch()
        for _ in range(5 if arguments.quick else 200):
            runtime.deactivate()
            watch.start()
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
            watch.lap("memcpy of the rows")
            runtime.activate(patch.version, mode="fold")
            watch.lap("fold on, whole")
            runtime.deactivate()
            watch.start()
            for memory, _, _, scratch in sites:
                memory.read(scratch)
            watch.lap("gather")
            same = [held == scratch for _, held, _, scratch in sites]
            watch.lap("compare")
            for memory, _, bits, _ in sites:
                memory.write(bits)
            watch.lap("write")
            assert all(same)
        size = sum(source.numel() * source.itemsize for source in sources) / 1e6
        tell(f"fold, {label}, {sum(map(len, sources)):,} rows at {len(sources)} sites, {size:.1f} MB", watch.times)


def load_8b(arguments: argparse.Namespace) -> None:
    """The digest of the rows beside all that a load does."""
    layers = 4 if arguments.quick else 32
    model = hollow(layers)
    patch = rows_of_8b(model, arguments.seed)
    watch = Stopwatch()
    with TemporaryDirectory() as name, PatchRuntime(model, base_hash=patch.base_hash) as runtime:
        file = patch.save(Path(name) / "patch.safetensors")
        assert len(find_projections(model)) == len(patch.sites)
        rows = [rows.float() for rows in written_rows(runtime, patch)]
        for _ in range(3 if arguments.quick else 20):
            watch.start()
            again = read_patch(file)
            watch.lap("read and check the file")
            added = runtime.add(again)
            watch.lap("add, the rows compared")
            runtime.activate(added, mode="hook")
            watch.lap("activate")
            runtime.deactivate()
            for key in list(runtime.patches):
                runtime.remove(key)
            watch.start()
            digest = hashlib.sha256()
            for one in rows:
                digest.update(one.numpy())
            watch.lap("SHA-256 of the rows alone")
    size = sum(one.numel() * one.itemsize for one in rows) / 1e6
    tell(f"load, 8B-shaped, {layers} layers, {size:.1f} MB of rows as float32", watch.times)


def tell(title: str, times: Mapping[str, list[float]]) -> None:
    """One line: the median of every part, in microseconds."""
    found = ", ".join(f"{name} {statistics.median(values) * 1e6:,.1f}" for name, values in times.items())
    print(f"{title}: {found}", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"hook": hook, "fold": fold, "load": load_8b}


def main() -> None:
    """Print the parts asked for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", choices=PARTS, help="one of them; all without it")
    made.add_argument("--models", default=os.environ.get(MODELS), help=f"folder of the real models (${MODELS})")
    made.add_argument("--quick", action="store_true", help="few rounds and small sizes: shows that it runs")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args()
    threads(arguments)
    for name in [arguments.part] if arguments.part else PARTS:
        try:
            PARTS[name](arguments)
        except NotMeasured as reason:
            sys.exit(f"not measured: {reason}")


if __name__ == "__main__":
    main()
