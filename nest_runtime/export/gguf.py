"""A patch as a GGUF adapter for llama.cpp (``--lora``), written with the ``gguf`` package alone.

llama.cpp reads one scale for all tensors, alpha / rank, so every pair is padded with zeros to the largest rank and
alpha equals it. Tensor names are llama.cpp's own for the architecture. Experts are left to the long
way: export ``merged``, and convert that with llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nest_runtime.errors import ExportError
from nest_runtime.export.folder import NOTE, new_folder, write_note
from nest_runtime.export.lora import Pair, layout_of, pairs_of
from nest_runtime.install import extra
from nest_runtime.patch.patch import Patch

ADAPTER = "adapter.gguf"
# Class of the base → llama.cpp's name of its architecture, for those whose FFN weights it keeps as they are.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "SmolLM3ForCausalLM": "smollm3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi2",
    "Olmo2ForCausalLM": "olmo2",
    "Glm4ForCausalLM": "glm4",
    "FalconForCausalLM": "falcon",
    "GPTNeoXForCausalLM": "gptneox",
    "GPT2LMHeadModel": "gpt2",
    "Starcoder2ForCausalLM": "starcoder2",
    "BloomForCausalLM": "bloom",
    "NemotronForCausalLM": "nemotron",
}
_LAYER = re.compile(r"\.(\d+)\.")
_LONG_WAY = "export --to merged, and convert that with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class GgufAdapter:
    """What was written: where, names of the files, the rank, how many modules."""

    folder: Path
    files: tuple[str, ...]
    rank: int
    modules: int


def export_gguf(
    patch: Patch,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    architecture: str | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> GgufAdapter:
    """Write a patch as a GGUF LoRA adapter, ``adapter.gguf``, float32.

    Args:
        patch: the patch.
        folder: to be made; with ``overwrite`` an earlier export may stand there.
        model: the base, in memory or on the meta device; the patch's sites are checked against it where given.
        architecture: llama.cpp's name of the base's, as its GGUF file has it; by default that of the patch's class.
        overwrite: replace an earlier export.
        check: called with the finished folder before it takes its place; what it raises leaves nothing behind.

    Raises:
        ExportError: the architecture has no names in llama.cpp, the patch changes experts or nothing, or the
            folder is taken; or the ``gguf`` package is missing.
    """
    architecture = architecture or ARCHITECTURES.get(patch.architecture)
    names = tensor_names(patch, pairs := _linear_pairs(patch, model), architecture)
    rank = max(pair.rank for pair in pairs)
    with new_folder(folder, overwrite=overwrite) as staging:
        _write(staging / ADAPTER, patch, [pair.padded(rank) for pair in pairs], names, str(architecture))
        write_note(staging, "gguf", patch, rank=rank, modules=len(pairs))
        if check is not None:
            check(staging)
    return GgufAdapter(Path(folder), (ADAPTER, NOTE), rank, len(pairs))


def tensor_names(patch: Patch, pairs: list[Pair], architecture: str | None = None) -> dict[str, str]:
    """llama.cpp's names of the modules' weights, by module; raises ExportError if it has none."""
    gguf = _gguf()
    architecture = architecture or ARCHITECTURES.get(patch.architecture)
    known = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        raise ExportError(f"no GGUF adapter can be made for {patch.architecture or 'an unnamed class'}", _LONG_WAY)
    layers = 1 + max(int(found[1]) for pair in pairs if (found := _LAYER.search(f".{pair.module}.")))
    table = gguf.get_tensor_name_map(known, layers)
    names = {}
    for pair in pairs:
        # Multimodal models keep their language model one level down; llama.cpp converts it by itself.
        short = pair.module.replace("model.language_model.", "model.")
        name = table.get_name(f"{short}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ExportError(f"llama.cpp has no name for {pair.module} of {patch.architecture}", _LONG_WAY)
        names[pair.module] = name
    return names


def read_pairs(path: Path, names: dict[str, str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A GGUF adapter's pairs by module: A [r, d_in] and B [outputs, r] float32, scaled as llama.cpp scales them."""
    reader = _gguf().GGUFReader(path)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    pairs = {}
    for module, name in names.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        pairs[module] = a * (alpha / a.shape[0]), b
    return pairs


def _linear_pairs(patch: Patch, model: nn.Module | None) -> list[Pair]:
    pairs = pairs_of(patch, layout_of(patch, model))
    if any(pair.experts for pair in pairs):
        raise ExportError("GGUF adapters of experts are not supported", _LONG_WAY)
    return pairs


def _write(path: Path, patch: Patch, pairs: list[Pair], names: dict[str, str], architecture: str) -> None:
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"{patch.name} {patch.version}")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(pairs[0].rank))
    writer.add_string(gguf.Keys.Adapter.LORA_TASK_NAME, f"{patch.label} {patch.digest}")  # GET /lora-adapters shows it
    writer.add_string("nest.patch.digest", patch.digest)
    for pair in pairs:
        writer.add_tensor(f"{names[pair.module]}.lora_a", pair.a.contiguous().numpy())
        writer.add_tensor(f"{names[pair.module]}.lora_b", pair.b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ExportError("the gguf package is not installed", extra("gguf")) from error
    return gguf
