"""One patch on the forms a base comes in: half precision, quantized, dispatched, tied, checkpointing, under PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nest_runtime.errors import BaseMismatch, ModelError, TrainingError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.model.load import load_model
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.pipeline import train_patch
from nest_runtime.train.warm_start import parent_sites, parent_values
from tests.support.families import FAMILIES, TUNED, Family, close, dense, logits
from tests.support.patches import make_patch
from tests.support.train import benign_examples, harmful_examples

BY_TITLE = {family.title: family for family in FAMILIES}
LLAMA, PHI, GPT2, MIXTRAL, OSS, OPT = (
    BY_TITLE[title]
    for title in (
        "Llama 2, Llama 3, SmolLM 1 and 2",
        "Phi-3, Phi-4-mini",
        "GPT-2",
        "Mixtral",
        "gpt-oss (unquantized)",
        "OPT",
    )
)
Folder = Callable[[Family], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def folder(family: Family) -> Path:
        if family.title not in made:
            made[family.title] = family.save(tmp_path_factory.mktemp("forms") / family.model_class)
        return made[family.title]

    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


# Half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [LLAMA, PHI, GPT2, MIXTRAL, OSS], ids=lambda family: family.title)
def test_half_precision(family: Family, dtype: torch.dtype, folders: Folder) -> None:
    """A patch of the float32 checkpoint, on the model loaded in half: by hook, folded, off again to the bit."""
    folder = folders(family)
    patch = make_patch(load(folder, dtype=torch.float32), neurons=12, loadings=True, scale=0.3)
    model = load(folder, dtype=dtype)
    base, start = logits(model), copy.deepcopy(model.state_dict())
    with PatchRuntime(model) as runtime:
        runtime.add(patch)  # another hash in memory; the folder it came from speaks for it
        expected = logits(dense(load(folder, dtype=torch.float32), patch))
        change = float((expected - base.float()).abs().max())
        for mode in ("hook", "fold"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            off = float((logits(model).float() - expected).abs().max())
            assert off < 0.25 * change, (mode, off, change)
        runtime.deactivate()
        assert torch.equal(logits(model), base)
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    stranger = load(folder, dtype=dtype)
    with torch.no_grad():
        for name, parameter in stranger.named_parameters():
            if "c_fc" in name or "gate" in name:
                parameter.add_(0.5)
    with pytest.raises(BaseMismatch), PatchRuntime(stranger) as runtime:
        runtime.add(patch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", [LLAMA, MIXTRAL], ids=lambda family: family.title)
def test_training_in_half_precision(family: Family, dtype: str, folders: Folder) -> None:
    loaded = load_model(folders(family), device="cpu", dtype=dtype)
    before = copy.deepcopy(loaded.model.state_dict())
    result = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(5),
        benign_examples(5),
        recipe=TUNED.evolve(lr=1e-2, steps=4),
        name="m",
        version="v1",
        base_hash=loaded.hash,
    )
    assert any(bool(site.deltas.tensor().any()) for site in result.patch.sites)
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        base = logits(loaded.model)
        runtime.activate(runtime.add(result.patch))
        assert not torch.equal(logits(loaded.model), base)


# Quantized.


def quantized(folder: Path, bits: int, by: str) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    if bits == 8:
        config = torchao.Int8WeightOnlyConfig()
    else:
        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16))
    if by == "transformers":
        from transformers import TorchAoConfig

        return load(folder, quantization_config=TorchAoConfig(config))
    model = load(folder)
    torchao.quantize_(model, config)
    return model


@pytest.mark.parametrize(("bits", "by"), [(8, "torchao"), (4, "torchao"), (8, "transformers")])
def test_a_quantized_base_takes_a_patch_by_hook(bits: int, by: str, folders: Folder) -> None:
    folder = folders(LLAMA)
    patch = make_patch(load(folder), loadings=True, scale=0.3)
    model = quantized(folder, bits, by)
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert type(weight.data) is not torch.Tensor
    plain = load(folder)  # the quantized numbers as float32: what the hook's sum is compared with
    for name, parameter in plain.named_parameters():
        value = model.get_parameter(name)
        parameter.data = value.dequantize() if hasattr(value, "dequantize") and value.ndim == 2 else value.data
    base, expected = logits(model), logits(dense(plain, patch))
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        runtime.activate("v1")
        assert runtime.mode == "hook"
        assert close(logits(model), expected, 1e-4)
        with pytest.raises(ModelError, match="hook mode"):
            runtime.activate("v1", mode="fold")
        assert (runtime.active, runtime.mode) == ("v1", "hook")
        with runtime.using_rows([None, "v1"]):
            assert close(logits(model)[0], base[0])
        runtime.deactivate()
        assert torch.equal(logits(model), base)
    with pytest.raises(ModelError, match="cannot be hashed"):
        model_hash(model)


def test_another_base_quantized_is_refused(folders: Folder, tmp_path: Path) -> None:
    patch = make_patch(load(folders(LLAMA)))
    other = load(folders(LLAMA))
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatch, match="quantized"), PatchRuntime(quantized(tmp_path / "other", 8, "torchao")) as r:
        r.add(patch)


# Dispatched by accelerate.


@pytest.mark.parametrize("kind", ["one device", "auto", "layer on disk"])
def test_device_map(kind: str, folders: Folder, tmp_path: Path) -> None:
    folder = folders(LLAMA)
    patch = make_patch(load(folder), loadings=True, scale=0.3)
    expected = logits(dense(load(folder), patch))
    places: Any = {"one device": {"": "cpu"}, "auto": "auto"}.get(kind)
    if places is None:
        places = {"model.layers.1": "disk"} | dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
    model = load(folder, device_map=places, offload_folder=str(tmp_path))
    base = logits(model)
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        runtime.activate("v1")
        assert close(logits(model), expected)
        if kind == "layer on disk":
            assert model.model.layers[1].mlp.gate_proj.weight.is_meta
            with pytest.raises(ModelError, match="not in memory"):
                runtime.activate("v1", mode="fold")
        else:
            runtime.activate("v1", mode="fold")
            assert close(logits(model), expected)
        runtime.deactivate()
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)


# Tied weights.


def test_tied_embeddings_stay_tied(tiny_qwen: Path) -> None:
    model = load(tiny_qwen)
    patch = make_patch(model, scale=0.3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        for mode in ("hook", "fold"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            assert model.lm_head.weight is model.model.embed_tokens.weight
        runtime.deactivate()
        assert model_hash(model) == patch.base_hash


# Checkpointing of activations.


def checkpointing_on(model: Any, *arguments: Any) -> None:
    """Under the name that this transformers has for it; 5.20 gave it another."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*arguments)


@pytest.mark.parametrize("family", [LLAMA, OPT, MIXTRAL], ids=lambda family: family.title)
def test_gradient_checkpointing_changes_no_gradient(family: Family, folders: Folder) -> None:
    gradients, passes = [], []
    for checkpointing in (False, True):
        loaded = load_model(folders(family), device="cpu")
        model: Any = loaded.model
        if checkpointing:
            checkpointing_on(model)
        layers = model.get_decoder().layers
        deltas = trained_deltas(loaded)
        calls: list[int] = []
        inner = next(
            m for m in layers[0].modules() if isinstance(m, nn.LayerNorm | nn.Identity) or "Norm" in str(type(m))
        )
        with deltas.attached():
            handle = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            ids = torch.tensor([[1, 7, 30, 45, 100, 9]])
            model(input_ids=ids, use_cache=False).logits.square().sum().backward()
            handle.remove()
        assert not model.training
        assert not layers[0].training
        gradients.append({name: tensor.grad for name, tensor in deltas.tensors.items() if tensor.requires_grad})
        passes.append(len(calls))
    assert passes == [1, 2]  # the second time in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    assert all(bool(gradient.any()) for gradient in gradients[0].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def trained_deltas(loaded: Any) -> Deltas:
    """Located sites with nonzero rows."""
    patch = make_patch(loaded.model, scale=0.1, loadings=True)
    projections = find_projections(loaded.model)
    return Deltas(loaded.model, projections, parent_sites(patch, projections), "learned", parent_values(patch))


def test_reentrant_checkpointing_is_refused(folders: Folder) -> None:
    loaded = load_model(folders(LLAMA), device="cpu")
    checkpointing_on(loaded.model, {"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant"), trained_deltas(loaded).attached():
        pass


@pytest.mark.parametrize("sliced", [True, False], ids=["logits sliced", "logits whole"])
def test_training_with_checkpointing_gives_the_same_patch(
    folders: Folder, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    if not sliced:  # as for a head whose logits at chosen positions are not the model's own
        monkeypatch.setattr("nest_runtime.train.forward.Readout._agrees", lambda _: False)
    digests = []
    for checkpointing in (False, True):
        loaded = load_model(folders(LLAMA), device="cpu")
        if checkpointing:
            checkpointing_on(loaded.model)
        result = train_patch(
            loaded.model,
            loaded.tokenizer,
            harmful_examples(5),
            benign_examples(5),
            recipe=TUNED.evolve(kl_weight=0.5),
            name="m",
            version="v1",
            base_hash=loaded.hash,
        )
        digests.append(result.patch.digest)
    assert digests[0] == digests[1]


# Under PEFT.


@pytest.mark.parametrize("first", ["patch", "lora"])
@pytest.mark.parametrize("family", [LLAMA, PHI, GPT2, MIXTRAL], ids=lambda family: family.title)
def test_a_lora_and_a_patch_on_one_model(family: Family, first: str, folders: Folder) -> None:
    """Both on the same matrices: W + ΔW under the LoRA, whichever came first."""
    peft = pytest.importorskip("peft")
    modules = {
        "Mixtral": ["q_proj"],
        "GPT-2": ["c_fc"],
        PHI.title: ["gate_up_proj"],
        LLAMA.title: ["gate_proj", "q_proj"],
    }
    config = {"r": 2, "target_modules": modules[family.title], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    if family is MIXTRAL:
        config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    patch = make_patch(load(folders(family)), neurons=12, loadings=True, scale=0.3)

    def wear(model: Any) -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()

    expected = logits(wear(dense(load(folders(family)), patch)))
    model = load(folders(family))
    alone = logits(wear(copy.deepcopy(model)))
    live = wear(model) if first == "lora" else model
    runtime = PatchRuntime(live)
    runtime.add(patch)
    live = wear(model) if first == "patch" else live
    assert close(logits(live), alone)
    runtime.activate("v1")
    assert close(logits(live), expected)
    runtime.activate("v1", mode="fold")
    assert close(logits(live), expected)
    runtime.deactivate()
    assert close(logits(live), alone)
    runtime.close()
