"""Which models which engine serves: what would be answered wrongly is refused, and the plain engine takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nest_runtime.errors import EngineError
from nest_runtime.model.load import load_model
from nest_runtime.runtime import PatchRuntime
from tests.conftest import save_tiny
from tests.support.engine import alone, answers
from tests.support.patches import make_patch

SMALL = {"initializer_range": 0.2, "num_hidden_layers": 2, "num_key_value_heads": 4}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "BloomForCausalLM": ("BloomConfig", {"n_head": 4, "n_layer": 2, **SMALL}),
    "GPTJForCausalLM": ("GPTJConfig", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, **SMALL}),
    "MptForCausalLM": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, **SMALL}),
    "FalconForCausalLM": ("FalconConfig", SMALL),
    "StableLmForCausalLM": ("StableLmConfig", SMALL),
    "NemotronForCausalLM": ("NemotronConfig", {**SMALL, "head_dim": 16}),
    "JambaForCausalLM": (
        "JambaConfig",
        {**SMALL, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "DogeForCausalLM": ("DogeConfig", SMALL),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {
            **SMALL,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}
PROMPTS = [list(range(5, 8)), list(range(20, 70)), list(range(5, 17)), list(range(5, 8)), list(range(5, 290))]


@pytest.mark.parametrize("name", ODD)
def test_the_plain_engine_answers_what_the_other_refuses_or_both_are_right(name: str, tmp_path: Path) -> None:
    config, sizes = ODD[name]
    loaded = load_model(save_tiny(tmp_path / "model", name, config, **sizes))
    truth = [alone(loaded.model, prompt, 12) for prompt in PROMPTS]
    groups = [[(prompt, None, 12) for prompt in PROMPTS], [(PROMPTS[1], None, 12)]]
    expected = [truth, [truth[1]]]
    refusal = None
    try:
        assert answers(loaded.model, "transformers", groups) == expected
    except EngineError as error:
        refusal = error
    if refusal is not None:
        assert f"{name} cannot be served by the transformers engine" in refusal.message
        assert "--engine generate" in refusal.hint
    loaded = load_model(tmp_path / "model")
    assert answers(loaded.model, "generate", groups) == expected


@pytest.mark.parametrize("kind", ["transformers", "generate"])
def test_patches_mix_in_a_batch_of_either_engine(kind: str, tiny_llama: Path) -> None:
    loaded = load_model(tiny_llama)
    runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
    patches = [
        make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, scale=1.0, neurons=40, base_hash=loaded.hash)
        for n in (1, 2)
    ]
    for patch in patches:
        runtime.add(patch)
    keys = [None, *(patch.digest for patch in patches)]
    cases = [(PROMPTS[number % 4], keys[number % 3], 5 + number) for number in range(12)]
    expected = []
    for prompt, key, count in cases:
        with runtime.using(key):
            expected.append(alone(loaded.model, prompt, count))
    assert answers(loaded.model, kind, [cases], runtime=runtime) == [expected]
