"""Where a checkpoint keeps the rows of a model's FFN projections; reads and writes only those.

A checkpoint's tensors need not be the model's own: on loading, transformers renames some, and stacks the matrices of
single experts. This module applies transformers' own conversions to row numbers, so that it finds a row of the model
in its file for every family. Of transformers 5.23 it uses ``rename_source_key``, ``WeightConverter`` and
``get_model_conversion_mapping``; no other module does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nest_runtime.errors import ModelError
from nest_runtime.model.projection import Projection, canonical_name, unwrap
from nest_runtime.model.weights import read_frame, weight_files
from nest_runtime.patch.frame import TensorEntry

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Some rows of one tensor of a checkpoint.

    Attributes:
        path: the file.
        entry: the tensor.
        start: where its bytes begin in the file.
        rows: [n] which rows; the tensor's rows are counted through all its leading dimensions.
        where: [n] which of the neurons asked for they are.
        transposed: rows are columns: the tensor is [..., d_in, rows].
    """

    path: Path
    entry: TensorEntry
    start: int
    rows: np.ndarray
    where: torch.Tensor
    transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return FLOATS[self.entry.dtype]

    def read(self) -> torch.Tensor:
        """The rows, [n, d_in] in the stored dtype."""
        picked = np.ascontiguousarray(self._map(self.path, "r")[self._index])  # (n, d_in, bytes of a number)
        return torch.from_numpy(picked).view(self.dtype)[..., 0]

    def write(self, path: Path, values: torch.Tensor) -> None:
        """Overwrite the rows in a copy of the file; ``values`` [n, d_in] in the stored dtype."""
        data = values.contiguous()[..., None].view(torch.uint8).numpy()
        mapped = self._map(path, "r+")
        mapped[self._index] = data
        mapped.flush()

    @property
    def _index(self) -> tuple[Any, ...]:
        if not self.transposed:
            return (self.rows,)
        columns = self.entry.shape[-1]
        return (self.rows // columns, slice(None), self.rows % columns)

    def _map(self, path: Path, mode: Any) -> np.memmap[Any, Any]:
        """The tensor's bytes, as [rows, d_in, bytes of a number] or [blocks, d_in, rows, bytes of a number]."""
        *_, second, last = self.entry.shape
        size = self.dtype.itemsize
        shape = (-1, second, last, size) if self.transposed else (-1, last, size)
        mapped = np.memmap(path, dtype=np.uint8, mode=mode, offset=self.start, shape=(self.entry.nbytes,))
        return mapped.reshape(shape)  # type: ignore[return-value]


class Checkpoint:
    """The tensors of a safetensors folder, and which of them make up the weights of a model.

    Args:
        folder: the checkpoint.
        model: the model it belongs to; its weights need not be in memory (meta device).

    Raises:
        ModelError: no safetensors there, or a damaged file.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self._model = folder, unwrap(model)
        self.files = weight_files(folder)
        self.tensors: dict[str, tuple[Path, TensorEntry, int]] = {}
        for path in self.files:
            frame = read_frame(path)
            self.tensors.update({e.name: (path, e, frame.data_start + e.start) for e in frame.entries})

    def rows(self, projection: Projection, neurons: torch.Tensor) -> list[Stored]:
        """Where the rows of some neurons are stored, in one or more tensors.

        Args:
            projection: of the model.
            neurons: [n] integer indices in [0, d_out).

        Raises:
            ModelError: the checkpoint has them not, or quantized, or in a form that keeps no rows.
        """
        codes, sources = self._codes(projection)
        experts, rows = projection.expert_of(neurons), projection.rows(neurons)
        picked = codes[experts, rows] if projection.experts else codes[rows]  # (n,)
        found = []
        for name, first in sources:
            path, entry, start = self.tensors[name]
            hit = (picked >= first) & (picked < first + _count(entry, projection))
            if bool(hit.any()):
                where = torch.where(hit)[0]
                numbers = (picked[where] - first).numpy()
                found.append(Stored(path, entry, start, numbers, where, projection.layout == "conv1d"))
        return found

    def read(self, projection: Projection, neurons: torch.Tensor) -> torch.Tensor:
        """The rows of some neurons, [n, d_in] in the stored dtype; raises as ``rows`` does."""
        parts = [(stored.where, stored.read()) for stored in self.rows(projection, neurons)]
        result = torch.empty(len(neurons), projection.d_in, dtype=parts[0][1].dtype if parts else torch.float32)
        for where, values in parts:
            result[where] = values.to(result.dtype)
        return result

    def _codes(self, projection: Projection) -> tuple[torch.Tensor, list[tuple[str, int]]]:
        """A number for each row of the model's weight, (rows,) or (experts, rows), and each stored tensor's first."""
        target = projection.tensor
        entries, sources, first = [], [], 0
        for name, pattern in self._sources.get(target, ()):
            entry = self.tensors[name][1]
            self._check_entry(entry, projection)
            shape = list(entry.shape)
            shape[_axis(projection)] = 1
            entries.append((name, pattern, torch.arange(first, first + math.prod(shape)).reshape(shape)))
            sources.append((name, first))
            first += math.prod(shape)
        if not entries:
            raise ModelError(
                f"{self.folder} holds no weight for {projection.name} ({target})",
                "name the folder of a complete, unquantized checkpoint of this model",
            )
        codes = self._converted(target, entries).squeeze(_axis(projection))
        if codes.ndim != (2 if projection.experts else 1):
            raise self._unreadable(target)
        return codes, sources

    def _converted(self, target: str, entries: list[tuple[str, str | None, torch.Tensor]]) -> torch.Tensor:
        """Row numbers, of any shape, after what transformers does to tensors on loading."""
        pattern = entries[0][1]
        if pattern is None:
            return entries[0][2]
        from transformers.core_model_loading import WeightConverter

        known = {
            key: entry for entry in self._mapping if isinstance(entry, WeightConverter) for key in entry.source_patterns
        }
        converter = deepcopy(known[pattern])
        for name, own, codes in entries:
            converter.add_tensor(target, name, own, codes)  # type: ignore[arg-type]
        try:
            made = converter.convert(target, model=self._model, config=self._model.config)
            value = made[target]
        except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise self._unreadable(target) from error
        value = value[0] if isinstance(value, list) else value
        if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
            raise self._unreadable(target)
        return value

    @cached_property
    def _mapping(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self._model) if hasattr(self._model, "config") else []  # type: ignore[arg-type]

    @cached_property
    def _sources(self) -> Mapping[str, list[tuple[str, str | None]]]:
        """The model's tensor → the stored tensors it is made of, in the order of loading, each with its pattern."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state: dict[str, Any] = dict.fromkeys(map(canonical_name, self._model.state_dict()), True)
        prefix = getattr(self._model, "base_model_prefix", None)
        found: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(self.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            found.setdefault(target, []).append((name, pattern))
        return found

    def _check_entry(self, entry: TensorEntry, projection: Projection) -> None:
        if entry.dtype not in FLOATS:
            raise ModelError(
                f"{entry.name} is stored as {entry.dtype}: this checkpoint is quantized",
                "use the unquantized checkpoint; a quantized model takes a patch by hook, or as an adapter",
            )
        if len(entry.shape) < 2 or entry.shape[_axis(projection)] != projection.d_in:
            raise self._unreadable(entry.name)

    def _unreadable(self, name: str) -> ModelError:
        return ModelError(
            f"{name} is stored in {self.folder} in a form in which single neurons cannot be told apart",
            "load the model and save it again with save_pretrained",
        )


def _axis(projection: Projection) -> int:
    """The dimension of a weight that runs over the inputs."""
    return -1 if projection.layout == "linear" else -2


def _count(entry: TensorEntry, projection: Projection) -> int:
    """Rows of a stored tensor, counted through all its leading dimensions."""
    return math.prod(entry.shape) // projection.d_in
