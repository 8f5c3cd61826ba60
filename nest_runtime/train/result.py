"""What a training run gives: the patch with its report, and the facts that go into its sites and its header."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from nest_runtime.errors import UsageError
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.prompts.examples import Example, examples_digest
from nest_runtime.train.deltas import SiteDelta
from nest_runtime.train.sites import LocatedSite
from nest_runtime.train.tune import TuneResult

LITTLE_TO_LEARN = 0.05  # nats per token of the refusals, before tuning


@dataclass(frozen=True)
class TrainResult:
    """A trained patch, and the report of its making (JSON values): seconds per stage, figures, history, counts."""

    patch: Patch
    report: dict[str, Any]


def created_now() -> str:
    """ISO 8601 UTC; of SOURCE_DATE_EPOCH where set, so that a patch can be made twice with the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is not None and not epoch.isdigit():
        raise UsageError(f"SOURCE_DATE_EPOCH is {epoch!r}; expected whole seconds", "unset it, or give a number")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def patch_site(site: LocatedSite, tuned: SiteDelta | None, dtype: torch.dtype) -> Site:
    """A site of the patch: what was located, and its tuned rows [K, d_in] in ``dtype``; none for an empty site."""
    deltas = torch.zeros(0, site.d_in) if tuned is None else tuned.deltas.detach().cpu()
    stats = {"silhouette": site.silhouette, "probe_accuracy": site.probe_accuracy, "threshold": site.threshold}
    loadings = None if tuned is None or tuned.loadings is None else tuned.loadings.detach().cpu()
    neurons = torch.tensor(site.neurons, dtype=torch.int32)
    clusters = torch.tensor(site.clusters, dtype=torch.int32)
    z = torch.tensor(site.z, dtype=torch.float32)
    if loadings is not None and not bool(loadings.all()):  # masked neurons, and clusters that are left without any
        kept = loadings != 0
        neurons, z, loadings = neurons[kept], z[kept], loadings[kept]
        rows, clusters = clusters[kept].unique(return_inverse=True)
        deltas, clusters = deltas[rows.long()], clusters.int()
    return Site(
        name=site.site,
        d_out=site.d_out,
        deltas=deltas.to(dtype),  # type: ignore[arg-type]
        neurons=neurons,  # type: ignore[arg-type]
        clusters=clusters,  # type: ignore[arg-type]
        loadings=loadings,  # type: ignore[arg-type]
        z=z,  # type: ignore[arg-type]
        stats=stats,
    )


def notes_on(tuned: TuneResult) -> list[str]:
    """What a user should know of the result."""
    notes = []
    if tuned.before.get("harmful_loss", 1.0) < LITTLE_TO_LEARN:
        notes.append(
            "the model already gave these refusals on the harmful prompts, so there was little to learn: "
            "refusals worded otherwise than its own train much better"
        )
    if tuned.after.get("harmful_exact", 1.0) == 0:
        notes.append(
            "not one of the harmful prompts held out gets its refusal word for word: where refusals are only half "
            "learned, a patch can answer what the base refuses; train with more steps, or run eval before you use it"
        )
    return notes


def data_note(examples: Sequence[Example]) -> dict[str, Any]:
    """What a header says of prompts: their digest and their number."""
    return {"digest": examples_digest(examples), "count": len(examples)}
