"""Taking patch files apart and sealing them again, by docs/reference/patch-format.md and not by the package's code."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from nest_runtime.patch.patch import Patch, Site

ZERO_HASH = "sha256:" + "0" * 64
ONE_HASH = "sha256:" + "1" * 64


def golden_patch() -> Patch:
    """The patch of tests/data/golden_v1.safetensors: every dtype, loadings, z, an empty site, odd header values."""
    i32 = torch.int32
    gate = Site(
        "model.layers.0.mlp.gate_proj",
        6,
        torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, -0.125]]),
        torch.tensor([0, 3, 5], dtype=i32),
        torch.tensor([1, 0, 1], dtype=i32),
        loadings=torch.tensor([1.0, 0.5, -2.0]),
        z=torch.tensor([3.5, 4.0, 3.25]),
        stats={"silhouette": 0.25, "probe_accuracy": 1.0},
    )
    up = Site(
        "model.layers.0.mlp.up_proj",
        6,
        torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16),
        torch.tensor([4], dtype=i32),
        torch.tensor([0], dtype=i32),
    )
    fused = Site(
        "model.layers.1.mlp.gate_up_proj:up",
        6,
        torch.tensor([[-1.0, 0.5, 0.0]], dtype=torch.float16),
        torch.tensor([1, 2], dtype=i32),
        torch.tensor([0, 0], dtype=i32),
    )
    empty = Site(
        "model.layers.1.mlp.up_proj", 6, torch.empty(0, 3), torch.empty(0, dtype=i32), torch.empty(0, dtype=i32)
    )
    return Patch(
        name="golden",
        version="v1",
        base_hash=ZERO_HASH,
        rows_digest=ONE_HASH,
        architecture="LlamaForCausalLM",
        sites=(gate, up, fused, empty),
        serial=7,
        base_model="tiny",
        parent="sha256:" + "2" * 64,
        method={
            "z": 3.0,
            "steps": 200,
            "pooling": "max",
            "tiny": 1e-07,
            "nested": {"b": [1, None, True], "a": "é\n\x1f"},
        },
        data={"harmful": "sha256:" + "3" * 64},
        metrics={"asr": 0.0},
        created="2026-02-18T12:00:00Z",
    )


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A file's safetensors header, patch header, and data area."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    return outer, json.loads(outer["__metadata__"]["nest_patch"]), data[8 + length :]


def put_together(outer: Any, header: Any, area: bytes) -> bytes:
    """The file of these parts, as they are; ``header`` may be text already."""
    if header is not None:
        text = header if isinstance(header, str) else dump(header)
        outer = {**outer, "__metadata__": {"nest_patch": text}}
    body = dump(outer).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body + area


def seal(outer: dict[str, Any], header: dict[str, Any], area: bytes) -> bytes:
    """The file of these parts with the digest that they have, written from the specification."""
    header = {key: value for key, value in header.items() if key != "digest"}
    rows = []
    for name in sorted(key for key in outer if key != "__metadata__"):
        start, stop = outer[name]["data_offsets"]
        rows.append([name, outer[name]["dtype"], outer[name]["shape"], hashlib.sha256(area[start:stop]).hexdigest()])
    digest = hashlib.sha256(dump({"header": header, "tensors": rows}).encode()).hexdigest()
    return put_together(outer, {**header, "digest": f"sha256:{digest}"}, area)


def dump(value: Any) -> str:
    """Canonical JSON as the specification has it; only the outer header keeps its order of keys."""
    ordered = isinstance(value, dict) and "__metadata__" in value
    return json.dumps(value, sort_keys=not ordered, separators=(",", ":"), ensure_ascii=False)


def with_tensor(data: bytes, name: str, content: torch.Tensor | None, rename: str = "") -> bytes:
    """A sealed file in which one tensor is replaced, renamed, added or (None) left out."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}
    names |= {torch.int64: "I64", torch.float64: "F64", torch.int8: "I8"}
    outer, header, area = take_apart(data)
    parts = {
        key: (entry["dtype"], entry["shape"], area[slice(*entry["data_offsets"])])
        for key, entry in outer.items()
        if key != "__metadata__"
    }
    parts.pop(name, None)
    if content is not None:
        flat = content.contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        parts[rename or name] = (names[content.dtype], list(content.shape), raw)
    new: dict[str, Any] = {"__metadata__": {}}
    joined = b""
    for key, (dtype, shape, raw) in parts.items():
        new[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(joined), len(joined) + len(raw)]}
        joined += raw
    return seal(new, header, joined)


def with_header(data: bytes, /, **changes: Any) -> bytes:
    """A sealed file with other header fields; the value ``...`` leaves one out."""
    outer, header, area = take_apart(data)
    header.update(changes)
    return seal(outer, {key: value for key, value in header.items() if value is not ...}, area)
