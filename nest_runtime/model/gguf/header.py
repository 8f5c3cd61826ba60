"""The header of a GGUF file, read and checked without loading a tensor, and which GGUF file a path means.

GGUF versions 2 and 3, little-endian, as llama.cpp's converter and quantizer write them. Every length and offset is
checked against the file before it is used. What the numbers mean for a model is model.py's business.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from nest_runtime.errors import ModelError, reason_of
from nest_runtime.install import extra

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_SETTLED_NS = 2_000_000_000  # a file touched more recently may change again within one clock tick
_AGAIN = "fetch the file again: it is incomplete or damaged"


@dataclass(frozen=True)
class MetadataValue:
    """One metadata value of the file: its type, and where its bytes are."""

    type: int
    start: int
    stop: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's, e.g. ``blk.0.ffn_gate.weight``.
        type: GGML's number of the type (0 F32, 1 F16, 8 Q8_0, 12 Q4_K, …).
        shape: in the order of PyTorch: rows first.
        start, nbytes: where its bytes are in the file.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file except the numbers of its tensors.

    Attributes:
        path: the file.
        values: metadata by key.
        tensors: by name, in the file's order.
        raw: the file's bytes up to the first tensor's.
        alignment: of tensors, in bytes.
    """

    path: Path
    values: Mapping[str, MetadataValue]
    tensors: Mapping[str, Tensor]
    raw: bytes
    alignment: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, e.g. ``qwen2``."""
        return str(self.get("general.architecture"))

    def get(self, key: str) -> Any:
        """A metadata value in Python's types, a list for an array; None if it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        return _Reader(self.raw, self.path).value(value.type, value.start)[0]

    def count(self, key: str) -> int:
        """The length of an array value, without reading it; 0 where it is absent."""
        value = self.values.get(key)
        return (
            0 if value is None or value.type != _ARRAY else int(struct.unpack_from("<Q", self.raw, value.start + 4)[0])
        )

    def value_bytes(self, key: str) -> bytes:
        """A metadata value's bytes as they are in the file."""
        value = self.values[key]
        return self.raw[value.start : value.stop]


def find_gguf(path: str | os.PathLike[str]) -> Path | None:
    """The GGUF model that a path means: the file itself, or the only one in a folder that holds no safetensors.

    Returns:
        The file, or None if the path is a folder with safetensors or without GGUF files, or is not there.

    Raises:
        ModelError: the path is a file of another kind, or a folder with several models.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if _begins_as_gguf(path):
            return path
        raise ModelError(
            f"{path} is a file, but no GGUF file; expected a model folder or a .gguf file",
            "name the folder that holds config.json, or a GGUF file",
        )
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return None
    # A model that reads images has its projector in a file of its own, by convention of this name.
    found = sorted(file for file in path.glob("*.gguf") if file.is_file() and not file.name.startswith("mmproj"))
    if len(found) > 1:
        raise ModelError(
            f"{path} holds {len(found)} GGUF files: {', '.join(file.name for file in found[:4])}"
            f"{', …' if len(found) > 4 else ''}; expected one model",
            f"name the one that is meant: {path / found[0].name}",
        )
    return found[0] if found else None


def read_header(path: Path) -> Header:
    """Read and check a GGUF model's header.

    Raises:
        ModelError: the file is no GGUF file, truncated, damaged, one of several parts, or no model; or the package
            gguf is not installed.
    """
    try:
        facts = path.stat()
        identity = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev)
        settled = time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) > _SETTLED_NS
        return (_read if settled else _read.__wrapped__)(path, identity)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read: {reason_of(error)}", _AGAIN) from error


@lru_cache(maxsize=2)
def _read(path: Path, identity: tuple[int, ...]) -> Header:
    """A header, kept while the file is the same: a start reads it for the hash, for the weights and for a check."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        header = _Reader(mapped, path).header()
    _check_model(header)
    return header


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) == MAGIC
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason_of(error)}", "check the path and its permissions") from error


def _check_model(header: Header) -> None:
    kind, parts = header.get("general.type"), header.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{header.path} is part {int(header.get('split.no') or 0) + 1} of {parts} of a split GGUF model",
            "join the parts: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf, and name the whole",
        )
    if kind not in (None, "model"):
        raise ModelError(
            f"{header.path} holds a GGUF {kind}; expected a model", "name the GGUF file of the model that it belongs to"
        )
    if not isinstance(header.get("general.architecture"), str) or not header.tensors:
        raise ModelError(f"{header.path} names no architecture or holds no tensors; expected a model", _AGAIN)


def type_sizes() -> dict[int, tuple[int, int]]:
    """GGML's types by number: how many numbers a block holds, and its bytes.

    Raises:
        ModelError: the package gguf is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise ModelError("reading GGUF files needs the package gguf, which is not installed", extra("gguf")) from error
    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


class _Reader:
    """Reads values from a buffer at given places; raises ModelError if it ends too early."""

    def __init__(self, data: Any, path: Path) -> None:
        self.data, self.path, self.size = data, path, len(data)

    def header(self) -> Header:
        if self.data[:4] != MAGIC:
            raise ModelError(f"{self.path} does not begin with {MAGIC!r}: it is no GGUF file", _AGAIN)
        (version,) = self.unpack("<I", 4)
        if version not in (2, 3):
            big = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
            raise ModelError(f"{self.path} is GGUF, {big}; expected version 2 or 3, little-endian", "convert it anew")
        tensor_count, value_count = self.unpack("<QQ", 8)
        values, place = self._values(value_count, 24)
        entries = {}
        for _ in range(tensor_count):
            name, shape, kind, offset, place = self._entry(place)
            if name in entries:
                raise ModelError(f"{self.path}: tensor {name} appears twice", _AGAIN)
            entries[name] = (kind, shape, offset)
        alignment = self._alignment(values)
        data_start = place + -place % alignment
        sizes = type_sizes()
        tensors = {
            name: self._tensor(name, kind, shape, data_start + offset, sizes)
            for name, (kind, shape, offset) in entries.items()
        }
        return Header(self.path, values, tensors, bytes(self.data[:data_start]), alignment)

    def _values(self, count: int, place: int) -> tuple[dict[str, MetadataValue], int]:
        values: dict[str, MetadataValue] = {}
        for _ in range(count):
            key, place = self.string(place)
            (kind,) = self.unpack("<I", place)
            stop = self.skip(kind, place + 4)
            if key in values:
                raise ModelError(f"{self.path}: metadata {key} appears twice", _AGAIN)
            values[key] = MetadataValue(kind, place + 4, stop)
            place = stop
        return values, place

    def _entry(self, place: int) -> tuple[str, tuple[int, ...], int, int, int]:
        name, place = self.string(place)
        (dimensions,) = self.unpack("<I", place)
        if not 0 < dimensions <= 4:
            raise self.damaged(f"tensor {name} has {dimensions} dimensions")
        shape = self.unpack(f"<{dimensions}Q", place + 4)
        kind, offset = self.unpack("<IQ", place + 4 + 8 * dimensions)
        return name, tuple(reversed(shape)), kind, offset, place + 16 + 8 * dimensions

    def _tensor(
        self, name: str, kind: int, shape: tuple[int, ...], start: int, sizes: Mapping[int, tuple[int, int]]
    ) -> Tensor:
        if kind not in sizes:
            raise ModelError(
                f"{self.path}: tensor {name} is of GGML type {kind}, which the installed package gguf does not know",
                "pip install --upgrade gguf, or use another quantization of the model",
            )
        block, size = sizes[kind]
        if shape[-1] % block:
            raise self.damaged(f"tensor {name} has rows of {shape[-1]} numbers in blocks of {block}")
        nbytes = prod(shape) // block * size
        if start + nbytes > self.size:
            raise self.damaged(f"tensor {name} ends at byte {start + nbytes:,}")
        return Tensor(name, kind, shape, start, nbytes)

    def _alignment(self, values: Mapping[str, MetadataValue]) -> int:
        value = values.get("general.alignment")
        alignment = 32 if value is None else self.value(value.type, value.start)[0]
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged(f"its alignment is {alignment!r}")
        return alignment

    def value(self, kind: int, place: int) -> tuple[Any, int]:
        """The value at a place, and the place behind it."""
        if kind == _STRING:
            return self.string(place)
        if kind != _ARRAY:
            return self.unpack(f"<{_SCALARS[kind]}", place)[0], self.skip(kind, place)
        inner, count = self.unpack("<IQ", place)
        if inner in _SCALARS:
            stop = self.skip(kind, place)
            return list(self.unpack(f"<{count}{_SCALARS[inner]}", place + 12)), stop
        items, place = [], place + 12
        for _ in range(count):
            item, place = self.value(inner, place)
            items.append(item)
        return items, place

    def skip(self, kind: int, place: int) -> int:
        """The place behind a value."""
        if kind in _SCALARS:
            return self._within(place + struct.calcsize(f"<{_SCALARS[kind]}"))
        if kind == _STRING:
            return self._within(place + 8 + self.unpack("<Q", place)[0])
        if kind != _ARRAY:
            raise self.damaged(f"a metadata value is of type {kind}")
        inner, count = self.unpack("<IQ", place)
        place += 12
        if inner in _SCALARS:
            return self._within(place + count * struct.calcsize(f"<{_SCALARS[inner]}"))
        if inner == _ARRAY:  # nobody writes arrays of arrays, and their depth would have no end
            raise self.damaged("a metadata value is an array of arrays")
        if inner != _STRING:
            raise self.damaged(f"a metadata value is of type {inner}")
        data, last, length = self.data, self.size - 8, _LENGTH.unpack_from
        for _ in range(count):  # one for every token of a vocabulary
            if place > last:
                raise self.damaged(f"its header goes on to byte {place + 8:,}")
            place += 8 + length(data, place)[0]
        return self._within(place)

    def string(self, place: int) -> tuple[str, int]:
        (length,) = self.unpack("<Q", place)
        stop = self._within(place + 8 + length)
        try:
            return bytes(self.data[place + 8 : stop]).decode(), stop
        except UnicodeDecodeError as error:
            raise self.damaged(f"text at byte {place + 8} is not UTF-8") from error

    def unpack(self, form: str, place: int) -> tuple[Any, ...]:
        self._within(place + struct.calcsize(form))
        return struct.unpack_from(form, self.data, place)

    def _within(self, place: int) -> int:
        if place > self.size:
            raise self.damaged(f"its header goes on to byte {place:,}")
        return place

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} has {self.size:,} bytes, but {what}: it is truncated or damaged", _AGAIN)
