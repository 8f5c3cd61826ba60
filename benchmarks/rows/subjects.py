"""What the rows measure with: the real models and their patches, twins of patches, and copies of models for peers."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measure import NotMeasured, models_folder

from nest_runtime.export.peft import export_peft
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.load import LoadedModel, load_model
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.patch.values import FrozenTensor

PATCHES = Path(__file__).parents[2] / "patches"
SOME_HASH = "sha256:" + 64 * "0"  # of a model that has none


@dataclass(frozen=True)
class Real:
    """A real model: what it is called here, its GGUF file, and the patch that is shipped for it."""

    label: str
    gguf: Path
    patch: Path


def real_models(arguments: argparse.Namespace) -> list[Real]:
    """SmolLM2-135M and Qwen2.5-Coder-0.5B; of ``--quick`` the smaller alone.

    Raises:
        NotMeasured: a file is missing.
    """
    folder = models_folder(arguments)
    names = {
        "SmolLM2-135M": ("smollm2-135m-instruct", "q4_1"),
        "Qwen2.5-Coder-0.5B": ("qwen2.5-coder-0.5b-instruct", "q4_k_m"),
    }
    found = [
        Real(label, folder / f"{name}-{kind}.gguf", PATCHES / name / "v1.safetensors")
        for label, (name, kind) in names.items()
    ]
    for one in found:
        if not one.gguf.is_file():
            raise NotMeasured(f"{one.gguf.name} is not in the folder of the real models")
    return found[:1] if arguments.quick else found


def smallest(arguments: argparse.Namespace) -> Real:
    """SmolLM2-135M."""
    return real_models(arguments)[0]


def load(real: Real, dtype: str = "auto") -> tuple[LoadedModel, Patch]:
    """The model in memory, and its shipped patch."""
    return load_model(real.gguf, device="cpu", dtype=dtype), read_patch(real.patch)


def same_weights(model: Any) -> Any:
    """A model of its own modules over the very weights of another.

    Two copies of the weights lie elsewhere in memory, and one may be some percent slower than the other for that alone.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def twin(patch: Patch, version: str, factor: float) -> Patch:
    """A patch of the same shape, its rows times ``factor``; its neurons and its base are the same."""
    return replace(
        patch, version=version, sites=tuple(_scaled(site, factor) for site in patch.sites), claims=None, parent=None
    )


def _scaled(site: Site, factor: float) -> Site:
    deltas = site.deltas.tensor().float().numpy() * np.float32(factor)
    return replace(site, deltas=FrozenTensor(deltas.astype("<f4").tobytes(), "F32", site.deltas.shape))


def random_site(name: str, d_in: int, d_out: int, neurons: int, clusters: int, generator: torch.Generator) -> Site:
    """A site of random neurons and rows."""
    chosen = torch.randperm(d_out, generator=generator)[:neurons].sort().values.int()
    deltas = 0.01 * torch.randn(clusters, d_in, generator=generator)
    return Site(name, d_out, deltas, chosen, (torch.arange(neurons) % clusters).int())  # type: ignore[arg-type]


def random_patch(
    model: Any, version: str, *, share: float, clusters: int, base_hash: str, seed: int, rows_digest: str = ""
) -> Patch:
    """A patch of random neurons and rows at every projection.

    Args:
        model: whose sites it has.
        version: its version.
        share: of each projection's neurons.
        clusters: of each projection.
        base_hash: the model's hash.
        seed: of neurons and rows.
        rows_digest: of the rows; computed without one.
    """
    from nest_runtime.model.base_rows import rows_digest as digest_of_rows

    generator = torch.Generator().manual_seed(seed)
    sites = tuple(
        random_site(p.name, p.d_in, p.d_out, max(clusters, round(share * p.d_out)), clusters, generator)
        for p in find_projections(model)
    )
    neurons = {site.name: site.neurons.tensor() for site in sites}
    return Patch(
        name="benchmark",
        version=version,
        base_hash=base_hash,
        rows_digest=rows_digest or digest_of_rows(model, neurons),
        architecture=type(model).__name__,
        sites=sites,
    )


def llama_1b(layers: int, seed: int) -> Any:
    """Random bfloat16 weights of Llama-3.2-1B's shapes, with so many of its 16 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def adapters(patches: Sequence[Patch], model: Any, folder: Path) -> list[Path]:
    """PEFT adapters that compute what the patches do."""
    return [export_peft(patch, folder / patch.version, model=model).folder for patch in patches]


@contextmanager
def work_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """``--work``, or a folder that is gone afterwards."""
    if arguments.work:
        Path(arguments.work).mkdir(parents=True, exist_ok=True)
        yield Path(arguments.work)
        return
    with TemporaryDirectory(prefix="nest-speed-") as name:
        yield Path(name)


def saved(real: Real, dtype: str, work: Path) -> Path:
    """The model as a folder that ``from_pretrained`` reads, made once."""
    folder = work / f"{real.gguf.stem}-{dtype}"
    if not (folder / "config.json").is_file():
        loaded = load_model(real.gguf, device="cpu", dtype=dtype)
        loaded.model.save_pretrained(folder.with_suffix(".part"))
        loaded.tokenizer.save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return folder
