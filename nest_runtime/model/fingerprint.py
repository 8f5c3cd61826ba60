"""The model hash: one digest that names a base model, whatever its checkpoint's files look like.

``model_hash`` is a SHA-256 over every tensor's name, dtype, shape and bytes: the same for any
sharding of a checkpoint and for the model loaded from it in the same dtype. A GGUF file's is over its
tensors as they stand there, quantized, and over the settings of its architecture. ``rows_digest`` is over
the base's rows that a patch changes, cheap enough to check on every add. Neither trusts a file's
name, and neither proves who made a model: they say that two models hold the same numbers.
docs/reference/patch-format.md states both to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nest_runtime.errors import ModelError, SiteMismatch
from nest_runtime.io import expand
from nest_runtime.model.anatomy import Projection, canonical_name, find_projections, read_rows, unwrap
from nest_runtime.model.gguf.header import find_gguf, read_header
from nest_runtime.model.gguf.identity import hash_gguf
from nest_runtime.model.hashcache import HashCache
from nest_runtime.model.hashing import HashJob, HashRow, digest_of, given, hash_all, mapped
from nest_runtime.patch.frame import Frame, FramingError, header_length, parse_frame
from nest_runtime.progress import Progress

RowReader = Callable[[nn.Module, Projection, torch.Tensor], torch.Tensor]

_HEADER_LIMIT = 100 << 20  # as in the safetensors package
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


def rows_digest(
    model: nn.Module,
    neurons: Mapping[str, torch.Tensor],
    *,
    read: RowReader = read_rows,
    projections: Iterable[Projection] | None = None,
) -> str:
    """Digest of the base's rows that a patch changes: ``sha256:<hex>``.

    SHA-256 over, for each site in sorted order of name: the name in UTF-8 and a zero byte, the number
    of neurons as int32, their indices as int32, and those rows of W [n, d_in] as float32, row by row;
    all numbers little-endian. A site without neurons gives its name and the number 0.

    Args:
        model: the model with no patch on.
        neurons: site name → [n] indices, increasing.
        read: where rows come from instead of the live weights, e.g. from pristine copies or a checkpoint.
        projections: the model's, where they are known already: finding them takes longer than the digest.

    Raises:
        SiteMismatch: the model lacks a site, or a neuron is out of its range.
        ModelError: the weights are quantized or not in memory.
    """
    known = {p.name: p for p in (find_projections(model) if projections is None else projections)}
    digest = hashlib.sha256()
    for name in sorted(neurons):
        projection, index = known.get(name), neurons[name]
        if projection is None:
            raise SiteMismatch(
                f"{type(unwrap(model)).__name__} has no site {name!r}", "use a patch made for this architecture"
            )
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < projection.d_out):
            raise SiteMismatch(
                f"site {name}: a neuron is out of range [0, {projection.d_out})",
                "use a patch made for this architecture",
            )
        digest.update(name.encode() + b"\0" + len(index).to_bytes(4, "little"))
        if len(index):
            digest.update(_bytes(index.to("cpu", torch.int32)))
            digest.update(_bytes(read(model, projection, index).to("cpu", torch.float32)))
    return "sha256:" + digest.hexdigest()


def rows_fit(
    model: nn.Module,
    stored: Mapping[str, torch.Tensor],
    neurons: Mapping[str, torch.Tensor],
    digest: str,
    projections: Iterable[Projection] | None = None,
) -> bool:
    """Whether a rows digest is that of a checkpoint's rows, in any dtype that models are loaded in.

    Args:
        model: as in ``rows_digest``.
        stored: site name → [n, d_in] as the checkpoint holds them; sites without neurons may be left out.
        neurons: site name → [n] indices.
        digest: to compare with.
        projections: as in ``rows_digest``.
    """
    known = find_projections(model) if projections is None else list(projections)

    def made_in(dtype: torch.dtype) -> str:
        def read(_model: nn.Module, projection: Projection, _neurons: torch.Tensor) -> torch.Tensor:
            return stored[projection.name].to(dtype)

        return rows_digest(model, neurons, read=read, projections=known)

    return any(made_in(dtype) == digest for dtype in (torch.float32, torch.bfloat16, torch.float16))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from a folder.

    Raises:
        ModelError: there are none, the index is damaged, or a file it names is missing.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "name a folder with config.json and *.safetensors")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if named := _named_weights(folder):
        return _indexed_files(named) if named.name.endswith(".index.json") else [named]
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}); expected *.safetensors",
            "load it where you trust it and save it with save_pretrained, which writes safetensors",
        )
    raise ModelError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json",
        "name the folder of a complete safetensors checkpoint",
    )


def _named_weights(folder: Path) -> Path | None:
    """The weights that config.json names itself (``transformers_weights``): transformers takes those first."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}", "fetch the checkpoint again") from error
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    path = folder / str(name)
    if not path.name.endswith((".safetensors", ".safetensors.index.json")) or not path.is_file():
        raise ModelError(
            f"config.json names the weights {name!r}; expected a safetensors file in {folder}",
            "remove transformers_weights from config.json, or fetch the checkpoint again",
        )
    return path


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} is damaged: {type(error).__name__}: {error}", "fetch the checkpoint again"
        ) from error
    files = [index.parent / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ModelError(
            f"{index.name} names {len(files)} files; missing: {', '.join(missing[:3]) or 'all'}",
            "fetch the checkpoint again: it is incomplete",
        )
    return files


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


def read_frame(path: Path) -> Frame:
    """The header of a safetensors file.

    Raises:
        ModelError: it cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), size, _HEADER_LIMIT)
            return parse_frame(file.read(length), size - 8 - length)
    except (FramingError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "fetch the checkpoint again: it is damaged") from error


def _open(path: Path, stack: ExitStack) -> tuple[memoryview, int, Any]:
    frame = read_frame(path)
    return mapped(path, stack), frame.data_start, frame.entries


def _hash_model(model: nn.Module, progress: Progress | None) -> list[HashRow]:
    jobs = []
    for name, tensor in _saved_state(unwrap(model)).items():
        read = partial(_bytes, tensor)
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


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


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
