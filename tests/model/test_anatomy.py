"""Finding FFN projections: every family by its own forward pass, wrappers seen through, the unknown refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from nest_runtime.errors import ModelError, SiteMismatch, UnknownArchitecture, UsageError
from nest_runtime.model import anatomy
from nest_runtime.model.anatomy import (
    Projection,
    canonical_name,
    find_projections,
    module_of,
    read_rows,
    register_architecture,
    unwrap,
    write_rows,
)
from nest_runtime.model.load import load_model
from tests.conftest import SIZES


def build(model_class: str, config_class: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, config_class)(**{**SIZES, **changes})
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


GATED = [
    ("LlamaForCausalLM", "LlamaConfig", {}),
    ("MistralForCausalLM", "MistralConfig", {}),
    ("Qwen2ForCausalLM", "Qwen2Config", {}),
    ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 16}),
    ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 16}),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 16}),
    ("Olmo2ForCausalLM", "Olmo2Config", {}),
]
FUSED = [
    ("Phi3ForCausalLM", "Phi3Config", {}),
    ("GlmForCausalLM", "GlmConfig", {"head_dim": 16}),
    ("Glm4ForCausalLM", "Glm4Config", {"head_dim": 16}),
]
TWO_MATRICES = [
    ("GPT2LMHeadModel", "GPT2Config", {}, "transformer.h.0.mlp.c_fc", "conv1d"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}, "gpt_neox.layers.0.mlp.dense_h_to_4h", "linear"),
    ("FalconForCausalLM", "FalconConfig", {}, "transformer.h.0.mlp.dense_h_to_4h", "linear"),
    ("BloomForCausalLM", "BloomConfig", {"n_head": 4}, "transformer.h.0.mlp.dense_h_to_4h", "linear"),
    ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "model.decoder.layers.0.fc1", "linear"),
    ("Starcoder2ForCausalLM", "Starcoder2Config", {}, "model.layers.0.mlp.c_fc", "linear"),
    ("PhiForCausalLM", "PhiConfig", {}, "model.layers.0.mlp.fc1", "linear"),
    ("NemotronForCausalLM", "NemotronConfig", {}, "model.layers.0.mlp.up_proj", "linear"),
]


@pytest.mark.parametrize(("model_class", "config_class", "changes"), GATED)
def test_gate_and_up(model_class: str, config_class: str, changes: dict[str, Any]) -> None:
    projections = find_projections(build(model_class, config_class, **changes))
    expected = [
        Projection(name, layer, kind, name, 64, 96)
        for layer in range(2)
        for kind in ("gate", "up")
        for name in [f"model.layers.{layer}.mlp.{kind}_proj"]
    ]
    assert list(projections) == expected


@pytest.mark.parametrize(("model_class", "config_class", "changes"), FUSED)
def test_a_fused_module_holds_gate_then_up(model_class: str, config_class: str, changes: dict[str, Any]) -> None:
    model = build(model_class, config_class, **changes)
    projections = find_projections(model)
    module = "model.layers.0.mlp.gate_up_proj"
    assert projections[:2] == (
        Projection(f"{module}:gate", 0, "gate", module, 64, 96),
        Projection(f"{module}:up", 0, "up", module, 64, 96, offset=96),
    )
    mlp, x = model.get_submodule("model.layers.0.mlp"), torch.randn(3, 64)
    gate, up = (x @ read_rows(model, projection, torch.arange(96)).T for projection in projections[:2])
    act = mlp.activation_fn  # type: ignore[union-attr]
    assert torch.allclose(mlp(x), mlp.down_proj(act(gate) * up), atol=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize(("model_class", "config_class", "changes", "name", "layout"), TWO_MATRICES)
def test_first_of_two_matrices(
    model_class: str, config_class: str, changes: dict[str, Any], name: str, layout: str
) -> None:
    model = build(model_class, config_class, **changes)
    projections = find_projections(model)
    assert len(projections) == 2
    assert (projections[0].name, projections[0].kind, projections[0].layout, projections[0].d_in) == (
        name,
        "fc",
        layout,
        64,
    )
    rows, x = torch.tensor([0, 5, projections[0].d_out - 1]), torch.randn(3, 64)
    module = module_of(model, projections[0])
    bias = module.bias if module.bias is not None else torch.zeros(projections[0].d_out)
    expected = module(x)[:, rows] - bias[rows]  # type: ignore[index]
    assert torch.allclose(x @ read_rows(model, projections[0], rows).T, expected, atol=1e-6)


EXPERTS = [
    ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}, 96),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32}, 32),
    ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "head_dim": 16}, 96),
]


@pytest.mark.parametrize(("model_class", "config_class", "changes", "each"), EXPERTS)
def test_experts_are_one_projection_a_layer_and_half(
    model_class: str, config_class: str, changes: dict[str, Any], each: int
) -> None:
    model = build(model_class, config_class, num_experts_per_tok=2, **changes)
    projections = find_projections(model)
    assert [(s.name, s.kind, s.d_in, s.d_out, s.experts) for s in projections[2:]] == [
        (f"model.layers.1.mlp.experts.gate_up_proj:{kind}", kind, 64, 4 * each, 4) for kind in ("gate", "up")
    ]
    module = module_of(model, projections[0])
    for name, parameter in module.named_parameters():  # biases are zero at the start, and matrices small
        torch.nn.init.normal_(parameter, std=0.5 if "bias" in name else 0.2)
    neurons = torch.arange(4 * each)
    rows = [read_rows(model, projection, neurons).reshape(4, each, 64) for projection in projections[:2]]
    x, chosen, weights = torch.randn(7, 64), torch.randint(4, (7, 2)), torch.rand(7, 2)
    expected = torch.stack(
        [sum(weights[t, k] * by_hand(module, rows, int(chosen[t, k]), x[t]) for k in range(2)) for t in range(7)]
    )
    assert torch.allclose(module(x, chosen, weights), expected, atol=1e-4)


def by_hand(module: Any, rows: list[torch.Tensor], expert: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's output for one token, from the rows that ``read_rows`` gave."""
    gate, up = rows[0][expert] @ x, rows[1][expert] @ x
    if type(module).__name__ != "GptOssExperts":
        return module.down_proj[expert] @ (nn.functional.silu(gate) * up)
    gate = (gate + module.gate_up_proj_bias[expert, ::2]).clamp(max=module.limit)
    up = (up + module.gate_up_proj_bias[expert, 1::2]).clamp(-module.limit, module.limit)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return hidden @ module.down_proj[expert] + module.down_proj_bias[expert]


def test_dense_layers_and_shared_experts_stand_beside_experts() -> None:
    sizes = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
    sizes |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
    model = build("DeepseekV3ForCausalLM", "DeepseekV3Config", **sizes, first_k_dense_replace=1)
    assert [
        (projection.name.removeprefix("model.layers."), projection.d_out) for projection in find_projections(model)
    ] == [
        ("0.mlp.gate_proj", 96),
        ("0.mlp.up_proj", 96),
        ("1.mlp.experts.gate_up_proj:gate", 64),
        ("1.mlp.experts.gate_up_proj:up", 64),
        ("1.mlp.shared_experts.gate_proj", 16),
        ("1.mlp.shared_experts.up_proj", 16),
    ]


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL = [
    (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**SIZES, "head_dim": 16}, "vision_config": {**VISION, "image_size": 16, "patch_size": 8}},
    ),
    (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {**SIZES, "head_dim": 16},
            "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
    (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        },
    ),
]


@pytest.mark.parametrize(("model_class", "config_class", "configs"), MULTIMODAL)
def test_of_a_multimodal_model_the_language_tower_counts(
    model_class: str, config_class: str, configs: dict[str, Any]
) -> None:
    config = getattr(transformers, config_class)(**configs)
    model = getattr(transformers, model_class)(config)
    assert [projection.name for projection in find_projections(model)] == [
        f"model.language_model.layers.{layer}.mlp.{kind}_proj" for layer in range(2) for kind in ("gate", "up")
    ]
    vision = [name for name, module in model.named_modules() if "vis" in name and isinstance(module, nn.Linear)]
    assert vision  # there are others, which were left alone


REFUSED = [
    ("Llama4ForCausalLM", "Llama4TextConfig", {"num_local_experts": 2}, "experts in a way that is not understood"),
    ("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", {"shared_intermediate_size": 32}, "experts in a form"),
    ("MambaForCausalLM", "MambaConfig", {}, "no FFN projections"),
    ("BartForConditionalGeneration", "BartConfig", {"d_model": 64}, "several stacks"),
]


@pytest.mark.parametrize(("model_class", "config_class", "changes", "reason"), REFUSED)
def test_what_is_not_supported_is_refused(
    model_class: str, config_class: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        find_projections(build(model_class, config_class, **changes))
    assert reason in caught.value.message
    assert model_class in caught.value.message
    assert "linear layers found" in caught.value.message
    assert f"register_architecture('{model_class}'" in caught.value.hint


def test_a_multimodal_model_without_a_language_tower_is_refused(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, device="cpu").model
    model.config.vision_config = {"layers": 2}
    model.get_decoder = lambda: model
    with pytest.raises(UnknownArchitecture, match="its language model was not found"):
        find_projections(model)


def test_layers_of_different_kinds_are_refused(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, device="cpu").model
    model.model.layers[1].mlp = nn.Linear(64, 64)
    with pytest.raises(UnknownArchitecture, match=r"layers without known FFN: \[1\]"):
        find_projections(model)


# Wrappers.


def test_names_are_the_same_under_compile_and_peft(tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(tiny_llama, device="cpu").model
    plain = find_projections(model)
    rows = torch.tensor([0, 7, 95])
    expected = read_rows(model, plain[0], rows)
    compiled = torch.compile(model)
    assert [projection.name for projection in find_projections(compiled)] == [projection.name for projection in plain]
    assert find_projections(compiled)[0].module == "_orig_mod.model.layers.0.mlp.gate_proj"
    assert unwrap(compiled) is model
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    for live in (wrapped, torch.compile(wrapped)):
        projections = find_projections(live)
        assert [(s.name, s.d_in, s.d_out) for s in projections] == [(s.name, s.d_in, s.d_out) for s in plain]
        assert projections[0].module.endswith("base_model.model.model.layers.0.mlp.gate_proj.base_layer")
        assert torch.equal(read_rows(live, projections[0], rows), expected)
        assert torch.equal(read_rows(live, plain[0], rows), expected)  # found before it was wrapped
    assert unwrap(wrapped) is model


def test_compiled_layers_inside_a_model(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, device="cpu").model
    plain = [projection.name for projection in find_projections(model)]
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer)
    assert [projection.name for projection in find_projections(model)] == plain


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("_orig_mod.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer", "model.layers.0.mlp.up_proj"),
        ("module._fsdp_wrapped_module.model.layers.0._orig_mod.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("_orig_mod.base_model.model._orig_mod.lm_head", "lm_head"),
        ("model.module.x", "model.module.x"),
    ],
)
def test_canonical_names(path: str, name: str) -> None:
    assert canonical_name(path) == name


# Teaching another architecture.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.ModuleDict({"w1": nn.Linear(8, 12), "w3": nn.Linear(8, 12), "w13": nn.Linear(8, 24)})


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 5)


def test_register_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_REGISTERED", {})
    model = Stranger()
    with pytest.raises(UnknownArchitecture) as caught:
        find_projections(model)
    assert "tower.{layer}.ffn.w1 [12, 8]" in caught.value.message
    assert "head [5, 8]" in caught.value.message
    register_architecture("Stranger", gate="tower.{layer}.ffn.w1", up="tower.{layer}.ffn.w3")
    projections = find_projections(torch.compile(model))
    assert [(projection.name, projection.kind, projection.layer) for projection in projections[-2:]] == [
        ("tower.2.ffn.w1", "gate", 2),
        ("tower.2.ffn.w3", "up", 2),
    ]
    register_architecture("Stranger", gate_up="tower.{layer}.ffn.w13")
    assert [(s.name, s.offset, s.d_out) for s in find_projections(model)[:2]] == [
        ("tower.0.ffn.w13:gate", 0, 12),
        ("tower.0.ffn.w13:up", 12, 12),
    ]


@pytest.mark.parametrize("patterns", [{}, {"gate": "a.b"}, {"fc": "{layer}.{layer}"}])
def test_bad_registrations(patterns: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="register_architecture"):
        register_architecture("Nobody", **patterns)


# Rows.


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [("LlamaForCausalLM", "LlamaConfig"), ("Phi3ForCausalLM", "Phi3Config"), ("GPT2LMHeadModel", "GPT2Config")],
)
def test_rows_are_copies_and_written_in_place(model_class: str, config_class: str) -> None:
    model = build(model_class, config_class)
    projection = find_projections(model)[1]
    module = module_of(model, projection)
    before, rows = module.weight.detach().clone(), torch.tensor([0, 3, projection.d_out - 1])  # type: ignore[union-attr, operator]
    copied = read_rows(model, projection, rows)
    assert copied.shape == (3, 64)
    copied.zero_()
    assert torch.equal(module.weight, before)  # type: ignore[arg-type]
    kept, address = read_rows(model, projection, rows), module.weight.data_ptr()  # type: ignore[union-attr, operator]
    write_rows(model, projection, rows, kept.double() + 1)
    assert torch.equal(read_rows(model, projection, rows), kept + 1)
    assert module.weight.data_ptr() == address  # type: ignore[union-attr, operator]
    assert int((module.weight != before).sum()) == 3 * 64  # type: ignore[arg-type, union-attr]
    write_rows(model, projection, rows, kept)
    assert torch.equal(module.weight, before)  # type: ignore[arg-type]


def test_rows_of_a_missing_module_and_of_meta_weights(tiny_llama: Path, tiny_qwen: Path) -> None:
    model = load_model(tiny_llama, device="cpu").model
    projection = find_projections(model)[0]
    gone = Projection("model.layers.9.mlp.up_proj", 9, "up", "model.layers.9.mlp.up_proj", 64, 96)
    with pytest.raises(SiteMismatch, match=r"layers\.9"):
        read_rows(model, gone, torch.tensor([0]))
    with pytest.raises(ModelError, match="not in memory"):
        read_rows(model.to("meta"), projection, torch.tensor([0]))


def test_quantized_weights_are_refused_by_rows_but_found(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, device="cpu").model
    projection = find_projections(model)[0]
    packed = nn.Parameter(torch.zeros(96 * 64 // 2, 1, dtype=torch.uint8), requires_grad=False)
    module_of(model, projection).weight = packed
    assert find_projections(model)[0] == projection
    with pytest.raises(ModelError, match="hook mode"):
        read_rows(model, projection, torch.tensor([0]))
