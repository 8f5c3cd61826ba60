"""Which rows of a patched projection a rank holds, and digests that show whether they have the right values.

vLLM fuses gate and up into one weight and splits it by rows over tensor-parallel ranks: rank r of R holds the r-th
R-th of gate's rows, then the r-th R-th of up's. Both sides use this module: a worker to find its rows, and the API
server to compute what their digests must be. Needs no vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nest_runtime.patch.patch import Patch
from nest_runtime.patch.site import Site

Packed = Mapping[str, Sequence[str]]
"""vLLM's ``packed_modules_mapping``: a fused module's last name → the names it is fused from."""


@dataclass(frozen=True)
class Shard:
    """The part of a projection that one rank holds.

    Attributes:
        start, stop: its rows, counted in the whole projection.
        at: where they begin in the rank's own weight.
    """

    start: int
    stop: int
    at: int = 0

    def pick(self, neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of some neurons [n], which are in here [m], and their rows [m] of the rank's weight; integers all."""
        where = torch.nonzero((neurons >= self.start) & (neurons < self.stop)).flatten()
        return where, neurons[where].long() - self.start + self.at


@dataclass(frozen=True)
class Rows:
    """Rows of one projection, before and after a patch.

    Attributes:
        neurons: [n] int64, increasing, counted in the whole projection.
        pristine, patched: [n, d_in] in the model's dtype, on the CPU.
    """

    neurons: torch.Tensor
    pristine: torch.Tensor
    patched: torch.Tensor

    def part(self, shard: Shard) -> Rows:
        """Those of them that a rank holds."""
        where, _ = shard.pick(self.neurons)
        return Rows(self.neurons[where], self.pristine[where], self.patched[where])


def shard_of(sizes: Sequence[int], part: int, rank: int, ranks: int) -> Shard:
    """What a rank holds of one part of a fused, row-split weight.

    Args:
        sizes: rows of each part, over all ranks: (gate, up), or one.
        part: which.
        rank, ranks: the tensor-parallel rank, of how many.

    Raises:
        ValueError: the rows cannot be split evenly.
    """
    if any(size % ranks for size in sizes):
        raise ValueError(f"rows {list(sizes)} cannot be split over {ranks} ranks")
    each = [size // ranks for size in sizes]
    return Shard(rank * each[part], (rank + 1) * each[part], sum(each[:part]))


def candidates(site: str, packed: Packed) -> Iterator[tuple[str, int]]:
    """Module names under which vLLM may keep a site, each with the part of that module's rows it is.

    ``…mlp.gate_proj`` is itself, or part 0 of ``…mlp.gate_up_proj``; ``…gate_up_proj:up`` is part 1 of that.
    """
    name, _, kind = site.partition(":")
    if kind:
        yield name, ("gate", "up").index(kind)
        return
    yield name, 0
    parent, _, leaf = name.rpartition(".")
    for fused, leaves in packed.items():
        if leaf in leaves:
            yield f"{parent}.{fused}", list(leaves).index(leaf)


def patched_rows(site: Site, pristine: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """W₀[rows] + ΔW, summed in float32 or wider and rounded once, as runtime/fold.py does.

    Args:
        site: the update.
        pristine: the base's rows [m, d_in]; the sum is made where they are.
        where: which [m] of the site's neurons they belong to; all of them by default.
    """
    wide = torch.promote_types(pristine.dtype, torch.float32)
    deltas = site.row_deltas(wide)
    deltas = deltas if where is None else deltas[where]
    return (pristine.to(wide) + deltas.to(pristine.device)).to(pristine.dtype)


def rows_of(patch: Patch, pristine: Mapping[str, torch.Tensor]) -> dict[str, Rows]:
    """A patch's rows by site, from the base's rows [n, d_in], in their dtype; sites without neurons are left out."""
    found = {}
    for site in patch.sites:
        if site.n_neurons:
            base = pristine[site.name]
            found[site.name] = Rows(site.neurons.tensor().long(), base, patched_rows(site, base))
    return found


def digest_of_rows(parts: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> str:
    """``sha256:<hex>`` over rows: of each part, by name, how many, which neurons, in which dtype, and every byte.

    Args:
        parts: name, neurons [n] and rows [n, d_in].
    """
    digest = hashlib.sha256()
    for name, neurons, rows in sorted(parts, key=lambda part: part[0]):
        digest.update(f"{name}\0{len(neurons)}\0{rows.dtype}\0".encode())
        digest.update(neurons.to("cpu", torch.int64).numpy().tobytes())
        digest.update(rows.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def expected(rows: Mapping[str, Rows], shards: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    """The digests that a rank must report for its shards: of its pristine rows, and of its patched ones.

    Args:
        rows: the whole patch's rows by site.
        shards: site → (start, stop) as the rank reported them.
    """
    mine = {name: rows[name].part(Shard(*bounds)) for name, bounds in shards.items()}
    return (
        digest_of_rows((name, part.neurons, part.pristine) for name, part in mine.items()),
        digest_of_rows((name, part.neurons, part.patched) for name, part in mine.items()),
    )


def uncovered(d_out: int, shards: Iterable[Sequence[int]]) -> int | None:
    """The first row of a projection that no rank holds, or None if the shards cover [0, d_out)."""
    reached = 0
    for start, stop in sorted((int(a), int(b)) for a, b in shards):
        if start > reached:
            return reached
        reached = max(reached, stop)
    return reached if reached < d_out else None
