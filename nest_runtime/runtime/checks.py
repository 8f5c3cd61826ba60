"""Does a patch belong on this model? Sites, model hash, and the rows it changes.

A patch names its base twice, by model hash and by the digest of the rows it changes. A model loaded
in another dtype than its checkpoint has neither, and one loaded from a GGUF file never the file's hash; then
the checkpoint speaks for it: same hash, in memory the checkpoint's rows converted, and the patch made on those
rows in one of the dtypes that models are loaded in. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nest_runtime.errors import BaseMismatch, ModelError
from nest_runtime.model.anatomy import unwrap
from nest_runtime.model.base_rows import rows_digest, rows_fit
from nest_runtime.model.checkpoint import Checkpoint
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.model.gguf.header import find_gguf, read_header
from nest_runtime.model.gguf.model import GgufRows
from nest_runtime.model.projection import Projection
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime.delta import LiveProjection

_HINT = (
    "use the patch's own base model, loaded from its checkpoint, unmerged; `nest-runtime retarget` makes of it a patch "
    "for a sibling; force=True overrides, and is recorded"
)

Rows = Callable[[LiveProjection, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LiveBase:
    """The model as the checks see it.

    Attributes:
        model: the live model.
        live: its projections by name.
        hash: its hash in memory, or a given one; None if it cannot be hashed (quantized).
        rows: reads pristine rows [n, d_in] of a projection, whatever is folded.
    """

    model: nn.Module
    live: Mapping[str, LiveProjection]
    hash: str | None
    rows: Rows

    @property
    def projections(self) -> list[Projection]:
        """The model's projections."""
        return [live.projection for live in self.live.values()]


def memory_hash(model: nn.Module) -> str | None:
    """The model's hash in memory, or None if it has none (quantized, or not in memory)."""
    try:
        return model_hash(model)
    except ModelError:
        return None


def saved_rows(patch: Patch, base: LiveBase) -> dict[str, torch.Tensor]:
    """CPU copies of the pristine rows that a patch changes, by site: [n, d_in] in the weight's dtype.

    Quantized sites are left out.
    """
    saved = {}
    for site in patch.sites:
        if site.n_neurons:
            try:
                saved[site.name] = base.rows(base.live[site.name], site.neurons.tensor().long()).cpu()
            except ModelError:
                continue  # hook mode needs no rows, and folding such a site raises this very error
    return saved


def check_base(patch: Patch, base: LiveBase, saved: Mapping[str, torch.Tensor]) -> None:
    """Check that the model is the patch's base, by hash and by rows.

    Args:
        patch: its sites have been checked.
        base: the model.
        saved: rows [n, d_in] by site, in the weight's dtype (``saved_rows``).

    Raises:
        BaseMismatch: it is not the base; the message has both hashes, or says that rows differ.
    """
    same_hash = base.hash == patch.base_hash
    complete = all(site.name in saved for site in patch.sites if site.n_neurons)
    same_rows = complete and _digest(patch, base, saved) == patch.rows_digest
    if same_hash and (same_rows or not complete):  # rows of quantized weights cannot be compared: the hash decides
        return
    source = checkpoint_of(base.model)
    if source is not None and _checkpoint_fits(patch, base, saved, source):
        return
    label = patch.label
    if not same_hash:
        found = base.hash or "of unknown hash: its weights are quantized or not in memory"
        raise BaseMismatch(f"{label} is for base {patch.base_hash}; this model is {found}", _HINT)
    raise BaseMismatch(
        f"{label} fits base {patch.base_hash}, but the rows it changes differ from the base's: "
        "the base was folded, merged, re-trained or converted in memory",
        _HINT,
    )


def checkpoint_of(model: nn.Module) -> Path | None:
    """The local folder or GGUF file that a model was loaded from, if it is known and still there. Downloads nothing."""
    config = getattr(unwrap(model), "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    if not name:
        return None
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:
        return None  # a folder that is gone
    return Path(found).parent if isinstance(found, str) else None


def _digest(patch: Patch, base: LiveBase, saved: Mapping[str, torch.Tensor]) -> str:
    return rows_digest(
        base.model,
        {site.name: site.neurons.tensor() for site in patch.sites},
        read=lambda _model, projection, _neurons: saved[projection.name],
        projections=base.projections,
    )


def _checkpoint_fits(patch: Patch, base: LiveBase, saved: Mapping[str, torch.Tensor], source: Path) -> bool:
    """Whether the checkpoint is the patch's base and the model in memory is it, in any dtype.

    ``saved`` is [n, d_in] by site.
    """
    try:
        if model_hash(source) != patch.base_hash:
            return False
        reader = _reader(source, base.model)
    except ModelError:
        return False  # nothing to read there: it cannot speak for the model
    stored = {}
    for site in patch.sites:
        if site.name not in saved:
            continue
        try:
            stored[site.name] = reader.read(base.live[site.name].projection, site.neurons.tensor())
        except ModelError:
            return False  # it keeps no such rows, so it cannot speak for them
        if not torch.equal(stored[site.name].to(saved[site.name].dtype), saved[site.name]):
            return False
    if any(site.name not in saved for site in patch.sites if site.n_neurons):
        return True  # quantized in memory: the hash decides
    neurons = {site.name: site.neurons.tensor() for site in patch.sites}
    return rows_fit(base.model, stored, neurons, patch.rows_digest, base.projections)


def _reader(source: Path, model: nn.Module) -> Checkpoint | GgufRows:
    gguf = find_gguf(source)
    return Checkpoint(source, model) if gguf is None else GgufRows(read_header(gguf))
