"""The model hash: one digest that names a base model, whatever its checkpoint's files look like.

``model_hash`` is a SHA-256 over every tensor's name, dtype, shape and bytes: the same for any
sharding of a checkpoint and for the model loaded from it in the same dtype. A GGUF file's is over its
tensors as they stand there, quantized, and over the settings of its architecture. It trusts no file's
name, and does not prove who made a model: it says that two models hold the same numbers.
docs/reference/patch-format.md states it to the byte; base_rows.py has the digest of single rows.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nest_runtime.errors import ModelError
from nest_runtime.model.anatomy import canonical_name, unwrap
from nest_runtime.model.base_rows import tensor_bytes
from nest_runtime.model.gguf.header import find_gguf, read_header
from nest_runtime.model.gguf.identity import hash_gguf
from nest_runtime.model.hashcache import HashCache
from nest_runtime.model.hashing import HashJob, HashRow, digest_of, given, hash_all, mapped
from nest_runtime.model.weights import read_frame, weight_files
from nest_runtime.progress import Progress

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Tables that old checkpoints store and no model reads back: computed from the configuration.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias)$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_OUTPUT_EMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_ADAPTER_PARTS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save"}
)


def model_hash(model_or_folder: nn.Module | str | os.PathLike[str], *, progress: Progress | None = None) -> str:
    """The digest of a model: ``sha256:<hex>``.

    Args:
        model_or_folder: a model in memory, or a GGUF file or the folder of a checkpoint (streamed,
            never loaded; its result is cached by the files' identity under the nest-runtime home).
        progress: called with (``"hash"``, bytes done, bytes in all).

    Raises:
        ModelError: neither safetensors nor one GGUF file there, a damaged file, or a model in memory that is
            quantized or elsewhere.
    """
    if isinstance(model_or_folder, nn.Module):
        return _digest(_hash_model(model_or_folder, progress))
    return str(hash_report(model_or_folder, progress=progress)["hash"])


def hash_report(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> dict[str, Any]:
    """The hash of a checkpoint folder or a GGUF file with what it took.

    Returns:
        ``hash``, ``tensors`` (number hashed), ``bytes`` (of the weight files' tensors), ``seconds``,
        ``cached`` (whether it was known already).

    Raises:
        ModelError: as ``model_hash``.
    """
    began = time.perf_counter()
    gguf = find_gguf(folder)
    files = weight_files(Path(folder)) if gguf is None else [gguf]
    cache = HashCache(files)
    result = cache.get()
    cached = result is not None
    if result is None and gguf is not None:
        result = hash_gguf(read_header(gguf), progress)
        cache.put(result)
    elif result is None:
        rows, size = _hash_files(files, progress)
        result = {"hash": _digest(rows), "tensors": len(_identity(rows)), "bytes": size}
        cache.put(result)
    return {**result, "seconds": round(time.perf_counter() - began, 3), "cached": cached}


def tensor_digests(
    folder: str | os.PathLike[str], *, progress: Progress | None = None
) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Every tensor of a checkpoint folder: name → dtype, shape, SHA-256 of its bytes in hex.

    Raises:
        ModelError: as ``model_hash``.
    """
    rows, _ = _hash_files(weight_files(Path(folder)), progress)
    return {name: (dtype, shape, digest) for name, dtype, shape, digest in rows}


def _hash_files(files: list[Path], progress: Progress | None) -> tuple[list[HashRow], int]:
    """Hash every tensor of some safetensors files through memory maps; nothing is loaded whole."""
    with ExitStack() as stack:
        jobs = []
        for path in files:
            view, data_start, entries = _open(path, stack)
            for entry in entries:
                part = view[data_start + entry.start : data_start + entry.stop]
                stack.callback(part.release)
                jobs.append(HashJob(entry.name, entry.dtype, entry.shape, given(part), entry.nbytes))
        return hash_all(jobs, progress), sum(job.size for job in jobs)


def _open(path: Path, stack: ExitStack) -> tuple[memoryview, int, Any]:
    frame = read_frame(path)
    return mapped(path, stack), frame.data_start, frame.entries


def _hash_model(model: nn.Module, progress: Progress | None) -> list[HashRow]:
    jobs = []
    for name, tensor in _saved_state(unwrap(model)).items():
        read = partial(tensor_bytes, tensor)
        jobs.append(HashJob(name, _DTYPES[tensor.dtype], tuple(tensor.shape), read, tensor.nbytes))
    return hash_all(jobs, progress)


def _saved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that ``save_pretrained`` would write, by the names it would write; shapes and dtypes as in the file.

    Follows transformers 5.23 ``PreTrainedModel.save_pretrained``: tied weights once, and the renamings and conversions
    of loading reverted. PEFT adapters are not part of the base.
    """
    state = {
        canonical_name(name).replace(".original_module.", "."): value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not _ADAPTER_PARTS.intersection(name.split("."))
    }
    for key in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    _check_plain(state)
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = remove_tied_weights_from_state_dict(state, model)  # type: ignore[arg-type]
        state = revert_weight_conversion(model, state)  # type: ignore[arg-type]
    return state


def _check_plain(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors, of any shape, that are quantized or elsewhere: they have no bytes of their own to hash."""
    for name, tensor in state.items():
        if tensor.is_meta or type(tensor.data) not in (torch.Tensor, nn.Parameter) or tensor.dtype not in _DTYPES:
            state_of = "not in memory" if tensor.is_meta else f"{type(tensor.data).__name__} of {tensor.dtype}"
            raise ModelError(
                f"tensor {name} is {state_of}: this model cannot be hashed",
                "hash the folder of the unquantized checkpoint, and give that hash",
            )


def _identity(rows: list[HashRow]) -> list[HashRow]:
    """The rows that make a model's identity, sorted by name.

    Left out: an output embedding equal to the input embedding (stored by some checkpoints, tied in
    the model), and tables computed from the configuration.
    """
    inputs = {row[1:] for row in rows if _INPUT_EMBEDDING.search(row[0])}
    kept = [
        row
        for row in rows
        if not (_OUTPUT_EMBEDDING.search(row[0]) and row[1:] in inputs)
        and not _COMPUTED.search(row[0])
        and not (_CAUSAL_MASK.search(row[0]) and len(row[2]) == 4)
    ]
    return sorted(kept)


def _digest(rows: list[HashRow]) -> str:
    manifest = [[name, dtype, list(shape), digest] for name, dtype, shape, digest in _identity(rows)]
    return digest_of(manifest)
