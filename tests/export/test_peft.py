"""Exports to PEFT and vLLM: real PEFT gives the patch's logits, and the way back gives the very patch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nest_runtime as nest
from nest_runtime.errors import DigestMismatch, ExportError, PatchFormatError, SiteMismatch
from nest_runtime.export import export_peft, import_peft
from nest_runtime.export.peft import CONFIG, WEIGHTS
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.runtime import PatchRuntime
from tests.conftest import save_tiny
from tests.support.patches import make_patch, random_site

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 7, 30, 45, 100, 9], [1, 8, 31, 46, 101, 10]])
GOLDEN = Path(__file__).parents[1] / "data" / "golden_v1.safetensors"


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def hook_logits(model: torch.nn.Module, patch: Patch) -> torch.Tensor:
    with PatchRuntime(model) as runtime:
        runtime.activate(runtime.add(patch), mode="hook")
        return logits(model)


def peft_logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(model, str(folder)).eval())


def uneven_patch(model: torch.nn.Module) -> Patch:
    """Sites of different ranks, dtypes and forms: one empty, one with a cluster that has no neuron, loadings and z."""
    sites = []
    for number, p in enumerate(nest.find_sites(model)):
        site = random_site(
            p.name,
            p.d_out,
            p.d_in,
            neurons=0 if number == 1 else 4 + number,
            clusters=1 + number,
            loadings=number % 2 == 0,
            dtype=(torch.bfloat16, torch.float32, torch.float16)[number % 3],
            scale=0.3,
            seed=number,
        )
        z = torch.linspace(-3, 3, site.n_neurons) if number == 0 else None
        deltas = site.deltas.tensor()
        if number == 2:
            deltas = torch.cat([deltas, deltas[:1] * 2])
        sites.append(Site(site.name, site.d_out, deltas, site.neurons, site.clusters, site.loadings, z, {"n": number}))
    patch = make_patch(model).evolve(sites=tuple(sites), method={"name": "NeST", "ü": [1.5, None]})
    return patch.evolve(rows_digest=nest.rows_digest(model, {s.name: s.neurons.tensor() for s in sites}))


FAMILIES = [
    ("LlamaForCausalLM", "LlamaConfig", {}),
    ("Phi3ForCausalLM", "Phi3Config", {}),
    ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2, "n_head": 4, "n_embd": 64}),
]


@pytest.mark.parametrize("engine", ["peft", "vllm"])
@pytest.mark.parametrize(("model_class", "config_class", "changes"), FAMILIES)
def test_peft_computes_what_the_patch_computes(
    model_class: str, config_class: str, changes: dict[str, Any], engine: Any, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", model_class, config_class, **changes)
    model = load(folder)
    patch = uneven_patch(model)
    base, expected = logits(model), hook_logits(model, patch)
    assert float((expected - base).abs().max()) > 0.01
    made = export_peft(patch, tmp_path / "adapter", engine=engine)
    assert import_peft(tmp_path / "adapter").digest == patch.digest
    found = peft_logits(load(folder), tmp_path / "adapter")
    assert float((found - expected).abs().max()) <= 1e-5
    assert made.rank == max(
        sum(s.n_clusters for s in patch.sites if s.name.partition(":")[0] == key)
        for key in {s.name.partition(":")[0] for s in patch.sites}
    )


def test_ranks_are_told_by_pattern_for_peft_and_padded_for_vllm(tiny_llama: Path, tmp_path: Path) -> None:
    patch = uneven_patch(load(tiny_llama))
    ranks = {site.name: site.n_clusters for site in patch.sites if site.n_neurons}
    assert len(set(ranks.values())) > 1
    assert min(len(p.name) for p in patch.sites) > 0
    export_peft(patch, tmp_path / "peft")
    export_peft(patch, tmp_path / "vllm", engine="vllm")
    configs = {kind: json.loads((tmp_path / kind / CONFIG).read_text()) for kind in ("peft", "vllm")}
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    assert (configs["peft"]["rank_pattern"], configs["peft"]["alpha_pattern"]) == (smaller, smaller)
    assert (configs["vllm"]["rank_pattern"], configs["vllm"]["alpha_pattern"]) == ({}, {})
    for kind, config in configs.items():
        assert config["r"] == config["lora_alpha"] == largest
        assert config["target_modules"] == list(ranks)  # the empty site is left out
        tensors = load_file(tmp_path / kind / WEIGHTS)
        assert len(tensors) == 2 * len(ranks)
        for name, rank in ranks.items():
            a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            wanted = largest if kind == "vllm" else rank
            assert (a.shape[0], b.shape[1]) == (wanted, wanted)
            assert torch.equal((b @ a), patch.site(name).dense()) or torch.allclose(b @ a, patch.site(name).dense())


def test_the_model_is_checked_where_it_is_given(tiny_llama: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    model = load(tiny_llama)
    patch = make_patch(model)
    export_peft(patch, tmp_path / "good", model=model)
    with pytest.raises(SiteMismatch):
        export_peft(patch, tmp_path / "bad", model=load(save_tiny(tmp_path / "gpt2", "GPT2LMHeadModel", "GPT2Config")))
    assert not (tmp_path / "bad").exists()


def test_experts_need_the_model_and_are_not_for_vllm(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4)
    model = load(folder)
    patch = make_patch(model, neurons=12, loadings=True, scale=0.5)
    with pytest.raises(ExportError, match="changes experts"):
        export_peft(patch, tmp_path / "adapter")
    with pytest.raises(ExportError, match="vLLM"):
        export_peft(patch, tmp_path / "adapter", model=model, engine="vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_patch_that_changes_nothing_is_no_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    patch = make_patch(load(tiny_llama), neurons=0)
    with pytest.raises(ExportError, match="changes no neuron"):
        export_peft(patch, tmp_path / "adapter")


# The way back.


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    sites = []
    for number in range(draw(st.integers(1, 4))):
        fused = draw(st.booleans())
        seed, d_in, d_out = draw(st.integers(0, 99)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
        for half in (":gate", ":up") if fused else ("",):
            sites.append(
                random_site(
                    f"model.layers.{number}.mlp.{'gate_up_proj' if fused else 'gate_proj'}{half}",
                    d_out,
                    d_in,
                    neurons=draw(st.integers(0, d_out)),
                    clusters=draw(st.integers(1, 3)),
                    loadings=draw(st.booleans()),
                    dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
                    seed=seed,
                )
            )
    golden = read_patch(GOLDEN)
    return golden.evolve(sites=tuple(sites), name="p", metrics={"x": draw(st.floats(-1, 1))})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patch=patches(), engine=st.sampled_from(["peft", "vllm"]))
def test_import_is_the_exact_inverse(patch: Patch, engine: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("adapters") / "a"
    if not patch.neurons:
        with pytest.raises(ExportError):
            export_peft(patch, folder, engine=engine)
        return
    export_peft(patch, folder, engine=engine)
    back = import_peft(folder)
    assert back == patch
    assert back.digest == patch.digest


def test_the_golden_patch_makes_the_round_trip(tmp_path: Path) -> None:
    golden = read_patch(GOLDEN)
    export_peft(golden, tmp_path / "a")
    assert import_peft(tmp_path / "a") == golden


def rewrite(folder: Path, change: Any, metadata: Any = dict) -> None:
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        kept = metadata(file.metadata())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=kept)


def test_a_changed_adapter_does_not_come_back(tmp_path: Path) -> None:
    golden = read_patch(GOLDEN)
    name = f"base_model.model.{golden.sites[0].name}"

    def trained(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.lora_A.weight"] += 1e-3

    def dense(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.lora_B.weight"][1, 0] = 0.5  # a row that the patch leaves alone

    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(1, 3)

    def lacking(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}.lora_B.weight"]

    for number, (change, error) in enumerate(
        [(trained, DigestMismatch), (dense, PatchFormatError), (more, PatchFormatError), (lacking, PatchFormatError)]
    ):
        folder = tmp_path / str(number)
        export_peft(golden, folder)
        rewrite(folder, change)
        with pytest.raises(error):
            import_peft(folder)


def test_adapters_of_other_origin_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(tiny_llama), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(PatchFormatError, match="no adapter written from a patch"):
        import_peft(tmp_path / "lora")
    with pytest.raises(PatchFormatError, match="cannot be read"):
        import_peft(tmp_path)


# Folders.


def test_a_folder_appears_whole_or_not_at_all(tiny_llama: Path, tmp_path: Path) -> None:
    patch = make_patch(load(tiny_llama))

    def fail(work: Path) -> None:
        assert {path.name for path in work.iterdir()} == {CONFIG, WEIGHTS, "nest_export.json"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_peft(patch, tmp_path / "a", check=fail)
    assert list(tmp_path.iterdir()) == []
    export_peft(patch, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        export_peft(patch.evolve(version="v2"), tmp_path / "a", overwrite=True, check=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_nothing_else_is_ever_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    patch = make_patch(load(tiny_llama))
    mine = tmp_path / "mine"
    mine.mkdir()
    export_peft(patch, mine)  # an empty folder may be filled
    with pytest.raises(ExportError, match="earlier export"):
        export_peft(patch, mine)
    second = patch.evolve(version="v2")
    export_peft(second, mine, overwrite=True)
    assert import_peft(mine).digest == second.digest
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").write_text("my only copy")
    with pytest.raises(ExportError, match="no earlier export"):
        export_peft(patch, thesis, overwrite=True)
    with pytest.raises(ExportError, match="file or a link"):
        export_peft(patch, thesis / "chapter1.txt", overwrite=True)
    with pytest.raises(ExportError, match="does not exist"):
        export_peft(patch, tmp_path / "no" / "where")
    assert (thesis / "chapter1.txt").read_text() == "my only copy"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "thesis"}
