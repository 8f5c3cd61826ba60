"""The patches of one rank: its rows of the model changed in place, and restored bit for bit.

Runs in vLLM's workers (worker.py), on the rank's part of the model; needs no vLLM itself. Compiled code and captured
CUDA graphs hold the weights' addresses, so they see in-place writes. The API server decides when: it calls this while
no step runs (inplace.py), and compares what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nest_runtime.errors import ModelError, PatchNotFound, SiteMismatch
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.site import Site
from nest_runtime.serve.vllm.packing import pack_again
from nest_runtime.serve.vllm.rows import Packed, Shard, candidates, digest_of_rows, patched_rows, shard_of

Report = dict[str, Any]


@dataclass(frozen=True, eq=False)
class RowPiece:
    """What a rank holds of one site.

    Attributes:
        site: its name.
        weight: the rank's weight, [rows, d_in].
        shard: which part of the projection the rank holds.
        module: the module that computes with it.
        neurons: [m] of the patch's neurons, those in the shard.
        rows: [m] where they are in ``weight``, on its device.
        pristine, patched: [m, d_in], on its device.
    """

    site: str
    weight: torch.Tensor
    module: nn.Module
    shard: Shard
    neurons: torch.Tensor
    rows: torch.Tensor
    pristine: torch.Tensor
    patched: torch.Tensor

    def write(self, values: torch.Tensor) -> None:
        """Overwrite the rank's rows in place.

        Args:
            values: [m, d_in] in the weight's dtype, on its device.
        """
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            self.weight.data.index_copy_(0, self.rows, values)

    def live(self) -> torch.Tensor:
        """A copy [m, d_in], in the weight's dtype, of the rows that are in it now."""
        with torch.inference_mode(False), torch.no_grad():
            return self.weight.detach().index_select(0, self.rows)


class RankPatches:
    """Prepared patches of one rank, and which of them is in its weights.

    Args:
        model: the rank's part of the model.
        rank: for reports.
        packed: the model's ``packed_modules_mapping``.
        renamed: what the checkpoint's name of a module is in this model.
    """

    def __init__(
        self, model: nn.Module, rank: int, packed: Packed, renamed: Callable[[str], str] = lambda name: name
    ) -> None:
        self._modules = dict(model.named_modules())
        self._rank = rank
        self._packed = packed
        self._renamed = renamed
        self._prepared: dict[str, list[RowPiece]] = {}
        self._active: str | None = None

    def prepare(self, patch: Patch) -> Report:
        """Find a patch's rows and keep both versions of them; changes nothing.

        Returns:
            ``shards``: site → (start, stop), for the sites this rank holds a part of; ``pristine`` and ``patched``:
            digests of its rows.

        Raises:
            SiteMismatch: a site is here in another shape.
            ModelError: its weight is quantized or packed, so that rows cannot be changed.
        """
        pieces = [piece for site in patch.sites if site.n_neurons for piece in self._pieces(site)]
        self._prepared[patch.digest] = pieces
        return {
            "rank": self._rank,
            "shards": {piece.site: [piece.shard.start, piece.shard.stop] for piece in pieces},
            "pristine": _digest(pieces, lambda piece: piece.pristine),
            "patched": _digest(pieces, lambda piece: piece.patched),
        }

    def apply(self, digest: str | None) -> Report:
        """Apply a prepared patch in place of the active one; None restores the pristine rows.

        Returns:
            ``restored``: the digest of the old patch's rows, read between the two writes; ``live``: that of the new
            patch's rows, read afterwards. Empty if there is no such patch.

        Raises:
            PatchNotFound: it was not prepared.
            ModelError: a packed copy of the weights cannot follow (packing.py).
        """
        if digest is not None and digest not in self._prepared:
            raise PatchNotFound(f"rank {self._rank} holds no patch {digest}", "load it first")
        old = self._pieces_of(self._active)
        for piece in old:
            piece.write(piece.pristine)
        restored = _digest(old, RowPiece.live)
        self._active = None
        new = self._pieces_of(digest)
        for piece in new:
            piece.write(piece.patched)
        self._active = digest
        for module in {piece.module for piece in [*old, *new]}:
            pack_again(module)
        return {"rank": self._rank, "active": digest, "restored": restored, "live": _digest(new, RowPiece.live)}

    def state(self) -> Report:
        """The active patch, and the digest of its rows as they are in the weights."""
        return {
            "rank": self._rank,
            "active": self._active,
            "live": _digest(self._pieces_of(self._active), RowPiece.live),
            "prepared": sorted(self._prepared),
        }

    def forget(self, digest: str) -> Report:
        """Forget a prepared patch that is not active."""
        if digest != self._active:
            self._prepared.pop(digest, None)
        return self.state()

    def _pieces_of(self, digest: str | None) -> list[RowPiece]:
        return [] if digest is None else self._prepared[digest]

    def _pieces(self, site: Site) -> Iterable[RowPiece]:
        found = self._find(site)
        if found is None:
            return  # another pipeline stage has this layer
        weight, module, shard = found
        neurons = site.neurons.tensor().long()
        where, rows = shard.pick(neurons)
        rows = rows.to(weight.device)
        pristine = self._pristine(weight, rows)
        patched = patched_rows(site, pristine, where)
        yield RowPiece(site.name, weight, module, shard, neurons[where], rows, pristine, patched)

    def _find(self, site: Site) -> tuple[torch.Tensor, nn.Module, Shard] | None:
        for name, part in candidates(self._renamed(site.name), self._packed):
            module = self._modules.get(name)
            weight = getattr(module, "weight", None)
            if module is not None and isinstance(weight, torch.Tensor):
                return weight, module, _shard(site, module, weight, part)
        return None

    def _pristine(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows [m, d_in] of a weight as they are without the patch that is on."""
        with torch.inference_mode(False), torch.no_grad():
            values = weight.detach().index_select(0, rows)
            for piece in self._pieces_of(self._active):
                if piece.weight is weight and len(piece.rows):
                    where = torch.searchsorted(piece.rows, rows).clamp(max=len(piece.rows) - 1)
                    hit = piece.rows[where] == rows
                    values[hit] = piece.pristine[where[hit]]
        return values


def _shard(site: Site, module: nn.Module, weight: torch.Tensor, part: int) -> Shard:
    sizes = list(getattr(module, "output_sizes", None) or [getattr(module, "output_size", len(weight))])
    rank, ranks = int(getattr(module, "tp_rank", 0)), int(getattr(module, "tp_size", 1))
    if part >= len(sizes) or sizes[part] != site.d_out:
        raise SiteMismatch(
            f"site {site.name} has {site.d_out} rows in the patch; the engine's module has {sizes}",
            "use a patch made for this model",
        )
    if tuple(weight.shape) != (sum(sizes) // ranks, site.d_in) or not weight.is_floating_point():
        raise ModelError(
            f"the weight of {site.name} is {weight.dtype} {list(weight.shape)} here; "
            f"expected plain [{sum(sizes) // ranks}, {site.d_in}]",
            "rows cannot be changed in a quantized or packed model: serve with --expose, which uses adapters, "
            "or export --to merged",
        )
    return shard_of(sizes, part, rank, ranks)


def _digest(pieces: Iterable[RowPiece], rows: Callable[[RowPiece], torch.Tensor]) -> str:
    return digest_of_rows((piece.site, piece.neurons, rows(piece)) for piece in pieces)


def slot_report(rank: int, index_to_id: Iterable[int | None]) -> Report:
    """Which adapter is in which of a rank's slots; the id 0 is none."""
    return {"rank": rank, "slots": [int(adapter or 0) for adapter in index_to_id]}
