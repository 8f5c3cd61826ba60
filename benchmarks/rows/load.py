"""Row ``load``: a patch from disk to active, with every check, beside PEFT loading an adapter that computes the same.

    python benchmarks/rows/load.py --models FOLDER

Ours reads and verifies the file, compares the model's rows with those that the patch was made on, and switches it on
as a hook. PEFT's ``load_adapter`` reads safetensors and checks nothing. One model is SmolLM2 with its shipped patch, in
float32 against the numbers of the GGUF file too (the patch was made in bfloat16). The other has the shapes of an 8B: 32
layers of 4,096 × 14,336, whose weights are pages of zeros but for the patched rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Goal, Line, Report, Series, in_turns, run, threads
from subjects import SOME_HASH, adapters, load, random_patch, smallest

from nest_runtime.model.anatomy import find_projections, module_of, write_rows
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime

SHARE = 0.0025  # of an 8B's neurons: 36 of 14,336 at every projection


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    rounds = 3 if arguments.quick else 20
    report = Report()
    with TemporaryDirectory() as name:
        for label, model, patch, goal in subjects(arguments):
            folder = Path(name) / label.replace(" ", "-")
            found = beside_peft(model, patch, folder, rounds, label)
            what = f"disk to active, {label}"
            report.lines.append(Line(what, found["ours"], found["PEFT load_adapter"], Goal(1.0)))
            if goal is not None:
                report.lines.append(Line(what, found["ours"], goal=goal))
    return report


def subjects(arguments: argparse.Namespace) -> Any:
    """Label, model, patch and a limit of seconds; one at a time in memory."""
    for dtype in ("bfloat16", "float32"):
        loaded, patch = load(smallest(arguments), dtype)
        yield f"SmolLM2, {dtype}", loaded.model, patch, None
        del loaded
    layers = 4 if arguments.quick else 32
    model = hollow(layers)
    yield f"8B-shaped, {layers} layers, bfloat16", model, rows_of_8b(model, arguments.seed), Goal(20e-3)


def hollow(layers: int) -> Any:
    """A model of an 8B's shapes whose memory nobody has touched: pages of zeros that take no room."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.to_empty(device="cpu").eval().requires_grad_(False)


def rows_of_8b(model: Any, seed: int) -> Patch:
    """A random patch, after its rows of the model have become random numbers."""
    patch = random_patch(model, "v1", share=SHARE, clusters=2, base_hash=SOME_HASH, seed=seed, rows_digest=SOME_HASH)
    generator = torch.Generator().manual_seed(seed)
    projections = {projection.name: projection for projection in find_projections(model)}
    for site in patch.sites:
        rows = torch.randn(site.n_neurons, site.d_in, generator=generator)
        projection = projections[site.name]
        assert module_of(model, projection) is not None
        write_rows(model, projection, site.neurons.tensor(), rows)
    return random_patch(model, "v1", share=SHARE, clusters=2, base_hash=SOME_HASH, seed=seed)


def beside_peft(model: Any, patch: Patch, folder: Path, rounds: int, label: str) -> dict[str, Series]:
    """Seconds from a file to the next forward pass being patched, ours and PEFT's."""
    from peft import PeftModel

    folder.mkdir()
    file = patch.save(folder / "patch.safetensors")
    (adapter,) = adapters([patch], model, folder)
    runtime = PatchRuntime(model, base_hash=patch.base_hash)

    def ours() -> None:
        runtime.activate(runtime.add(read_patch(file)), mode="hook")

    def forget(way: str) -> None:
        runtime.deactivate()
        for key in list(runtime.patches):
            runtime.remove(key)

    forget("")
    mine: list[float] = []
    mine += in_turns({"ours": ours}, rounds, before=forget, warm=2)["ours"].values
    forget("")
    runtime.close()
    peft = PeftModel.from_pretrained(model, adapter, "first")

    def theirs() -> None:
        peft.load_adapter(str(adapter), "next")
        peft.set_adapter("next")

    def drop(way: str) -> None:
        if "next" in peft.peft_config:
            peft.delete_adapter("next")

    their_name = "PEFT load_adapter"
    found = in_turns({their_name: theirs}, rounds, before=drop, warm=2)[their_name]
    drop("")
    peft.unload()
    return {"ours": Series("ours", tuple(mine)), their_name: found}


if __name__ == "__main__":
    run("load", __doc__, measure)
