"""Small valid patches that need no model, for tests of the store and the command line."""

from __future__ import annotations

from typing import Any

from nest_runtime.patch.patch import Patch
from tests.support.patches import random_site

BASE_A = "sha256:" + "a" * 64
BASE_B = "sha256:" + "b" * 64


def small_patch(version: str = "v1", *, name: str = "test", base: str = BASE_A, seed: int = 0, **fields: Any) -> Patch:
    """A patch with one site of 8 rows of 4; another seed, other content."""
    serial = int(version[1:]) if version[1:].isdigit() else 1
    defaults: dict[str, Any] = {"serial": serial, "base_model": "tiny-a" if base == BASE_A else "tiny-b"}
    return Patch(
        name=name,
        version=version,
        base_hash=base,
        rows_digest="sha256:" + "c" * 64,
        architecture="LlamaForCausalLM",
        sites=(random_site("model.layers.0.mlp.gate_proj", 8, 4, neurons=3, seed=seed),),
        **{**defaults, **fields},
    )
