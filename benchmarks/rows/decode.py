"""Row ``decode``: tokens one by one under one patch, as a hook and folded, beside the bare base and an unmerged LoRA.

    python benchmarks/rows/decode.py --models FOLDER

Batches of 1 and 8 on both real models. The base and the LoRA (PEFT, the adapter that the patch exports to, so of equal
rank) are models of their own with no runtime near them. A round times one decoding step of each, many times.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Goal, Line, Report, Series, in_turns, run, threads
from subjects import Real, adapters, load, real_models

from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime

PROMPT, STEPS = 32, 16
SECONDS = 25  # for one batch size of one model
WAYS = ("base", "hook", "fold", "LoRA")


def measure(arguments: argparse.Namespace) -> Report:
    """The row's lines."""
    threads(arguments)
    report = Report()
    for real in real_models(arguments):
        report.lines += one(real, arguments)
        gc.collect()
    return report


def one(real: Real, arguments: argparse.Namespace) -> list[Line]:
    """One model in three copies, and both batches."""
    from peft import PeftModel

    loaded, patch = load(real)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    base, adapted = load(real, dtype)[0].model, load(real, dtype)[0].model
    lines: list[Line] = []
    with TemporaryDirectory() as name, PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        runtime.add(patch)
        (folder,) = adapters([patch], base, Path(name))
        lora = PeftModel.from_pretrained(adapted, folder).eval()
        models = {"base": base, "hook": loaded.model, "fold": loaded.model, "LoRA": lora}

        def switch(way: str) -> None:
            if way in ("hook", "fold"):
                runtime.activate(patch.version, mode=way)  # type: ignore[arg-type]

        for batch in (1, 8):
            runtime.deactivate()
            decoding = {way: stepper(models[way], batch, arguments.seed) for way in WAYS}
            found = in_turns(decoding, 2 if arguments.quick else 16, before=switch, most=SECONDS)
            lines += compared(f"{real.label}, {dtype}, batch {batch}", batch, patch, found)
    return lines


def compared(what: str, batch: int, patch: Patch, found: dict[str, Series]) -> list[Line]:
    """One model and batch."""
    rates = {way: Series(way, tuple(batch * STEPS / value for value in found[way].values), "tok/s") for way in WAYS}
    bare = Series("bare base", rates["base"].values, "tok/s")
    lora = Series(f"PEFT LoRA, rank {patch_rank(patch)}", rates["LoRA"].values, "tok/s")
    return [
        Line(f"decode, hook, {what}", rates["hook"], bare, Goal(0.98, at_least=True)),
        Line(f"decode, fold, {what}", rates["fold"], bare, Goal(0.99, at_least=True)),
        Line(f"decode, PEFT LoRA unmerged, {what}", lora, bare),
        *overhead(what, found),
    ]


def overhead(what: str, found: dict[str, Series]) -> list[Line]:
    """What a hook adds to a step beside what a LoRA adds, medians; nothing where either is lost in the noise."""
    base = found["base"].values
    added = {
        way: statistics.median(a - b for a, b in zip(found[way].values, base, strict=True)) / STEPS
        for way in ("hook", "LoRA")
    }
    if min(added.values()) <= 0:
        return []
    hook, lora = Series("hook", (added["hook"],)), Series("PEFT LoRA adds", (added["LoRA"],))
    return [Line(f"added to a step by the hook, {what}", hook, lora, Goal(0.5))]


def patch_rank(patch: Patch) -> int:
    """The largest rank of a site."""
    return max(site.n_clusters for site in patch.sites)


def stepper(model: Any, batch: int, seed: int) -> Callable[[], None]:
    """Reads a prompt, then decodes ``STEPS`` tokens for each row, every time the same."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(model.config.vocab_size), (batch, PROMPT), generator=generator)
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> None:
        with torch.inference_mode():
            token = ids[:, -1:]
            for _ in range(STEPS):
                token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            cache.crop(-STEPS)

    return decode


if __name__ == "__main__":
    run("decode", __doc__, measure)
