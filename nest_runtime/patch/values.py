"""Immutable values that patches are made of: tensors, JSON, and the digest over both.

Knows dtypes and bytes, but not sites, files or models. Torch is imported only to take or give a torch tensor, so that
fetching, verifying, signing and publishing a patch start fast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nest_runtime.errors import PatchFormatError
from nest_runtime.io import canonical_json

if TYPE_CHECKING:
    import torch

_DTYPES = {  # safetensors' name → torch's, and bytes of a number
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
TORCH_NAMES = {name: torch_name for name, (torch_name, _) in _DTYPES.items()}
_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
_EXPONENTS = {  # how to read a number's bits, and which of them are its exponent
    "F32": ("<u4", np.uint32(0x7F800000)),
    "BF16": ("<u2", np.uint16(0x7F80)),
    "F16": ("<u2", np.uint16(0x7C00)),
}
_PIECE = 1 << 20
MAX_DEPTH = 32  # of nested JSON; deeper is nobody's settings
MAX_INT = 2**53  # the largest whole number that every JSON reader keeps exactly


class FrozenTensor:
    """A tensor's dtype, shape and bytes, immutable.

    ``tensor()`` gives a fresh CPU copy each time: writing to it changes nothing here.

    Attributes:
        data: the elements' bytes, little-endian, in row-major order.
        dtype_name: the dtype as safetensors calls it: ``F32``, ``BF16``, ``F16``, ``I32``, …
        shape: the dimensions.
    """

    __slots__ = ("data", "dtype_name", "shape")

    data: bytes
    dtype_name: str
    shape: tuple[int, ...]

    def __init__(self, data: bytes, dtype_name: str, shape: tuple[int, ...]) -> None:
        if dtype_name not in _DTYPES:
            raise PatchFormatError(
                f"a tensor is {dtype_name!s:.40}; expected one of {', '.join(_DTYPES)}",
                "convert it to float32",
            )
        expected = math.prod(shape) * _DTYPES[dtype_name][1]
        if len(data) != expected:
            raise PatchFormatError(
                f"a {dtype_name} tensor {list(shape)} takes {expected} bytes; found {len(data)}",
                "give the tensor's own bytes",
            )
        object.__setattr__(self, "data", bytes(data))
        object.__setattr__(self, "dtype_name", dtype_name)
        object.__setattr__(self, "shape", tuple(shape))

    @classmethod
    def of(cls, value: torch.Tensor | FrozenTensor) -> FrozenTensor:
        """Freeze a tensor of any shape, device and stride; a frozen one is returned as it is.

        Raises:
            PatchFormatError: a patch cannot hold its dtype.
        """
        if isinstance(value, FrozenTensor):
            return value
        import torch

        name = str(value.dtype).removeprefix("torch.")
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return cls(data, _NAMES.get(name, name), tuple(value.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch calls it."""
        return torch_dtype(self.dtype_name)

    def tensor(self) -> torch.Tensor:
        """A fresh, writable CPU tensor of the same shape, dtype and content."""
        import torch

        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).reshape(self.shape)

    def integers(self) -> npt.NDArray[np.int64]:
        """The content of an I32 tensor as a fresh int64 array of the same shape."""
        return np.frombuffer(self.data, "<i4").reshape(self.shape).astype(np.int64)

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity. Reads in place, a piece at a time."""
        if self.dtype_name not in _EXPONENTS:
            return True
        unsigned, exponent = _EXPONENTS[self.dtype_name]
        numbers = np.frombuffer(self.data, unsigned)
        pieces = (numbers[at : at + _PIECE] for at in range(0, len(numbers), _PIECE))
        return not any(bool(((piece & exponent) == exponent).any()) for piece in pieces)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"FrozenTensor is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"FrozenTensor is immutable: cannot delete {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenTensor, (self.data, self.dtype_name, self.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTensor:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenTensor):
            return NotImplemented
        return (self.dtype_name, self.shape, self.data) == (other.dtype_name, other.shape, other.data)

    def __hash__(self) -> int:
        return hash((self.dtype_name, self.shape, self.data))

    def __repr__(self) -> str:
        return f"FrozenTensor({self.dtype_name}, {list(self.shape)})"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name.

    Raises:
        KeyError: the name is unknown.
    """
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return found


def content_digest(header: Mapping[str, Any], tensors: Mapping[str, FrozenTensor]) -> str:
    """The patch digest of docs/reference/patch-format.md; it covers content, not the file's layout.

    Args:
        header: the patch header without its digest.
        tensors: frozen tensors by file key, of any shape and dtype.

    Returns:
        ``sha256:<hex>``.
    """
    rows = [
        (name, tensor.dtype_name, tensor.shape, hashlib.sha256(tensor.data).hexdigest())
        for name, tensor in tensors.items()
    ]
    return digest_of(header, rows)


def digest_of(header: Mapping[str, Any], tensors: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """The patch digest from each tensor's name, dtype name, shape and SHA-256 in hex."""
    manifest = {
        "header": {key: value for key, value in header.items() if key != "digest"},
        "tensors": [[name, dtype, list(shape), sha256] for name, dtype, shape, sha256 in sorted(tensors)],
    }
    return "sha256:" + hashlib.sha256(canonical_json(manifest)).hexdigest()


def freeze_json(value: Any, where: str, depth: int = 0) -> Any:
    """JSON values with mappings and lists made read-only.

    Raises:
        PatchFormatError: anything JSON cannot hold: other types, NaN, infinity, keys that are no
            strings, lone surrogates; also whole numbers beyond ±2^53 and more than 32 levels.
    """
    if depth > MAX_DEPTH:
        raise PatchFormatError(f"{where} is nested deeper than {MAX_DEPTH} levels", "store a flatter value")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise PatchFormatError(f"{where} has a key that is no string", "use string keys")
        items = ((_text(key, where), freeze_json(item, where, depth + 1)) for key, item in value.items())
        return MappingProxyType(dict(items))
    if isinstance(value, list | tuple):
        return tuple(freeze_json(item, where, depth + 1) for item in value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise PatchFormatError(f"{where} holds a whole number beyond ±2^53", "store it as a string")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PatchFormatError(f"{where} holds {value}, which JSON cannot", "leave the figure out")
        return float(value)
    raise PatchFormatError(f"{where} holds a {type(value).__name__}", "use JSON values only")


def thaw_json(value: Any) -> Any:
    """The plain dicts and lists behind freeze_json."""
    if isinstance(value, Mapping):
        return {key: thaw_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw_json(item) for item in value]
    return value


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PatchFormatError(f"{where} holds a string that is not Unicode text", "use UTF-8 text") from error
    return str(value)
