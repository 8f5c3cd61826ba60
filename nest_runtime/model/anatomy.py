"""Where a model keeps its FFN neurons: one :class:`Projection` for every matrix that can be patched.

Detection reads the module tree, not a list of model classes. It finds a decoder layer's ``gate_proj`` and ``up_proj``,
a fused ``gate_up_proj``, the first of an FFN's two matrices, or gate and up of a layer's experts in one parameter. Of
a multimodal model only the language model counts. What it cannot identify with certainty (experts stored otherwise,
several towers, layers of different kinds) it refuses with UnknownArchitecture. It never patches in part.
``register_architecture`` adds another layout. Nothing here installs hooks or knows of patches.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from nest_runtime.errors import UnknownArchitecture, UsageError
from nest_runtime.model.projection import (
    Projection,
    canonical_name,
    is_experts,
    is_linear,
    module_of,
    shape_of,
    unwrap,
)
from nest_runtime.model.rows import read_rows, weight_of, write_rows

__all__ = [
    "Projection",
    "canonical_name",
    "find_projections",
    "is_experts",
    "module_of",
    "read_rows",
    "register_architecture",
    "unwrap",
    "weight_of",
    "write_rows",
]

_Linears = dict[str, list[tuple[str, nn.Module]]]

_LAYER_LISTS = ("layers", "h", "blocks", "block")
_SHARED_EXPERT = frozenset({"shared_expert", "shared_experts", "shared_mlp"})
_FFN_LEAVES = frozenset({"gate_proj", "up_proj", "down_proj"})
_FC_LEAVES = frozenset({"c_fc", "fc1", "fc_in", "dense_h_to_4h"})
_FFN_PART = re.compile(r"mlp|ffn|feed_forward|moe")
# Models whose forward splits gate_up_proj's output by chunk(2, dim=-1) into gate, then up.
_FUSED_GATE_FIRST = frozenset({"phi3", "glm", "glm4"})
_NOT_TEXT = ("vision_config", "audio_config", "vision_tower", "speech_config")

_REGISTERED: dict[str, dict[str, str]] = {}


def register_architecture(
    model_class: str,
    *,
    gate: str | None = None,
    up: str | None = None,
    gate_up: str | None = None,
    fc: str | None = None,
) -> None:
    """Tell ``find_projections`` where an architecture keeps its FFN projections.

    Args:
        model_class: name of the model's class, e.g. ``MyForCausalLM``. A second call replaces the first.
        gate, up: canonical module names with ``{layer}`` in place of the layer's index,
            e.g. ``transformer.blocks.{layer}.ffn.w1``.
        gate_up: one fused module; the first half of its outputs is gate, the second up.
        fc: the first of an FFN's two matrices.

    Raises:
        UsageError: no pattern is given, or one lacks ``{layer}``.
    """
    patterns = {key: value for key, value in {"gate": gate, "up": up, "gate_up": gate_up, "fc": fc}.items() if value}
    if not patterns or any(pattern.count("{layer}") != 1 for pattern in patterns.values()):
        raise UsageError(
            f"register_architecture({model_class!r}) got {patterns or 'no pattern'}",
            "give gate=, up=, gate_up= or fc= as a module name with {layer} in it, once",
        )
    _REGISTERED[model_class] = patterns


def find_projections(model: nn.Module) -> tuple[Projection, ...]:
    """Find every patchable FFN projection, in the model's order of layers and modules; public as ``nest.find_sites``.

    Args:
        model: a Hugging Face model, wrapped or not, on any device (meta too).

    Raises:
        UnknownArchitecture: none are known for this model; the message lists the linear layers found.
    """
    linears = _linears(model)
    patterns = _REGISTERED.get(type(unwrap(model)).__name__)
    found = _registered_projections(linears, patterns) if patterns else _detected_projections(model, linears)
    if not found:
        raise _unknown(model, linears, "no FFN projections were recognized")
    names = [projection.name for projection in found]
    if len(set(names)) != len(names):
        raise _unknown(model, linears, "two modules share one canonical name")
    return tuple(sorted(found, key=lambda projection: projection.layer))  # stable: the model's order within a layer


def _linears(model: nn.Module) -> _Linears:
    """Linear modules by canonical name; more than one where wrappers keep copies."""
    found: _Linears = defaultdict(list)
    for path, module in model.named_modules():
        if is_linear(module):
            found[canonical_name(path)].append((path, module))
    return found


def _projections(name: str, path: str, module: nn.Module, layer: int, kind: str) -> list[Projection]:
    outputs, inputs, layout = shape_of(module)
    if kind != "gate_up":
        return [Projection(name, layer, kind, path, inputs, outputs, 0, layout)]
    half = outputs // 2
    return [
        Projection(f"{name}:gate", layer, "gate", path, inputs, half, 0, layout),
        Projection(f"{name}:up", layer, "up", path, inputs, half, half, layout),
    ]


def _expert_projections(path: str, module: nn.Module, layer: int) -> list[Projection]:
    """Gate and up of all of a layer's experts; how they are stored, transformers' marks on the module say."""
    weight: torch.Tensor = module.gate_up_proj  # type: ignore[assignment]
    experts, outputs, inputs = weight.transpose(-1, -2).shape if module.is_transposed else weight.shape
    half, joined = outputs // 2, bool(module.is_concatenated)
    return [
        Projection(
            name=f"{canonical_name(path)}.gate_up_proj:{kind}",
            layer=layer,
            kind=kind,
            module=path,
            d_in=inputs,
            d_out=experts * half,
            offset=number * (half if joined else 1),
            layout="conv1d" if module.is_transposed else "linear",
            stride=1 if joined else 2,
            experts=experts,
            parameter="gate_up_proj",
        )
        for number, kind in enumerate(("gate", "up"))
    ]


def _registered_projections(linears: _Linears, patterns: dict[str, str]) -> list[Projection]:
    found: list[Projection] = []
    for name, entries in linears.items():
        for kind, pattern in patterns.items():
            before, after = pattern.split("{layer}")
            if match := re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), name):
                for path, module in entries:
                    found += _projections(name, path, module, int(match[1]), kind)
    return found


def _detected_projections(model: nn.Module, linears: _Linears) -> list[Projection]:
    within = _language_tower(model, linears)
    _refuse_unsupported(model, linears, within)
    model_type = getattr(getattr(unwrap(model), "config", None), "model_type", "")
    found: list[Projection] = []
    towers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path, module in model.named_modules():
        name = canonical_name(path)
        found_at = _position(name) if name.startswith(within) else None
        if found_at is None:
            continue
        tower, layer, leaf = found_at
        if is_experts(module):
            towers[tower][layer] |= {"gate", "up"}
            found += _expert_projections(path, module, layer)
        elif is_linear(module) and leaf in _FC_LEAVES | {"gate_proj", "up_proj", "gate_up_proj"}:
            kind = _kind(name, leaf, linears)
            if kind == "gate_up" and model_type not in _FUSED_GATE_FIRST:
                raise _unknown(model, linears, f"whether gate or up comes first in {name} is not known")
            towers[tower][layer] |= {"gate", "up"} if kind == "gate_up" else {kind}
            found += _projections(name, path, module, layer, kind)
    _refuse_uneven(model, linears, towers)
    return found


def _language_tower(model: nn.Module, linears: _Linears) -> str:
    """What the canonical names of the language model's modules begin with; empty for a model of text alone."""
    inner: Any = unwrap(model)
    config = getattr(inner, "config", None)
    key = next((key for key in _NOT_TEXT if getattr(config, key, None) is not None), None)
    if key is None:
        return ""
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    if not path or decoder is inner:
        raise _unknown(model, linears, f"it is multimodal ({key}), and its language model was not found")
    return canonical_name(path) + "."


def _position(name: str) -> tuple[str, int, str] | None:
    """Tower, layer and leaf of a module's name within a stack of layers, or None if it is something else."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(numbers) != 1 or numbers[0] == 0 or parts[numbers[0] - 1] not in _LAYER_LISTS:
        return None
    return ".".join(parts[: numbers[0]]), int(parts[numbers[0]]), parts[-1]


def _kind(name: str, leaf: str, linears: _Linears) -> str:
    if leaf == "up_proj" and name.removesuffix("up_proj") + "gate_proj" not in linears:
        return "fc"  # up_proj and down_proj alone (Nemotron): a two-matrix FFN
    return {"gate_proj": "gate", "up_proj": "up", "gate_up_proj": "gate_up"}.get(leaf, "fc")


def _refuse_unsupported(model: nn.Module, linears: _Linears, within: str) -> None:
    """Refuse FFN weights that would be left out unseen: experts stored in ways that are not understood."""
    understood = {f"{path}.gate_up_proj" for path, module in model.named_modules() if is_experts(module)}
    understood |= {name.removesuffix("gate_up_proj") + "down_proj" for name in understood}
    for path, parameter in model.named_parameters():
        name = canonical_name(path)
        if parameter.ndim == 3 and _FFN_PART.search(path) and name.startswith(within) and path not in understood:
            raise _unknown(model, linears, f"{name} is fused over experts in a way that is not understood")
    for name in linears:
        parts = name.split(".")
        if not name.startswith(within) or any(part.startswith("lora_") for part in parts):
            continue
        strange = _SHARED_EXPERT.intersection(parts) and parts[-1] not in _FFN_LEAVES
        if "experts" in parts or strange:
            raise _unknown(model, linears, f"it has experts in a form that is not understood ({name})")


def _refuse_uneven(model: nn.Module, linears: _Linears, towers: dict[str, dict[int, set[str]]]) -> None:
    """Refuse what would be patched in part only: several towers, or layers without their share."""
    if len(towers) > 1:
        raise _unknown(model, linears, f"it has several stacks of layers ({', '.join(sorted(towers))})")
    for tower, layers in towers.items():
        stack = next(module for path, module in model.named_modules() if canonical_name(path) == tower)
        missing = set(range(len(list(stack.children())))) - set(layers)
        kinds = {frozenset(kinds) for kinds in layers.values()}
        if missing or len(kinds) > 1 or kinds == {frozenset({"gate"})}:
            uneven = (
                f"layers without known FFN: {sorted(missing)}"
                if missing
                else f"kinds found: {sorted(map(sorted, kinds))}"
            )
            raise _unknown(model, linears, f"the layers of {tower} differ ({uneven})")


def _unknown(model: nn.Module, linears: _Linears, why: str) -> UnknownArchitecture:
    shapes: dict[str, str] = {}
    for name, entries in linears.items():
        outputs, inputs, _ = shape_of(entries[0][1])
        shapes.setdefault(re.sub(r"\.\d+\.", ".{layer}.", name), f"[{outputs}, {inputs}]")
    listed = [f"{name} {shape}" for name, shape in list(shapes.items())[:40]]
    model_class = type(unwrap(model)).__name__
    return UnknownArchitecture(
        f"{model_class}: {why}; expected gate_proj and up_proj, gate_up_proj, or the first of two matrices "
        f"in every decoder layer; linear layers found: {', '.join(listed) or 'none'}",
        f"teach it: nest_runtime.register_architecture({model_class!r}, "
        "gate='path.{layer}.to.gate', up='path.{layer}.to.up') (or gate_up=, or fc=)",
    )
