"""Folding: writing a patch into the weights from pristine rows, and taking it out again bit for bit.

Every write goes through a :class:`Journal`, so that an error half-way restores all rows. Before a row is written, it
is compared with the copy made when the patch was added, or with what folding wrote. An edit by other code is
reported, not overwritten. Callers keep forward passes out.

What a patch's fold has read and computed is kept with its record. Folding it again, or taking it out, then compares
and copies bytes (:class:`Exchange`), if the weights are plain memory of a CPU. If they are not, or a byte differs,
the slower way decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nest_runtime.errors import BaseMismatch
from nest_runtime.model import anatomy
from nest_runtime.model.experts import difference, units_of
from nest_runtime.model.row_bytes import RowBytes, bits_of, row_bytes
from nest_runtime.runtime.delta import Call, LiveProjection, Loaded

_ROUNDINGS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class FoldedSite:
    """One site's rows before and after, in the dtype and on the device they had then."""

    live: LiveProjection
    neurons: torch.Tensor  # (n,) int64
    pristine: torch.Tensor  # (n, d_in)
    folded: torch.Tensor  # (n, d_in)

    def pristine_now(self, loaded: Loaded) -> torch.Tensor:
        """The pristine rows [n, d_in] after whatever conversion the folded ones went through since.

        Raises:
            BaseMismatch: the rows in the model come from the folded ones by no conversion of dtype.
        """
        current = read_rows(self.live, self.neurons)
        candidates = zip(_conversions(self.folded, current), _conversions(self.pristine, current), strict=True)
        for folded, pristine in candidates:
            if torch.equal(folded, current):
                return pristine
        raise _edited(self.live, loaded, "while it was folded in")

    def undo(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` [..., outputs], in its dtype, with this site's rows of the pristine weights; x is [..., d_in]."""
        rows = self.live.projection.rows(self.neurons).to(y.device)
        bias = module.bias[rows].to(x.dtype) if isinstance(module.bias, torch.Tensor) else None
        base = F.linear(x, self.pristine.to(x.device, x.dtype), bias)  # (..., n)
        return y.index_copy(-1, rows, base.to(y.dtype))


@dataclass(frozen=True)
class _Pair:
    """One site's rows before and after, as bytes, and where they are in the live model."""

    site: FoldedSite
    memory: RowBytes
    pristine: tuple[bytearray, np.ndarray]
    folded: tuple[bytearray, np.ndarray]
    scratch: np.ndarray  # (n, d_in); shared with the other sites


class Exchange:
    """All rows of a fold, before and after, as bytes: changes one for the other where nobody else changed anything."""

    def __init__(self, pairs: Sequence[_Pair], dtype: torch.dtype) -> None:
        self._pairs, self._dtype = tuple(pairs), dtype
        self._compared: tuple[weakref.ref[Exchange], bool] | None = None

    def fold(self, journal: Journal) -> bool:
        """Write the folded rows over the pristine ones; False, with nothing written, where those do not stand there."""
        if not all(self._stands(pair, pair.pristine[0]) for pair in self._pairs):
            return False
        for pair in self._pairs:
            journal.write_bits(pair.site.live, pair.site.neurons, pair.site.pristine, pair.memory, pair.folded[1])
        return True

    def unfold(self, journal: Journal) -> bool:
        """Write the pristine rows over the folded ones; False, with nothing written, where those do not stand there."""
        if not all(self._stands(pair, pair.folded[0]) for pair in self._pairs):
            return False
        for pair in self._pairs:
            journal.write_bits(pair.site.live, pair.site.neurons, pair.site.folded, pair.memory, pair.pristine[1])
        return True

    def follow(self, earlier: Exchange, journal: Journal) -> bool:
        """Write these folded rows over another patch's of the same neurons; False, with nothing written, otherwise."""
        if self._dtype is not earlier._dtype or not self._alike(earlier):
            return False
        if not all(earlier._stands(pair, pair.folded[0]) for pair in earlier._pairs):
            return False
        for mine, other in zip(self._pairs, earlier._pairs, strict=True):
            journal.write_bits(other.site.live, other.site.neurons, other.site.folded, other.memory, mine.folded[1])
        return True

    def _alike(self, other: Exchange) -> bool:
        """Whether both are about the same rows of the same base; the answer for the last one asked about is kept."""
        if self._compared is None or self._compared[0]() is not other:
            same = len(self._pairs) == len(other._pairs) and all(
                mine.site.live is theirs.site.live
                and torch.equal(mine.site.neurons, theirs.site.neurons)
                and mine.pristine[0] == theirs.pristine[0]
                for mine, theirs in zip(self._pairs, other._pairs, strict=True)
            )
            self._compared = weakref.ref(other), same
        return self._compared[1]

    def _stands(self, pair: _Pair, expected: bytearray) -> bool:
        if pair.memory.find() is not self._dtype:
            return False
        pair.memory.read(pair.scratch)
        return expected == pair.scratch  # one comparison of memory


@dataclass(frozen=True, eq=False)
class FoldRecord:
    """What is folded into the weights now, by canonical module name."""

    loaded: Loaded
    sites: Mapping[str, tuple[FoldedSite, ...]]
    experts: Mapping[str, tuple[LiveProjection, LiveProjection]]  # gate and up of the experts modules among ``sites``
    exchange: Exchange | None = None  # where all rows are plain memory

    def undo(self, key: str, module: nn.Module, call: Call, y: torch.Tensor) -> torch.Tensor:
        """A module's output [..., outputs], in y's dtype, as the pristine weights give it; ``y`` is not changed."""
        if key in self.experts:
            return self._undo_experts(key, module, call, y)
        for site in self.sites.get(key, ()):
            y = site.undo(module, call[0], y)
        return y

    def _undo_experts(self, key: str, module: nn.Module, call: Call, y: torch.Tensor) -> torch.Tensor:
        x, chosen, weights = call
        units = units_of([site.neurons for site in self.sites[key]])
        gate, up = self.experts[key]
        have = read_rows(gate, units), read_rows(up, units)
        base = self.rows(gate, units), self.rows(up, units)
        added = difference(module, (x, chosen, weights), units.to(x.device), have, base)
        return y + added.reshape(y.shape).to(y.dtype)

    def rows(self, live: LiveProjection, neurons: torch.Tensor) -> torch.Tensor:
        """Rows [n, d_in] of the live weights, in their dtype, with folded ones replaced by their pristine values.

        ``neurons`` is [n] int64.
        """
        current, neurons = read_rows(live, neurons), neurons.cpu()
        for site in self.sites.get(live.key, ()):
            if site.live.projection.name == live.projection.name:
                where = torch.searchsorted(site.neurons, neurons).clamp(max=len(site.neurons) - 1)
                hit = site.neurons[where] == neurons  # (n,)
                pristine = site.pristine_now(self.loaded)
                current[hit.to(current.device)] = pristine[where[hit].to(pristine.device)]
        return current


class Journal:
    """Writes rows and remembers the old ones, so that all of them can be restored."""

    def __init__(self) -> None:
        self._written: list[tuple[LiveProjection, torch.Tensor, torch.Tensor]] = []

    def write(self, live: LiveProjection, neurons: torch.Tensor, rows: torch.Tensor) -> None:
        """Overwrite rows and remember the old ones.

        Args:
            live: the projection on the model.
            neurons: [n] int64 row numbers.
            rows: [n, d_in] in any floating-point dtype; converted to the weight's.
        """
        self._written.append((live, neurons, read_rows(live, neurons)))
        write_rows(live, neurons, rows)

    def write_bits(
        self, live: LiveProjection, neurons: torch.Tensor, before: torch.Tensor, memory: RowBytes, bits: np.ndarray
    ) -> None:
        """Overwrite rows as bytes, and remember the old ones.

        Args:
            live: the projection on the model.
            neurons: [n] int64 row numbers.
            before: [n, d_in] in the weight's dtype, known to be there now.
            memory: the rows' memory.
            bits: [n, d_in] unsigned integers, as wide as the dtype.
        """
        self._written.append((live, neurons, before))
        anatomy.write_rows(live.module, live.projection, memory, bits)

    def roll_back(self) -> None:
        """Restore all rows, latest first. Continues past a write that fails, and raises its error at the end."""
        failed: Exception | None = None
        while self._written:
            try:
                write_rows(*self._written.pop())
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed


def read_rows(live: LiveProjection, neurons: torch.Tensor) -> torch.Tensor:
    """A normal-tensor copy [n, d_in] of live rows, even of weights made in inference mode; ``neurons`` is [n] int64."""
    with torch.inference_mode(False), torch.no_grad():
        return anatomy.read_rows(live.module, live.projection, neurons)


def write_rows(live: LiveProjection, neurons: torch.Tensor, rows: torch.Tensor) -> None:
    """Overwrite live rows in place, even of weights made in inference mode.

    Args:
        live: the projection on the model.
        neurons: [n] int64 row numbers.
        rows: [n, d_in] in any floating-point dtype.
    """
    weight = anatomy.weight_of(live.module, live.projection)
    with torch.inference_mode(weight is not None and weight.is_inference()):
        anatomy.write_rows(live.module, live.projection, neurons, rows)


def fold(
    loaded: Loaded, projections: Mapping[str, LiveProjection], journal: Journal, kept: FoldRecord | None = None
) -> FoldRecord:
    """Write W[rows] = W₀[rows] + ΔW for every site; the sum is taken in float32 (or wider) and rounded once.

    Args:
        loaded: the patch; nothing may be folded now.
        projections: the model's, by name.
        journal: receives every write.
        kept: the record of an earlier fold of this patch.

    Raises:
        BaseMismatch: rows are not those the patch was added to.
        ModelError: the weights are quantized.
    """
    if kept is not None and kept.exchange is not None and kept.exchange.fold(journal):
        return kept
    plan: dict[str, list[FoldedSite]] = {}
    for site in loaded.patch.sites:
        if site.n_neurons:
            live, neurons = projections[site.name], site.neurons.tensor().long()
            current = read_rows(live, neurons)
            if site.name in loaded.saved and not _matches(loaded.saved[site.name], current):
                raise _edited(live, loaded, "since the patch was added")
            wide = torch.promote_types(current.dtype, torch.float32)
            folded = current.to(wide) + site.row_deltas(wide).to(current.device)
            plan.setdefault(live.key, []).append(FoldedSite(live, neurons, current, folded.to(current.dtype)))
    exchange = _exchange(plan)
    for sites in plan.values():
        for planned in sites:
            journal.write(planned.live, planned.neurons, planned.folded)
    experts = {
        key: tuple(live for live in projections.values() if live.key == key)
        for key, sites in plan.items()
        if sites[0].live.projection.experts
    }
    return FoldRecord(loaded, {key: tuple(sites) for key, sites in plan.items()}, experts, exchange)  # type: ignore[arg-type]


def _exchange(plan: Mapping[str, list[FoldedSite]]) -> Exchange | None:
    """The plan's rows as bytes, whose memory its sites then use; None if any site is no plain memory of a CPU."""
    planned = [(key, number, site) for key, sites in plan.items() for number, site in enumerate(sites)]
    found = []
    for _, _, site in planned:
        memory = row_bytes(site.live.module, site.live.projection, site.neurons)
        if memory is None or memory.find() is not site.pristine.dtype:
            return None
        found.append(memory)
    if len({site.pristine.dtype for _, _, site in planned}) != 1:  # or there is none
        return None
    scratch = bytearray(max(site.pristine.nbytes for _, _, site in planned))
    pairs = []
    for (key, number, site), memory in zip(planned, found, strict=True):
        before, before_bits, pristine = bits_of(site.pristine)
        after, after_bits, folded = bits_of(site.folded)
        shared = FoldedSite(site.live, site.neurons, pristine, folded)
        plan[key][number] = shared
        room = np.frombuffer(scratch, before_bits.dtype, before_bits.size).reshape(before_bits.shape)
        pairs.append(_Pair(shared, memory, (before, before_bits), (after, after_bits), room))
    return Exchange(pairs, planned[0][2].pristine.dtype)


def unfold(record: FoldRecord, journal: Journal) -> None:
    """Restore the pristine rows.

    A model converted to another dtype while folded gets its pristine rows after the same conversion.

    Raises:
        BaseMismatch: other code changed the folded rows.
    """
    if record.exchange is not None and record.exchange.unfold(journal):
        return
    restored = []
    for sites in record.sites.values():
        for site in sites:
            restored.append((site, site.pristine_now(record.loaded)))
    for site, pristine in restored:
        journal.write(site.live, site.neurons, pristine)


def follow(record: FoldRecord, kept: FoldRecord | None, journal: Journal) -> bool:
    """Put an earlier fold in the place of the one that is in the weights, where both change the same rows.

    Args:
        record: what is folded now.
        kept: the record of an earlier fold of the patch to come.
        journal: receives every write.

    Returns:
        Whether it was done; if not, nothing was written, and ``unfold`` and ``fold`` are to be called.
    """
    if kept is None or kept.exchange is None or record.exchange is None:
        return False
    return kept.exchange.follow(record.exchange, journal)


def _edited(live: LiveProjection, loaded: Loaded, when: str) -> BaseMismatch:
    return BaseMismatch(
        f"rows of {live.projection.name} that {loaded.full_name} changes were changed by something else {when}",
        "load the base model again; merge or train only with no patch folded in",
    )


def _matches(saved: torch.Tensor, current: torch.Tensor) -> bool:
    return any(torch.equal(candidate, current) for candidate in _conversions(saved, current))


def _conversions(rows: torch.Tensor, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows [n, d_in] in ``like``'s dtype and device: directly, and rounded to another dtype on the way."""
    rows = rows.to(like.device)
    yield rows.to(like.dtype)
    for rounding in _ROUNDINGS:
        yield rows.to(rounding).to(like.dtype)
