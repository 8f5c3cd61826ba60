"""The base model as its checkpoint has it: what patches are checked against, and what every rank must report.

The engine's weights are in other processes, split and fused. The checkpoint is read here row by row, so that the
expected bytes do not come from the same place as the reported ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nest_runtime.errors import BaseMismatch
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.base_rows import rows_fit
from nest_runtime.model.checkpoint import Checkpoint
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.model.load import skeleton
from nest_runtime.patch.patch import Patch, check_sites
from nest_runtime.serve.vllm.replicas import Reports
from nest_runtime.serve.vllm.rows import Rows, expected, rows_of, uncovered

_HINT = "use the patch's own base model, loaded from its checkpoint, unmerged"


class CheckpointBase:
    """A checkpoint folder, and the dtype that the engine computes in.

    Args:
        folder: the checkpoint that the engine loaded.
        dtype: of the engine's weights.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype

    @cached_property
    def hash(self) -> str:
        """The checkpoint's model hash, ``sha256:…``."""
        return model_hash(self.folder)

    @cached_property
    def model(self) -> Any:
        """The model on the meta device."""
        return skeleton(self.folder)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder, self.model)

    def check(self, patch: Patch) -> dict[str, Rows]:
        """Check that the patch belongs on this base; returns its rows before and after, by site.

        Raises:
            SiteMismatch: the model lacks a site, or has it in another shape.
            BaseMismatch: the model or its rows are others.
            ModelError: the checkpoint is quantized.
        """
        projections = {projection.name: projection for projection in find_projections(self.model)}
        check_sites(patch, projections.values())
        label = patch.label
        if patch.base_hash != self.hash:
            raise BaseMismatch(f"{label} is for base {patch.base_hash}; this model is {self.hash}", _HINT)
        stored = {
            site.name: self._checkpoint.read(projections[site.name], site.neurons.tensor())
            for site in patch.sites
            if site.n_neurons
        }
        neurons = {site.name: site.neurons.tensor() for site in patch.sites}
        if not rows_fit(self.model, stored, neurons, patch.rows_digest):
            raise BaseMismatch(f"the rows that {label} changes are not those of this checkpoint", _HINT)
        return rows_of(patch, {name: rows.to(self.dtype) for name, rows in stored.items()})


def check_prepared(patch: Patch, rows: dict[str, Rows], reports: Reports) -> None:
    """Every rank holds the base's rows and would write the right ones, and together the ranks hold all.

    Args:
        patch: what was prepared.
        rows: from ``CheckpointBase.check``.
        reports: replica → rank → what ``nest_prepare`` gave.

    Raises:
        BaseMismatch: the message names the rank.
    """
    sizes = {site.name: site.d_out for site in patch.sites if site.n_neurons}
    for number, ranks in enumerate(reports):
        for name, size in sizes.items():
            missing = uncovered(size, (r["shards"][name] for r in ranks if name in r["shards"]))
            if missing is not None:
                raise BaseMismatch(f"no rank of replica {number} holds row {missing} of {name}", _HINT)
        for report in ranks:
            pristine, patched = expected(rows, report["shards"])
            where = f"rank {report['rank']} of replica {number}"
            if report["pristine"] != pristine:
                raise BaseMismatch(f"{where} holds other rows than the checkpoint's", _HINT)
            if report["patched"] != patched:
                raise BaseMismatch(f"{where} computes other patched rows than expected", _HINT)


def digests(reports: Reports, key: str) -> Iterable[tuple[int, int, str]]:
    """Replica, rank and the digest it reports under ``key``."""
    return [(number, report["rank"], report[key]) for number, ranks in enumerate(reports) for report in ranks]
