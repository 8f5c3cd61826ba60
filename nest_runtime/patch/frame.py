"""The outer frame of a safetensors file: 8 bytes of length, a JSON header, then data.

Reads and checks where each tensor's bytes are. Copies none of them and knows no tensor's meaning. It does not use the
safetensors package, because a patch needs a separate error for each broken rule, before anything is allocated.
Errors are ``FramingError``; callers raise their own from it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


class FramingError(ValueError):
    """The bytes are not a well-formed safetensors file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: its dtype's name, shape, and [start, stop) in the data area."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Frame:
    """A parsed header: entries in order of offset, the ``__metadata__`` strings, and where data begins."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    data_start: int


def header_length(prefix: bytes, file_size: int, limit: int) -> int:
    """The header's length from the first 8 bytes of a file, checked against the file's size and ``limit``.

    Raises:
        FramingError: the length does not fit.
    """
    if len(prefix) < 8:
        raise FramingError(f"truncated: {file_size} bytes, less than the 8 of the header's length")
    length = int.from_bytes(prefix[:8], "little")
    if length > limit:
        if prefix[:4] == b"GGUF":
            raise FramingError("it is a GGUF file, which holds a model; expected safetensors")
        raise FramingError(f"its first 8 bytes announce a header that is over the limit of {limit} bytes")
    if 8 + length > file_size:
        raise FramingError(f"truncated: a longer header is announced than the {file_size} bytes of the file")
    return length


def parse_frame(header: bytes, data_size: int) -> Frame:
    """Check a header against the size of the data area that follows it.

    Every entry must have exactly dtype, shape and data_offsets, and agree with its own size. The entries must tile the
    data area without gaps or overlaps.

    Raises:
        FramingError: a rule is broken; the message says which.
    """
    fields = parse_object(header, "header")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FramingError("__metadata__ is not an object of strings")
    entries = sorted((_entry(name, fields[name]) for name in fields), key=lambda e: (e.start, e.stop, e.name))
    at = 0
    for entry in entries:
        if entry.start != at:
            what = "gap" if entry.start > at else "overlap"
            raise FramingError(f"{what} before tensor {entry.name!r}: it starts at {entry.start}, expected {at}")
        at = entry.stop
        if at > data_size:
            raise FramingError(f"truncated: tensor {entry.name!r} ends at byte {at} of the data, which has {data_size}")
    if at < data_size:
        raise FramingError(f"{data_size - at} trailing bytes behind the last tensor")
    return Frame(tuple(entries), metadata, 8 + len(header))


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse strict JSON: UTF-8, one object, no key twice, no NaN or infinity, numbers of limited length.

    Raises:
        FramingError: it is not that.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, what),
            parse_constant=lambda name: _refuse(f"{what} holds {name}, which is not JSON"),
            parse_int=lambda digits: _integer(digits, what),
            parse_float=lambda digits: _float(digits, what),
        )
    except UnicodeDecodeError as error:
        raise FramingError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise FramingError(f"{what} is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise FramingError(f"{what} is not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise FramingError(f"{what} is a JSON {type(value).__name__}; expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise FramingError(f"{what} has the key {_short(twice)} twice")
    return result


def _integer(digits: str, what: str) -> int:
    if len(digits.lstrip("-")) > 18:
        raise FramingError(f"{what} holds a whole number of {len(digits)} digits; expected at most 18")
    return int(digits)


def _float(digits: str, what: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise FramingError(f"{what} holds the number {digits[:40]}, which is beyond 64-bit floating point")
    return value


def _refuse(message: str) -> None:
    raise FramingError(message)


def _entry(name: str, fields: Any) -> TensorEntry:
    where = f"tensor {_short(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FramingError(f"{where}: expected exactly dtype, shape and data_offsets in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FramingError(f"{where}: unknown dtype {_short(dtype)}")
    if not _naturals(shape) or len(shape) > 8:
        raise FramingError(f"{where}: shape {_short(shape)} is not a list of at most 8 sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FramingError(f"{where}: data_offsets {_short(offsets)} are not [start, stop]")
    size = DTYPE_BYTES[dtype]
    for length in shape:
        size *= length
    if size != offsets[1] - offsets[0]:
        raise FramingError(f"{where}: {dtype} {shape} takes {size} bytes; its offsets hold {offsets[1] - offsets[0]}")
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
