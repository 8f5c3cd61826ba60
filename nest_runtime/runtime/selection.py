"""Which patch a forward pass uses, and for which of its tokens.

A :class:`Selection` is what a caller chose: one patch (or the base) for everything, for each row of
a batch, or for runs of tokens in a flat batch. A :class:`View` is a selection and the state of the
weights at the start of one pass; every site of the pass asks the same view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import nn

from nest_runtime.errors import UsageError
from nest_runtime.runtime.delta import Call, LinearDelta, Loaded
from nest_runtime.runtime.fold import FoldRecord
from nest_runtime.runtime.mixture import Members, add_mixed

Run = tuple[Loaded | None, int]


@dataclass(frozen=True)
class Active:
    """What is switched on for everybody: a patch (None: the base), how, and which rows are folded."""

    loaded: Loaded | None = None
    mode: str | None = None
    fold: FoldRecord | None = None

    @cached_property
    def view(self) -> View:
        """The view of every pass in which nobody chose otherwise."""
        return View(self, Selection.whole(self.loaded))


@dataclass(frozen=True)
class Selection:
    """Runs of rows or tokens under one patch each; ``unit`` is ``all``, ``rows`` or ``tokens``."""

    unit: str
    runs: tuple[Run, ...]

    @classmethod
    def whole(cls, loaded: Loaded | None) -> Selection:
        """One patch (or None, the base) for everything in a pass."""
        return cls("all", ((loaded, 0),))

    @classmethod
    def of(cls, unit: str, runs: Iterable[Run]) -> Selection:
        """Runs under one patch each; neighboring runs of the same patch are joined, empty runs dropped."""
        kept = [run for run in runs if run[1]]
        joined = [(loaded, sum(n for _, n in group)) for loaded, group in groupby(kept, key=lambda run: run[0])]
        return cls(unit, tuple(joined))

    @property
    def size(self) -> int:
        """How many rows or tokens the selection covers."""
        return sum(count for _, count in self.runs)

    def tokens_of(self, x: torch.Tensor) -> tuple[Run, ...]:
        """The runs in tokens of one input [..., d_in] of any dtype.

        Some models flatten rows and tokens into one dimension before their FFN (OPT, mixtures of experts); then rows
        are counted by dividing.

        Raises:
            UsageError: the input has another number of rows or tokens than the selection.
        """
        tokens = x.numel() // x.shape[-1]
        if self.unit == "tokens":
            found, each = tokens, 1
        else:
            found = x.shape[0] if x.dim() > 1 else 1
            if x.dim() == 2 and self.size and tokens % self.size == 0:
                found = self.size
            each = tokens // max(found, 1)
        if found != self.size:
            raise UsageError(
                f"using_{self.unit} was given {self.size} {self.unit}, the forward pass has {found} "
                f"(input {list(x.shape)})",
                "name a patch, or None for the base, for every one; padding and beams count too",
            )
        return tuple((loaded, count * each) for loaded, count in self.runs)


class View:
    """One pass's answer to every site: what to add to y, given x.

    Args:
        active: the state of the weights, fixed for the pass.
        selection: the context's choice, or what is active.
    """

    __slots__ = ("_fold", "_index", "_members", "_runs", "_selection", "_still", "_whole")

    def __init__(self, active: Active, selection: Selection) -> None:
        self._fold = active.fold
        self._selection = selection
        self._whole = selection.unit == "all"
        in_weights = None if active.fold is None else active.fold.loaded
        self._still = self._whole and selection.runs[0][0] is in_weights
        self._runs: dict[torch.Size, tuple[tuple[Run, ...], bool]] = {}
        self._index: dict[tuple[int, torch.device], list[tuple[Loaded | None, torch.Tensor]]] = {}
        self._members: dict[tuple[int, torch.device], tuple[list[Loaded], Members]] = {}

    def apply(self, key: str, module: nn.Module, call: Call, y: torch.Tensor) -> torch.Tensor:
        """The output [..., outputs] that the chosen patches give, in y's dtype.

        It is ``y`` itself if nothing changes; ``y`` is never written to.

        Args:
            key: the module's canonical name.
            module: the module.
            call: its inputs.
            y: its output [..., outputs].
        """
        if self._still:
            return y
        if self._whole:
            return self._one(self._selection.runs[0][0], key, module, call, y)
        runs, alike = self._runs_of(call[0])
        if alike:
            return self._one(runs[0][0], key, module, call, y)
        flat_call = tuple(value.reshape(-1, value.shape[-1]) for value in call)
        flat_y = y.reshape(-1, y.shape[-1])
        if self._fold is None:
            patches, members = self._membership(runs, y.device)
            deltas = [loaded.deltas.get(key) for loaded in patches]
            if all(delta is None or isinstance(delta, LinearDelta) for delta in deltas):
                return add_mixed(deltas, members, flat_call[0], flat_y).reshape(y.shape)  # type: ignore[arg-type]
        for loaded, index in self._tokens(runs, call[0].device):
            before = flat_y.index_select(0, index)
            after = self._one(loaded, key, module, tuple(value.index_select(0, index) for value in flat_call), before)
            if after is not before:
                flat_y = flat_y.index_copy(0, index, after)
        return flat_y.reshape(y.shape)

    def _runs_of(self, x: torch.Tensor) -> tuple[tuple[Run, ...], bool]:
        """The runs in tokens of an input, and whether all are under one patch; worked out once for a shape."""
        if x.shape not in self._runs:
            runs = self._selection.tokens_of(x)
            self._runs[x.shape] = (runs, len({id(loaded) for loaded, _ in runs}) == 1)
        return self._runs[x.shape]

    def _one(self, loaded: Loaded | None, key: str, module: nn.Module, call: Call, y: torch.Tensor) -> torch.Tensor:
        if self._fold is not None:
            if self._fold.loaded is loaded:
                return y  # the weights have it
            y = self._fold.undo(key, module, call, y)
        delta = None if loaded is None else loaded.deltas.get(key)
        return y if delta is None else delta.apply(module, call, y, self._fold)

    def _membership(self, runs: tuple[Run, ...], device: torch.device) -> tuple[list[Loaded], Members]:
        """The patches of a flat batch, and whose each token is; worked out once for a pass."""
        cache_key = (sum(count for _, count in runs), device)
        if cache_key not in self._members:
            patches = sorted({loaded for loaded, _ in runs if loaded is not None}, key=id)
            numbers: dict[Loaded | None, int] = {None: -1, **{loaded: number for number, loaded in enumerate(patches)}}
            owners = [numbers[loaded] for loaded, count in runs for _ in range(count)]
            self._members[cache_key] = (patches, Members(owners, len(patches), device))
        return self._members[cache_key]

    def _tokens(self, runs: tuple[Run, ...], device: torch.device) -> list[tuple[Loaded | None, torch.Tensor]]:
        """Each patch's token positions [t] int64 in the flat batch, computed once for a pass."""
        cache_key = (sum(count for _, count in runs), device)
        if cache_key not in self._index:
            positions: dict[Loaded | None, list[torch.Tensor]] = {}
            start = 0
            for loaded, count in runs:
                positions.setdefault(loaded, []).append(torch.arange(start, start + count))
                start += count
            self._index[cache_key] = [(loaded, torch.cat(parts).to(device)) for loaded, parts in positions.items()]
        return self._index[cache_key]
