"""Row ``decode``: tokens one by one under one patch, as a hook and folded, beside the bare base and an unmerged LoRA.

    python benchmarks/rows/decode.py --models FOLDER

Batches of 1 and 8 on both real models, and on random weights of Llama-3.2-1B's shapes (4 of its 16 layers). The base
and the LoRA (PEFT, the adapter that the patch exports to, so of equal rank) have modules of their own with no runtime
near them, over the same weights in memory. A round times one decoding step of each, many times.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Clock, Goal, Line, Report, Series, in_turns, run, threads
from subjects import SOME_HASH, Real, adapters, llama_1b, load, random_patch, real_models, same_weights

from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime

BATCHES, PROMPT, STEPS = (1, 8), 32, 8
SECONDS = 25  # for one batch size of one model, where there is time
WAYS = ("base", "hook", "fold", "LoRA")


def measure(arguments: argparse.Namespace) -> Report:
    """The row's lines."""
    threads(arguments)
    report, left_out, clock = Report(), [], Clock(arguments.seconds)
    subjects = [real_subject(real) for real in real_models(arguments)]
    if not arguments.quick:
        subjects.append(random_subject(arguments.seed))
    for number, subject in enumerate(subjects):
        if not clock.one_more():
            left_out.append(subject.label)
            continue
        most = clock.share(len(BATCHES) * (len(subjects) - number), SECONDS)
        report.lines += one(subject, arguments, most)
        gc.collect()
    if left_out:
        report.more["left_out"] = left_out
    return report


@dataclass(frozen=True)
class Subject:
    """A model, and a patch for it."""

    label: str
    make: Callable[[], Any]
    patch: Callable[[Any], Patch]


def real_subject(real: Real) -> Subject:
    """A real model under its shipped patch."""
    return Subject(real.label, lambda: load(real)[0].model, lambda model: load(real)[1])


def random_subject(seed: int) -> Subject:
    """Llama-3.2-1B's shapes, and a random patch of the shipped ones' size: 1.5 % of the neurons, 3 clusters."""
    return Subject(
        "Llama-3.2-1B's shapes, 4 layers",
        lambda: llama_1b(4, seed),
        lambda model: random_patch(model, "v1", share=0.015, clusters=3, base_hash=SOME_HASH, seed=seed),
    )


def one(subject: Subject, arguments: argparse.Namespace, most: float) -> list[Line]:
    """One model's weights under three sets of modules, and both batches, for about ``most`` seconds each."""
    from peft import PeftModel

    base = subject.make()
    patched, adapted = same_weights(base), same_weights(base)
    patch = subject.patch(patched)
    dtype = str(base.dtype).removeprefix("torch.")
    lines: list[Line] = []
    with TemporaryDirectory() as name, PatchRuntime(patched, base_hash=patch.base_hash) as runtime:
        runtime.add(patch)
        (folder,) = adapters([patch], base, Path(name))
        lora = PeftModel.from_pretrained(adapted, folder).eval()
        models = {"base": base, "hook": patched, "fold": patched, "LoRA": lora}

        for batch in BATCHES:
            runtime.deactivate()
            decoding = {way: stepper(models[way], batch, arguments.seed) for way in WAYS}

            def switch(way: str, decoding: dict[str, Callable[..., None]] = decoding) -> None:
                """Switch, and decode a token untimed: after a fold the processor's caches hold other things."""
                runtime.deactivate()  # a fold changes the weights that all have
                if way in ("hook", "fold"):
                    runtime.activate(patch.version, mode=way)  # type: ignore[arg-type]
                decoding[way](1)

            found = in_turns(decoding, 2 if arguments.quick else 16, before=switch, most=most)
            lines += compared(f"{subject.label}, {dtype}, batch {batch}", batch, patch, found)
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


def stepper(model: Any, batch: int, seed: int) -> Callable[..., None]:
    """Reads a prompt, then decodes some tokens (``STEPS``) for each row, every time the same."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(model.config.vocab_size), (batch, PROMPT), generator=generator)
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=torch.tensor([-1])).past_key_values

    def decode(steps: int = STEPS) -> None:
        with torch.inference_mode():
            token = ids[:, -1:]
            for _ in range(steps):
                token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            cache.crop(-steps)

    return decode


if __name__ == "__main__":
    run("decode", __doc__, measure)
