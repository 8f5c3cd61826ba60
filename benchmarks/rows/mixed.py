"""Row ``mixed``: one batch whose rows are under 1, 4, 16 and 64 patches, beside the base and PEFT's mixed adapters.

    python benchmarks/rows/mixed.py --models FOLDER

64 rows, one token each, on SmolLM2 in bfloat16 with a cache of 32 tokens behind them. Every patch has neurons of its
own at every site of the shipped one. PEFT gets the same adapters by name, ``adapter_names``. All run on the very
same weights in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Clock, Goal, Line, Report, Series, in_turns, run, threads
from subjects import adapters, load, random_site, same_weights, smallest

from nest_runtime.model.base_rows import rows_digest
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime

ROWS, PROMPT, STEPS = 64, 32, 4
SECONDS = 15  # for one number of patches, where there is time
GOALS = {1: 0.95, 4: 0.95, 16: None, 64: 0.85}


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    from peft import PeftModel

    clock, left_out = Clock(arguments.seconds), []
    real = smallest(arguments)
    loaded, shipped = load(real)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    counts = (1, 4) if arguments.quick else tuple(GOALS)
    base, adapted = same_weights(loaded.model), same_weights(loaded.model)
    patches = [other(shipped, loaded.model, number) for number in range(max(counts))]
    lines: list[Line] = []
    growth: dict[str, list[float]] = {"patches": [], "ours": [], "PEFT": []}
    with TemporaryDirectory() as name, PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        for patch in patches:
            runtime.add(patch)
        folders = adapters(patches, base, Path(name))
        peft = PeftModel.from_pretrained(adapted, folders[0], patches[0].version).eval()
        for patch, folder in zip(patches[1:], folders[1:], strict=True):
            peft.load_adapter(str(folder), patch.version)
        clock.set_up()
        for number, count in enumerate(counts):
            if not clock.one_more():
                left_out.append(f"{count} patches")
                continue
            most = clock.share(len(counts) - number, SECONDS)
            names = [patches[row % count].version for row in range(ROWS)]
            plain = stepper(base, {}, arguments.seed)
            theirs = stepper(peft, {"adapter_names": names}, arguments.seed)
            mine = stepper(loaded.model, {}, arguments.seed)

            def ours(names: list[str] = names, mine: Callable[[], None] = mine) -> None:
                with runtime.using_rows(names):
                    mine()

            ways = {"base": plain, "ours": ours, "PEFT": theirs}
            found = in_turns(ways, 2 if arguments.quick else 8, most=most)
            rates = {way: tuple(ROWS * STEPS / value for value in series.values) for way, series in found.items()}
            mixed, bare = Series("ours", rates["ours"], "tok/s"), Series("bare base", rates["base"], "tok/s")
            limit = GOALS[count]
            goal = None if limit is None else Goal(limit, at_least=True)
            what = f"{ROWS} rows under {count} patches, SmolLM2, {dtype}"
            lines.append(Line(what, mixed, bare, goal))
            lines.append(Line(what, mixed, Series("PEFT adapter_names", rates["PEFT"], "tok/s")))
            growth["patches"].append(count)
            for way in ("ours", "PEFT"):
                growth[way].append(found["base"].median / found[way].median)
    plot = {"title": "one batch under many patches", "x": "patches", "y": "speed, × base", "lines": growth}
    return Report(lines, {"plots": {"mixed": plot}, **({"left_out": left_out} if left_out else {})})


def other(shipped: Patch, model: Any, number: int) -> Patch:
    """A random patch at the shipped one's sites, with as many neurons and clusters."""
    generator = torch.Generator().manual_seed(number)
    sites = tuple(
        random_site(site.name, site.d_in, site.d_out, site.n_neurons, site.n_clusters, generator)
        for site in shipped.sites
        if site.n_neurons
    )
    digest = rows_digest(model, {site.name: site.neurons.tensor() for site in sites})
    return shipped.evolve(name="benchmark", version=f"p{number}", sites=sites, rows_digest=digest, parent=None)


def stepper(model: Any, options: dict[str, Any], seed: int) -> Callable[[], None]:
    """Decodes ``STEPS`` tokens for every row behind the same prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(model.config.vocab_size), (ROWS, PROMPT), generator=generator)
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=torch.tensor([-1]), **options).past_key_values

    def decode() -> None:
        with torch.inference_mode():
            token = ids[:, -1:]
            for _ in range(STEPS):
                logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1, **options).logits
                token = logits.argmax(-1)
            cache.crop(-STEPS)

    return decode


if __name__ == "__main__":
    run("mixed", __doc__, measure)
