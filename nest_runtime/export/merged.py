"""A patch folded into a whole checkpoint: the base's files, byte by byte, but for the patched rows.

Files are copied and their rows changed in place, so memory holds one site's rows and never a tensor, and
sharding, order and headers stay as they are. What was written is checked against what was meant: every
tensor that was not to change has the base's digest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nest_runtime.errors import BaseMismatch, ExportError
from nest_runtime.export.folder import NOTE, check_target, new_folder, write_note
from nest_runtime.io import expand
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.base_rows import rows_digest, rows_fit
from nest_runtime.model.checkpoint import Checkpoint
from nest_runtime.model.fingerprint import model_hash, tensor_digests
from nest_runtime.model.gguf.header import find_gguf
from nest_runtime.model.load import skeleton
from nest_runtime.model.projection import Projection
from nest_runtime.patch.patch import Patch, check_sites
from nest_runtime.progress import Progress

# Weights in other forms would be the base's, unpatched, under the patched model's name.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".safetensors")

_OTHER_INDEXES = (".bin.index.json", ".h5.index.json")


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        folder: where.
        files: names of the files in it, relative to it.
        hash: model hash of the result.
        tensors: names of the stored tensors that differ from the base's.
        exact: whether the checkpoint's dtypes hold the sums without rounding beyond float32's.
        left_out: files of the base that were not copied: weights in other forms, which would be unpatched.
    """

    folder: Path
    files: tuple[str, ...]
    hash: str
    tensors: tuple[str, ...]
    exact: bool
    left_out: tuple[str, ...] = ()


def export_merged(
    patch: Patch,
    model_folder: str | Path,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write the base's checkpoint with the patch folded in.

    Args:
        patch: the patch.
        model_folder: the base's checkpoint, unquantized safetensors; its configuration and tokenizer are copied too.
        folder: to be made; with ``overwrite`` an earlier export may stand there.
        model: the base, in memory or on the meta device; made from the folder's configuration by default.
        overwrite: replace an earlier export.
        check: called with the finished folder before it takes its place; what it raises leaves nothing behind.
        progress: called as (stage, done, total).

    Raises:
        BaseMismatch: the folder is not the patch's base.
        ExportError: the base is a GGUF file; the folder is taken, or lies in the base's; or what was written is not
            what was meant.
        ModelError: the checkpoint is damaged, quantized, or keeps no single rows.
        SiteMismatch: the model has other sites.
    """
    source, target = Path(model_folder).resolve(), expand(folder).absolute()
    if target == source or source in target.parents:
        raise ExportError(f"{target} lies in the base's own folder {source}", "export to a folder beside it")
    check_target(target, overwrite)
    if (gguf := find_gguf(source)) is not None:
        raise ExportError(
            f"{gguf} is quantized in blocks: nothing can be folded into it",
            "export --to gguf, an adapter that llama.cpp puts on this very file",
        )
    model = skeleton(source) if model is None else model
    layout = {projection.name: projection for projection in find_projections(model)}
    check_sites(patch, layout.values())
    checkpoint = Checkpoint(source, model)
    _check_base(patch, source, model, checkpoint, progress)
    with new_folder(target, overwrite=overwrite) as staging:
        left_out = _copy(source, staging, checkpoint, progress)
        changed = fold_rows(patch, layout, checkpoint, staging)
        _check_rest(source, staging, changed, progress)
        result = model_hash(staging, progress=progress)
        write_note(staging, "merged", patch, hash=result)
        if check is not None:
            check(staging)
        files = tuple(sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()))
    dtypes = {checkpoint.tensors[name][1].dtype for name in changed}
    return Merged(target, files, result, tuple(sorted(changed)), dtypes <= {"F32", "F64"}, left_out)


def fold_rows(patch: Patch, layout: dict[str, Projection], checkpoint: Checkpoint, copy: Path) -> set[str]:
    """Write W₀[rows] + ΔW into a copy of the checkpoint's files; sums in float32 or wider, rounded once.

    Returns:
        Names of the stored tensors that were written to.
    """
    changed = set()
    for site in patch.sites:
        if not site.n_neurons:
            continue
        for stored in checkpoint.rows(layout[site.name], site.neurons.tensor()):
            pristine = stored.read()
            wide = torch.promote_types(pristine.dtype, torch.float32)
            folded = pristine.to(wide) + site.row_deltas(wide)[stored.where]
            stored.write(copy / stored.path.relative_to(checkpoint.folder), folded.to(pristine.dtype))
            changed.add(stored.entry.name)
    return changed


def _check_base(
    patch: Patch, folder: Path, model: nn.Module, checkpoint: Checkpoint, progress: Progress | None
) -> None:
    found = model_hash(folder, progress=progress)
    hint = "export with the patch's own base: the unpatched, unmerged checkpoint"
    if found != patch.base_hash:
        raise BaseMismatch(f"{patch.label} is for base {patch.base_hash}; {folder} is {found}", hint)
    neurons = {site.name: site.neurons.tensor() for site in patch.sites}
    layout = {projection.name: projection for projection in find_projections(model)}
    stored = {s.name: checkpoint.read(layout[s.name], neurons[s.name]) for s in patch.sites if s.n_neurons}
    if not rows_fit(model, stored, neurons, patch.rows_digest):
        rows = rows_digest(model, neurons, read=lambda _, projection, index: stored[projection.name])
        raise BaseMismatch(
            f"the rows that {patch.label} changes have digest {rows} in {folder}; it was made on {patch.rows_digest}",
            hint,
        )


def _copy(source: Path, staging: Path, checkpoint: Checkpoint, progress: Progress | None) -> tuple[str, ...]:
    """Copy the weights, and everything beside and below them that is not weights in another form.

    Gives what was left out, as paths relative to the source: it would be the base's, unpatched.
    """
    weights = {path.resolve() for path in checkpoint.files} | set(checkpoint.files)
    rest: list[Path] = []
    left_out: list[Path] = []
    for path in _below(source):
        if path in weights or path.name == NOTE:
            continue
        other = path.suffix in _OTHER_WEIGHTS or path.name.endswith(_OTHER_INDEXES)
        (left_out if other or not path.is_file() else rest).append(path)
    files = [*checkpoint.files, *rest]
    for number, path in enumerate(files):
        target = staging / path.relative_to(checkpoint.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        if progress is not None:
            progress("copy", number + 1, len(files))
    return tuple(str(path.relative_to(source)) for path in left_out)


def _below(folder: Path) -> list[Path]:
    """Everything in a folder and its folders but what is hidden; links to folders are not followed."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        found += _below(path) if path.is_dir() and not path.is_symlink() else [path]
    return found


def _check_rest(source: Path, staging: Path, changed: set[str], progress: Progress | None) -> None:
    """Nothing but the tensors that were to change differs from the base."""
    before, after = tensor_digests(source, progress=progress), tensor_digests(staging, progress=progress)
    differ = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if not differ <= changed:
        raise ExportError(
            f"{len(differ - changed)} tensors differ that should not, first {min(differ - changed)}",
            "the disk or the copy failed: export again",
        )
