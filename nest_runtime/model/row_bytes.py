"""Rows of one weight in the memory of a CPU, found once: read and written as bytes, at the price of copying them.

torch takes several microseconds for each call that reads, compares or writes a few rows; a patch has dozens of such
sites. Bytes say the same: rows are equal where their bytes are. Whatever is not plain memory, row after row (another
device, quantized weights, experts, transposed layouts), is not found here, and rows.py serves it.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import nn

from nest_runtime.model.projection import Projection, shape_of

_BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float64: np.uint64}


class RowBytes:
    """Some rows of one projection's weight.

    Args:
        module: the projection's module.
        projection: of layout ``linear``, without experts.
        neurons: [n] integer indices in [0, d_out).
    """

    def __init__(self, module: nn.Module, projection: Projection, neurons: torch.Tensor) -> None:
        outputs, inputs, _ = shape_of(module)
        self._module, self._parameter = module, projection.parameter
        self._shape = (outputs, inputs)
        self._index = projection.rows(neurons.cpu().long()).numpy()  # (n,)
        self._where: tuple[int, torch.dtype, int] | None = None
        self._weight: np.ndarray | None = None

    def find(self) -> torch.dtype | None:
        """See where the weight is now; its dtype, or None if it is no plain memory of a CPU, row after row."""
        weight = self._module._parameters.get(self._parameter)
        if type(weight) is not nn.Parameter or not weight.is_cpu or not weight.is_contiguous():
            return None
        where = (weight.data_ptr(), weight.dtype, weight.numel())
        if where != self._where:
            bits = _BITS.get(weight.dtype)
            if bits is None or tuple(weight.shape) != self._shape:
                return None
            # The view owns nothing: it must not keep a weight alive that the model has let go of. It is used only
            # after this very check has found the live weight at its place.
            memory = (ctypes.c_uint8 * (weight.numel() * weight.itemsize)).from_address(weight.data_ptr())
            self._where, self._weight = where, np.frombuffer(memoryview(memory), bits).reshape(self._shape)
        return weight.dtype

    def read(self, into: np.ndarray) -> None:
        """Copy the rows' bits into an array [n, d_in] of unsigned integers, as wide as the dtype; after ``find``."""
        assert self._weight is not None
        self._weight.take(self._index, 0, into, "clip")

    def write(self, rows: np.ndarray) -> None:
        """Overwrite the rows with the bits of an array [n, d_in] of unsigned integers; after ``find``."""
        assert self._weight is not None
        self._weight[self._index] = rows


def row_bytes(module: nn.Module, projection: Projection, neurons: torch.Tensor) -> RowBytes | None:
    """The rows of some neurons as bytes, or None if the layout is another.

    Args:
        module: the projection's module.
        projection: of the model.
        neurons: [n] int64 row numbers.
    """
    if projection.experts or projection.layout != "linear":
        return None
    return RowBytes(module, projection, neurons)


def bits_of(rows: torch.Tensor) -> tuple[bytearray, np.ndarray, torch.Tensor]:
    """A copy of rows [n, d_in], of a float dtype, in three views of one memory: bytes, unsigned integers, a tensor."""
    memory = bytearray(rows.numel() * rows.itemsize)
    tensor = torch.frombuffer(memory, dtype=rows.dtype).view(rows.shape)
    tensor.copy_(rows)
    return memory, np.frombuffer(memory, _BITS[rows.dtype]).reshape(rows.shape), tensor
