"""A patch as a PEFT adapter, and back: adapter_config.json and adapter_model.safetensors.

PEFT (0.21) computes with it what the patch computes; vLLM's LoRA reader (0.32) takes it too, in the form of
``engine="vllm"``. What a pair of matrices cannot say (clusters without neurons, z-scores, the header) stands
in the file's metadata, so that ``import_peft`` gives the very patch again, or refuses.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nest_runtime.errors import DigestMismatch, ExportError, PatchFormatError, reason_of
from nest_runtime.export.folder import NOTE, new_folder, write_note
from nest_runtime.export.lora import Pair, b_index, layout_of, pairs_of
from nest_runtime.io import expand, replacing
from nest_runtime.model.projection import Projection
from nest_runtime.patch.patch import FORMAT_VERSIONS, Patch, Site
from nest_runtime.patch.values import torch_dtype

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
_PREFIX = "base_model.model."
_HEADER, _SITES = "nest_patch", "nest_sites"


@dataclass(frozen=True)
class Adapter:
    """What was written.

    Attributes:
        folder: where.
        files: names of the files in it.
        rank: the largest rank of a module.
        modules: how many modules it adapts.
    """

    folder: Path
    files: tuple[str, ...]
    rank: int
    modules: int


def export_peft(
    patch: Patch,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    engine: Literal["peft", "vllm"] = "peft",
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Adapter:
    """Write a patch as a LoRA adapter of scaling 1: A holds the cluster rows, B the loadings.

    Args:
        patch: the patch.
        folder: to be made; with ``overwrite`` an earlier export may stand there.
        model: the base, in memory or on the meta device; needed for patches of experts, checked against otherwise.
        engine: ``peft`` gives every module its own rank (``rank_pattern``); ``vllm``, which reads one rank for all,
            pads with zeros to the largest.
        overwrite: replace an earlier export.
        check: called with the finished folder before it takes its place; what it raises leaves nothing behind.

    Returns:
        What was written.

    Raises:
        ExportError: the patch changes nothing; experts without a model, or for vLLM; the folder is taken.
        SiteMismatch: the model has other sites.
    """
    layout = layout_of(patch, model)
    pairs = pairs_of(patch, layout)
    rank = max(pair.rank for pair in pairs)
    if engine == "vllm":
        pairs = [pair.padded(rank) for pair in _without_experts(pairs, rank)]
    conv1d = model is not None and any(type(m).__name__ == "Conv1D" for m in model.modules())
    with new_folder(folder, overwrite=overwrite) as staging:
        config = adapter_config(patch, pairs, rank, conv1d)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with replacing(staging / WEIGHTS) as temporary:
            save_file(_tensors(pairs), temporary, metadata={"format": "pt", **_metadata(patch, layout)})
        write_note(staging, engine, patch, rank=rank, modules=len(pairs))
        if check is not None:
            check(staging)
    return Adapter(Path(folder), (CONFIG, WEIGHTS, NOTE), rank, len(pairs))


def adapter_config(patch: Patch, pairs: Sequence[Pair], rank: int, conv1d: bool = False) -> dict[str, Any]:
    """The values of adapter_config.json; ``lora_alpha`` equals the rank everywhere: scaling 1."""
    smaller = {_target(pair): pair.rank for pair in pairs if pair.rank < rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": patch.base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": [pair.module for pair in pairs if not pair.experts],
        "target_parameters": [_target(pair) for pair in pairs if pair.experts] or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def import_peft(folder: str | Path) -> Patch:
    """The patch that ``export_peft`` wrote, rebuilt from the adapter's matrices.

    Args:
        folder: an adapter of ours, for either engine. Of other adapters' matrices only those of one nonzero number a
            row are a patch, and none says which base it is for: they are refused.

    Raises:
        PatchFormatError: no adapter, or none that came from a patch, or its matrices are not the patch's any more.
        DigestMismatch: its numbers were changed since.
    """
    path = expand(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PatchFormatError(
            f"{path} cannot be read: {reason_of(error)}", "name the folder of an exported adapter"
        ) from error
    try:
        header, index = json.loads(metadata[_HEADER]), json.loads(metadata[_SITES])
        patch = _rebuild(header, index, tensors)
        digest = header["digest"]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise PatchFormatError(
            f"{path} is no adapter written from a patch, or was written anew since: {type(error).__name__}: {error}",
            "export the patch again; adapters of other origin cannot become patches",
        ) from error
    if patch.digest != digest:
        raise DigestMismatch(
            f"{path}: its numbers have digest {patch.digest}; it was exported as {digest}",
            "the adapter was trained on or changed: export the patch again",
        )
    return patch


def _without_experts(pairs: list[Pair], rank: int) -> list[Pair]:
    if any(pair.experts for pair in pairs):
        raise ExportError("vLLM reads no adapter of this form for experts", "export --to merged, and serve that")
    if rank > VLLM_RANKS[-1]:
        raise ExportError(
            f"the patch has rank {rank}; vLLM takes at most {VLLM_RANKS[-1]}",
            "export --to merged, and serve that",
        )
    return pairs


def _target(pair: Pair) -> str:
    return f"{pair.module}.{pair.parameter}" if pair.experts else pair.module


def _tensors(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    tensors = {}
    for pair in pairs:
        tensors[f"{_PREFIX}{pair.module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{_PREFIX}{pair.module}.lora_B.weight"] = pair.b.contiguous()
    return tensors


def _metadata(patch: Patch, layout: Mapping[str, Projection]) -> dict[str, str]:
    """What makes the adapter the patch again: its header, and what of its sites A and B do not hold."""
    sites = []
    for site in patch.sites:
        sites.append(
            {
                "projection": asdict(layout[site.name]),
                "rows": site.n_clusters,
                "dtype": site.deltas.dtype_name,
                "neurons": site.neurons.tensor().tolist(),
                "clusters": site.clusters.tensor().tolist(),
                "loadings": site.loadings is not None,
                "z": None if site.z is None else site.z.tensor().tolist(),
            }
        )
    header = {**patch.header(), "digest": patch.digest}
    return {_HEADER: json.dumps(header, ensure_ascii=False), _SITES: json.dumps(sites)}


def _rebuild(header: Mapping[str, Any], index: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> Patch:
    if header["format_version"] not in FORMAT_VERSIONS:
        raise ValueError(f"format version {header['format_version']!r}; this release reads {FORMAT_VERSIONS}")
    layout = {facts["projection"]["name"]: Projection(**facts["projection"]) for facts in index}
    columns: Counter[str] = Counter()  # of each module, those that sites before have taken
    sites = []
    for entry, facts in zip(header["sites"], index, strict=True):
        projection = layout[entry["name"]]
        sites.append(_site(entry, facts, projection, columns[projection.tensor], tensors))
        columns[projection.tensor] += facts["rows"]
    fields = {key: value for key, value in header.items() if key not in {"format_version", "digest", "sites"}}
    patch = Patch(**fields, sites=tuple(sites))
    _check_all(pairs_of(patch, layout), tensors)
    return patch


def _site(
    entry: Mapping[str, Any],
    facts: Mapping[str, Any],
    projection: Projection,
    column: int,
    tensors: Mapping[str, torch.Tensor],
) -> Site:
    """A site from its columns of A [r, d_in] and B [outputs, r]; an empty site has none."""
    neurons = torch.tensor(facts["neurons"], dtype=torch.int32)
    clusters = torch.tensor(facts["clusters"], dtype=torch.int32)
    deltas, loadings = torch.zeros(0, projection.d_in), torch.zeros(0) if facts["loadings"] else None
    if len(neurons):
        module = projection.tensor.removesuffix(f".{projection.parameter}")
        a, b = (tensors[f"{_PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        deltas = a[column : column + facts["rows"]]
        experts = max(projection.experts, 1)
        expert, row, cluster = b_index(neurons, clusters, projection, column)
        loadings = b[row, cluster * experts + expert].float() if facts["loadings"] else None
    return Site(
        name=entry["name"],
        d_out=entry["d_out"],
        deltas=deltas.to(torch_dtype(facts["dtype"])),  # type: ignore[arg-type]
        neurons=neurons,  # type: ignore[arg-type]
        clusters=clusters,  # type: ignore[arg-type]
        loadings=loadings,  # type: ignore[arg-type]
        z=None if facts["z"] is None else torch.tensor(facts["z"], dtype=torch.float32),  # type: ignore[arg-type]
        stats=entry["stats"],
    )


def _check_all(pairs: Sequence[Pair], tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that the adapter's tensors, by PEFT's names, hold these pairs to the bit, and zeros elsewhere.

    Raises:
        ValueError: they do not.
    """
    left = dict(tensors)
    for name, expected in _tensors(pairs).items():
        found = left.pop(name).float()
        if name.endswith("lora_A.weight"):
            core, rest = found[: len(expected)], found[len(expected) :]
        else:
            core, rest = found[:, : expected.shape[1]], found[:, expected.shape[1] :]
        if not torch.equal(core, expected) or bool(rest.any()):
            raise ValueError(f"{name} is not the patch's")
    if left:
        raise ValueError(f"tensor {next(iter(left))} is not the patch's")
