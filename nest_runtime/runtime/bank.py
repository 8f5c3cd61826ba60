"""Deltas for compiled models: buffers of fixed capacity, and one small tensor that says which is active.

A graph made by torch.compile must neither break nor be compiled again when patches switch. So it cannot look patches
up in Python. Each patched module carries non-persistent buffers with a slot for every patch in the table (slot 0 is
the base: all zeros). The trunk carries one integer, the active slot. A pass reads that integer once (``snapshot``),
so that it cannot mix two patches.

Experts have no slots: a model with a patch on them runs eagerly.

Floats are stored as the bits of float32 in int32 buffers. So they follow the model to another device, and are not
rounded when it is converted to another dtype. Eager passes do not use any of this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from nest_runtime.errors import NestError
from nest_runtime.runtime.delta import LinearDelta, Loaded

_FIRST_SLOTS = 8
_DELTAS, _ROWS, _CLUSTERS, _LOADINGS = "_nest_deltas", "_nest_rows", "_nest_clusters", "_nest_loadings"
_SLOT = "_nest_slot"


@torch.library.custom_op("nest_runtime::snapshot", mutates_args=())
def snapshot(slot: torch.Tensor) -> torch.Tensor:
    """A copy [1] int64 of the active slot that the compiler cannot elide; read once, at the start of a pass."""
    return slot.clone()


@snapshot.register_fake
def _(slot: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(slot)


def active_slot(trunk: nn.Module) -> torch.Tensor:
    """The trunk's [1] int64 buffer with the active slot."""
    slot: torch.Tensor = trunk._nest_slot  # type: ignore[assignment]
    return slot


def add_from_bank(module: nn.Module, x: torch.Tensor, y: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Add the update that the module's bank holds in a slot; traced, not run eagerly.

    Args:
        module: the patched linear module.
        x: its input [..., d_in].
        y: its output [..., outputs].
        slot: [1] int64, from ``snapshot``.

    Returns:
        A new tensor [..., outputs] in y's dtype.
    """
    buffers: dict[str, torch.Tensor] = module._buffers  # type: ignore[assignment]
    slot = slot.to(buffers[_DELTAS].device)
    deltas = _floats(buffers[_DELTAS], slot).to(x)  # (K, d_in)
    loadings = _floats(buffers[_LOADINGS], slot).to(x)  # (n,), 0 where padded
    rows = buffers[_ROWS].index_select(0, slot)[0].to(x.device)  # (n,)
    clusters = buffers[_CLUSTERS].index_select(0, slot)[0].to(x.device)  # (n,)
    update = F.linear(x, deltas).index_select(-1, clusters) * loadings  # (..., n)
    return y.index_add(-1, rows, update.to(y.dtype))


def _floats(bits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    return bits.index_select(0, slot)[0].view(torch.float32)


class Bank:
    """Hands out slots and keeps the buffers of the patched modules filled.

    Args:
        trunk: the module that carries the active slot.
        device: where it is now.

    Raises:
        NestError: the model has a bank, thus a runtime, already.
    """

    def __init__(self, trunk: nn.Module, device: torch.device) -> None:
        if _SLOT in trunk._buffers:
            raise NestError(
                "another PatchRuntime is on this model; two would add to each other",
                "use that one, or close() it first",
            )
        self._trunk = trunk
        self._modules: dict[str, nn.Module] = {}
        self._slots: dict[Loaded, int] = {}
        self._free = deque(range(1, _FIRST_SLOTS))
        self._size = _FIRST_SLOTS
        _register(trunk, _SLOT, torch.zeros(1, dtype=torch.int64, device=device))

    def add(self, loaded: Loaded, modules: Mapping[str, nn.Module]) -> None:
        """Give a patch a slot and write it there. Buffers grow, and graphs recompile, only if it does not fit."""
        self._modules.update({key: modules[key] for key in loaded.deltas if _linear(loaded, key)})
        if not self._free:
            self._free.extend(range(self._size, 2 * self._size))
            self._size *= 2
        slot = self._free.popleft()  # the one free for longest: a running graph may still read the latest
        self._slots[loaded] = slot
        for key, module in self._modules.items():
            delta = _linear(loaded, key)
            if self._fits(module, delta):
                self._write(module, slot, delta)
            else:
                self._rebuild(key, module)

    def remove(self, loaded: Loaded) -> None:
        """Free a patch's slot, if it has one. The caller makes sure that it is not active."""
        slot = self._slots.pop(loaded, None)
        if slot is not None:
            self._free.append(slot)

    def select(self, loaded: Loaded | None) -> None:
        """Switch with one write; passes that have begun do not see it."""
        active_slot(self._trunk).fill_(0 if loaded is None else self._slots[loaded])

    def close(self) -> None:
        """Take every buffer off the model."""
        for module in self._modules.values():
            for name in (_DELTAS, _ROWS, _CLUSTERS, _LOADINGS):
                module._buffers.pop(name, None)
        self._trunk._buffers.pop(_SLOT, None)
        self._trunk._non_persistent_buffers_set.discard(_SLOT)
        for module in self._modules.values():
            module._non_persistent_buffers_set -= {_DELTAS, _ROWS, _CLUSTERS, _LOADINGS}

    def _fits(self, module: nn.Module, delta: LinearDelta | None) -> bool:
        deltas, rows = module._buffers.get(_DELTAS), module._buffers.get(_ROWS)
        if deltas is None or rows is None or deltas.shape[0] < self._size:
            return False
        return delta is None or (deltas.shape[1] >= delta.n_clusters and rows.shape[1] >= delta.n_neurons)

    def _rebuild(self, key: str, module: nn.Module) -> None:
        present = [delta for loaded in self._slots if (delta := _linear(loaded, key))]
        clusters = _round_up(delta.n_clusters for delta in present)
        neurons = _round_up(delta.n_neurons for delta in present)
        device = module.weight.device if isinstance(module.weight, torch.Tensor) else torch.device("cpu")
        _register(module, _DELTAS, torch.zeros(self._size, clusters, present[0].d_in, dtype=torch.int32, device=device))
        _register(module, _LOADINGS, torch.zeros(self._size, neurons, dtype=torch.int32, device=device))
        for name in (_ROWS, _CLUSTERS):
            _register(module, name, torch.zeros(self._size, neurons, dtype=torch.int64, device=device))
        for loaded, slot in self._slots.items():
            self._write(module, slot, _linear(loaded, key))

    @staticmethod
    def _write(module: nn.Module, slot: int, delta: LinearDelta | None) -> None:
        names = (_DELTAS, _ROWS, _CLUSTERS, _LOADINGS)
        deltas, rows, clusters, loadings = (module._buffers[name][slot].zero_() for name in names)  # type: ignore[index]
        if delta is None:
            return
        tensors = delta.build("cpu", torch.float32)
        weights = torch.ones(delta.n_neurons) if tensors.loadings is None else tensors.loadings
        deltas[: delta.n_clusters].copy_(tensors.deltas.view(torch.int32))
        rows[: delta.n_neurons].copy_(tensors.rows)
        clusters[: delta.n_neurons].copy_(tensors.clusters)
        loadings[: delta.n_neurons].copy_(weights.view(torch.int32))


def _linear(loaded: Loaded, key: str) -> LinearDelta | None:
    """A patch's update of a linear module; None if it has none, or the module holds experts."""
    delta = loaded.deltas.get(key)
    return delta if isinstance(delta, LinearDelta) else None


def _register(module: nn.Module, name: str, value: torch.Tensor) -> None:
    module.register_buffer(name, value, persistent=False)


def _round_up(sizes: Iterable[int]) -> int:
    """The next power of two, at least 2: patches of about one size share a shape, and thus a graph."""
    return max(2, 1 << (max(sizes) - 1).bit_length())
