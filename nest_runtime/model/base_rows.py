"""The digest of the base's rows that a patch changes, cheap enough to check whenever a patch is added.

docs/reference/patch-format.md states it to the byte. fingerprint.py has the digest of a whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from nest_runtime.errors import SiteMismatch
from nest_runtime.model.anatomy import Projection, find_projections, read_rows, unwrap

RowReader = Callable[[nn.Module, Projection, torch.Tensor], torch.Tensor]


def rows_digest(
    model: nn.Module,
    neurons: Mapping[str, torch.Tensor],
    *,
    read: RowReader = read_rows,
    projections: Iterable[Projection] | None = None,
) -> str:
    """Digest of the base's rows that a patch changes: ``sha256:<hex>``.

    It is SHA-256 over the sites in sorted order of name. Each gives the name in UTF-8 and a zero byte, the number
    of neurons as int32, their indices as int32, and those rows of W [n, d_in] as float32, row by row.
    All numbers are little-endian. A site without neurons gives its name and the number 0.

    Args:
        model: the model with no patch on.
        neurons: site name → [n] indices, increasing.
        read: where rows come from instead of the live weights, e.g. from pristine copies or a checkpoint.
        projections: the model's, where they are known already: finding them takes longer than the digest.

    Raises:
        SiteMismatch: the model lacks a site, or a neuron is out of its range.
        ModelError: the weights are quantized or not in memory.
    """
    known = {p.name: p for p in (find_projections(model) if projections is None else projections)}
    digest = hashlib.sha256()
    for name in sorted(neurons):
        projection, index = known.get(name), neurons[name]
        if projection is None:
            raise SiteMismatch(
                f"{type(unwrap(model)).__name__} has no site {name!r}", "use a patch made for this architecture"
            )
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < projection.d_out):
            raise SiteMismatch(
                f"site {name}: a neuron is out of range [0, {projection.d_out})",
                "use a patch made for this architecture",
            )
        digest.update(name.encode() + b"\0" + len(index).to_bytes(4, "little"))
        if len(index):
            digest.update(tensor_bytes(index.to("cpu", torch.int32)))
            digest.update(tensor_bytes(read(model, projection, index).to("cpu", torch.float32)))
    return "sha256:" + digest.hexdigest()


def rows_fit(
    model: nn.Module,
    stored: Mapping[str, torch.Tensor],
    neurons: Mapping[str, torch.Tensor],
    digest: str,
    projections: Iterable[Projection] | None = None,
) -> bool:
    """Whether a rows digest is that of a checkpoint's rows, in any dtype that models are loaded in.

    Args:
        model: as in ``rows_digest``.
        stored: site name → [n, d_in] as the checkpoint holds them; sites without neurons may be left out.
        neurons: site name → [n] indices.
        digest: to compare with.
        projections: as in ``rows_digest``.
    """
    known = find_projections(model) if projections is None else list(projections)

    def made_in(dtype: torch.dtype) -> str:
        def read(_model: nn.Module, projection: Projection, _neurons: torch.Tensor) -> torch.Tensor:
            return stored[projection.name].to(dtype)

        return rows_digest(model, neurons, read=read, projections=known)

    return any(made_in(dtype) == digest for dtype in (torch.float32, torch.bfloat16, torch.float16))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's numbers, row by row, as they lie in memory; of any shape and dtype."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
