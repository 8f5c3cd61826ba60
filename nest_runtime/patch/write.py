"""Patch files, written byte for byte the same each time; file.py reads them. docs/reference/patch-format.md specifies
both.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import NestError, PatchFormatError, reason_of
from nest_runtime.io import atomic_write, canonical_json, expand

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

METADATA_KEY = "nest_patch"
MAX_FILE = 1 << 30  # bytes
MAX_HEADER = 1 << 20  # bytes of the safetensors header, metadata included

_ORDER = ("F32", "I32", "BF16", "F16")  # of tensors in the file, as the safetensors package writes them


def save_patch(patch: Patch, path: str | os.PathLike[str]) -> Path:
    """Write a patch file atomically: a reader sees the old file or the whole new one.

    Returns:
        The path that was written.

    Raises:
        PatchFormatError: the patch cannot be a file (no rows digest, header or file too large).
        NestError: the path cannot be written.
    """
    target, data = expand(path), to_bytes(patch)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, data)
    except OSError as error:
        raise NestError(f"{target} cannot be written: {reason_of(error)}", "choose another path") from error
    return target


def to_bytes(patch: Patch) -> bytes:
    """The file of a patch as bytes: the same bytes for the same content, on any machine.

    Raises:
        PatchFormatError: ``rows_digest`` is missing, or the header or file would be too large.
    """
    if not patch.rows_digest:
        raise PatchFormatError(
            f"{patch.label} has no rows_digest",
            "set it from the base: patch.evolve(rows_digest=nest_runtime.rows_digest(model, …))",
        )
    text = canonical_json({**patch.header(), "digest": patch.digest}).decode()
    tensors = sorted(patch.tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype_name), item[0]))
    fields: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    at = 0
    for name, tensor in tensors:
        stop = at + len(tensor.data)
        fields[name] = {
            "dtype": tensor.dtype_name,
            "shape": list(tensor.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER or 8 + len(header) + at > MAX_FILE:
        raise PatchFormatError(
            f"the patch would have a header of {len(header)} bytes and {at} of data; "
            f"the limits are {MAX_HEADER} and a file of {MAX_FILE}",
            "record less in method, data, metrics or stats, or patch fewer neurons",
        )
    return b"".join([len(header).to_bytes(8, "little"), header, *(tensor.data for _, tensor in tensors)])
