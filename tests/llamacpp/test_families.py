"""Every family whose patches go into a GGUF adapter, as a tiny model that llama.cpp itself converted and loads.

llama.cpp's own converter says which of its tensors is which weight of the checkpoint, and in what order its rows are.
An adapter with a wrong name, order, transposition or scale gives other logits here, or is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nest_runtime.export import export_gguf
from nest_runtime.export.gguf import ADAPTER, ARCHITECTURES
from nest_runtime.model.load import load_model
from nest_runtime.runtime import PatchRuntime
from tests.llamacpp.agreement import logits_of
from tests.llamacpp.conftest import binding, converted, environment
from tests.support.families import ALL_HEADS, FAMILIES, HEADS, IDS, SMALL, Family
from tests.support.patches import make_patch

MULTIMODAL = next(family for family in FAMILIES if family.title == "Gemma 3")
SCALE = {"query_pre_attn_scalar": 16}  # the heads' size, as on the Hub: llama.cpp takes that for granted
SIZES = {
    "Gemma 2": {**HEADS, **SCALE},
    "Gemma 3 (text)": {**HEADS, **SCALE},
    "Gemma 3": {**MULTIMODAL.sizes, "text_config": {**MULTIMODAL.sizes["text_config"], **SCALE}},
}
EXPORTED = [
    replace(family, sizes=SIZES.get(family.title, family.sizes))
    for family in FAMILIES
    if family.model_class in ARCHITECTURES
]
BESIDE = [  # classes of ARCHITECTURES that the matrix has no row of
    Family("Phi-1, Phi-2", "PhiForCausalLM", "PhiConfig", {**ALL_HEADS, "intermediate_size": 128}),
    Family("Bloom", "BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_head": 2}),
    Family("Nemotron", "NemotronForCausalLM", "NemotronConfig", SMALL),
]
OLDER = {  # settings as checkpoints on the Hub have them, and their names there
    "GPT2LMHeadModel": {"n_ctx": 512},
    "GPTNeoXForCausalLM": {"rotary_pct": 0.25},
    "FalconForCausalLM": {"num_kv_heads": 1},
}


def test_no_class_is_left_out() -> None:
    assert {family.model_class for family in [*EXPORTED, *BESIDE]} == set(ARCHITECTURES)


@pytest.mark.parametrize("family", [*EXPORTED, *BESIDE], ids=lambda family: family.title)
def test_an_adapter_does_in_llama_cpp_what_the_patch_does(family: Family, tmp_path: Path) -> None:
    environment("bin/python")
    folder = family.save(tmp_path / "model")
    path = converted(folder, tmp_path / "model.gguf", **OLDER.get(family.model_class, {}))
    loaded = load_model(folder, device="cpu", dtype="float32")
    patch = make_patch(loaded.model, base_hash=loaded.hash, neurons=12, loadings=True, scale=0.5)
    export_gguf(patch, tmp_path / "adapter", model=loaded.model)
    ids = IDS[0].tolist()
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        base = logits_of(loaded.model)(ids, 0)
        runtime.activate(runtime.add(patch), mode="hook")
        patched = logits_of(loaded.model)(ids, 0)
    with binding(path, tmp_path / "adapter" / ADAPTER, float32=True) as llama:
        off, on = (llama.logits(ids, 0, scale)[:, : base.shape[1]] for scale in (0.0, 1.0))
    moved, wrong_base, wrong = (_distance(one, two) for one, two in ((patched, base), (off, base), (on, patched)))
    print(f"\n{family.title}: base {wrong_base:.2g}, patched {wrong:.2g}, moved {moved:.2g}")
    largest = float(base.abs().max())
    assert wrong_base <= 1e-3 * largest
    assert wrong <= 1e-3 * largest
    assert moved > 20 * wrong


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
