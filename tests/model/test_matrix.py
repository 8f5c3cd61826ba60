"""The matrix of docs/guide/models.md, family by family: what the page claims is what is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import nest_runtime as nest
from nest_runtime.errors import UnknownArchitecture
from nest_runtime.model import anatomy
from nest_runtime.model.experts import routed
from nest_runtime.model.load import load_model
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.activations import pool_experts
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.sites import LocatedSite
from tests.support.families import FAMILIES, IDS, PAGE, TEXT, Family, close, dense, line, logits, table, walk
from tests.support.patches import make_patch

pytest.importorskip("peft")
pytest.importorskip("gguf")
EXPERTS = [
    family for family in FAMILIES if "oE" in family.title or family.title in ("Mixtral", "gpt-oss (unquantized)")
]
BY_TITLE = {family.title: family for family in FAMILIES}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saved tiny models by family, each made once."""
    made: dict[str, Path] = {}

    def folder(family: Family) -> Path:
        if family.title not in made:
            made[family.title] = family.save(tmp_path_factory.mktemp("matrix") / family.model_class)
        return made[family.title]

    return folder


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_the_whole_way(family: Family, folders: Any, tmp_path: Path) -> None:
    row = walk(family, folders(family), tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    assert line(row) in page.splitlines(), "run `python -m tests.support.families` and read what it changed"


def test_the_page_has_no_other_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- matrix -->\n")[2].partition("\n<!-- end -->")[0].splitlines()
    assert shown[:2] == table([]).splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in shown[2:]] == [family.title for family in FAMILIES]


# Experts, beyond the matrix.


@pytest.mark.parametrize("family", EXPERTS, ids=lambda family: family.title)
def test_training_gradients_through_experts_are_those_of_the_dense_weights(family: Family, folders: Any) -> None:
    model = load_model(folders(family), device="cpu", dtype="float32").model
    patch = make_patch(model, neurons=9, clusters=2, loadings=True, scale=0.3)
    projections = nest.find_sites(model)
    sites = [
        LocatedSite(
            site=site.name,
            layer=0,
            kind="gate",
            d_in=site.d_in,
            d_out=site.d_out,
            neurons=tuple(site.neurons.tensor().tolist()),
            clusters=tuple(site.clusters.tensor().tolist()),
            z=(1.0,) * site.n_neurons,
        )
        for site in patch.sites
    ]
    warm = {site.name: (site.deltas.tensor(), site.loadings.tensor()) for site in patch.sites}  # type: ignore[union-attr]
    deltas = Deltas(model, projections, sites, "learned", warm)  # type: ignore[arg-type]
    weight = torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with deltas.attached():
        found = model(input_ids=IDS).logits
    reference = dense(model, patch)
    for parameter in reference.parameters():
        parameter.requires_grad_(True)
    expected = reference(input_ids=IDS).logits
    assert close(found.detach(), expected.detach())
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for part, site, projection in zip(deltas.sites, patch.sites, projections, strict=True):
        module = anatomy.module_of(reference, projection)
        gradient = module.gate_up_proj.grad  # type: ignore[union-attr]
        by_row = gradient.transpose(1, 2) if module.is_transposed else gradient  # type: ignore[operator, union-attr]
        number = ("gate", "up").index(projection.kind)
        rows = by_row.chunk(2, dim=1)[number] if module.is_concatenated else by_row[:, number::2]
        rows = rows.reshape(-1, site.d_in)[site.neurons.tensor().long()]  # (n, d_in)
        scaled = rows * site.loadings.tensor()[:, None]  # type: ignore[union-attr]
        by_cluster = torch.zeros_like(part.deltas).index_add(0, site.clusters.tensor().long(), scaled)
        assert close(part.deltas.grad, by_cluster, 1e-4)  # type: ignore[arg-type]
        directions = site.deltas.tensor()[site.clusters.tensor().long()]
        assert close(part.loadings.grad, (rows * directions).sum(1), 1e-4)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("family", EXPERTS, ids=lambda family: family.title)
def test_pooled_activations_of_experts(family: Family, pooling: str, folders: Any) -> None:
    model = load_model(folders(family), device="cpu", dtype="float32").model
    module: Any = anatomy.module_of(model, nest.find_sites(model)[0])
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, chosen = torch.randn(10, 32), torch.randint(4, (10, 2))
    chosen[:, 1] = (chosen[:, 0] + 1 + chosen[:, 1] % 3) % 4  # two different ones a token
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    found = pool_experts(module, routed((x, chosen, torch.rand(10, 2)), {}), mask, pooling)
    for row, length in enumerate((4, 5)):
        for expert in range(4):
            tokens = [5 * row + t for t in range(length) if expert in chosen[5 * row + t]]
            if pooling == "last":
                tokens = [t for t in tokens if t == 5 * row + length - 1]
            weight = module.gate_up_proj[expert].t() if module.is_transposed else module.gate_up_proj[expert]
            outputs = x[tokens] @ weight.t() + (module.gate_up_proj_bias[expert] if module.has_bias else 0)
            expected = torch.zeros(outputs.shape[1])
            if tokens:
                expected = outputs.mean(0) if pooling == "mean" else outputs.amax(0)
            assert torch.allclose(found[row, expert], expected, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS, ids=lambda family: family.title)
def test_another_patch_of_experts_over_a_folded_one(family: Family, folders: Any) -> None:
    model = load_model(folders(family), device="cpu", dtype="float32").model
    patches = [make_patch(model, version=f"v{k}", seed=k, neurons=40, loadings=k == 1, scale=0.3) for k in (1, 2)]
    expected = [logits(dense(model, patch)) for patch in patches]
    base = logits(model)
    with PatchRuntime(model) as runtime:
        for patch in patches:
            runtime.add(patch)
        runtime.activate("v1", mode="fold")
        with runtime.using("v2"):
            assert close(logits(model), expected[1])
        with runtime.using(None):
            assert close(logits(model), base)
        with runtime.using_rows(["v2", "v1"]):
            mixed = logits(model)
        assert close(mixed[0], expected[1][0])
        assert close(mixed[1], expected[0][1])
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts(implementation: str, folders: Any) -> None:
    model = load_model(folders(BY_TITLE["Qwen3-MoE"]), device="cpu", dtype="float32").model
    patch = make_patch(model, neurons=20, scale=0.3)
    model.set_experts_implementation(implementation)
    expected = logits(dense(model, patch))
    with PatchRuntime(model) as runtime:
        runtime.activate(runtime.add(patch))
        assert close(logits(model), expected)


def test_experts_under_compile_run_eagerly_and_switch(folders: Any) -> None:
    model = load_model(folders(BY_TITLE["Mixtral"]), device="cpu", dtype="float32").model
    patch = make_patch(model, neurons=20, scale=0.3)
    base, expected = logits(model), logits(dense(model, patch))
    compiled: Any = torch.compile(model, backend="eager")
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        assert close(logits(compiled), base)
        runtime.activate("v1")
        assert close(logits(compiled), expected)
        runtime.deactivate()
        assert close(logits(compiled), base)


# Images under a patch.

PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
IMAGES: dict[str, dict[str, Any]] = {
    "Gemma 3": {"ids": [1, 291, *[290] * 4, 292, 30, 45], "pixel_values": PIXELS},
    "LLaVA": {"ids": [1, *[290] * 4, 30, 45], "pixel_values": PIXELS},
    "Qwen3-VL": {
        "ids": [1, 292, 290, 293, 30, 45],
        "pixel_values": torch.linspace(-1, 1, 4 * 1536).reshape(4, 1536),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    },
}


@pytest.mark.parametrize("title", IMAGES)
def test_image_prompts_under_a_patch(title: str, folders: Any) -> None:
    model = load_model(folders(BY_TITLE[title]), device="cpu", dtype="float32").model
    patch = make_patch(model, scale=0.3)
    inputs = dict(IMAGES[title])
    ids = torch.tensor([inputs.pop("ids")])
    if title != "LLaVA":
        inputs["mm_token_type_ids" if title == "Qwen3-VL" else "token_type_ids"] = (ids == 290).long()

    def run(which: Any) -> torch.Tensor:
        with torch.no_grad():
            return which(input_ids=ids, **inputs).logits

    base, expected = run(model), run(dense(model, patch))
    assert not close(expected, base, 1e-3)
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        for mode in ("hook", "fold"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            assert close(run(model), expected)
        runtime.deactivate()
    assert torch.equal(run(model), base)


# An architecture that nobody knows.


class StrangerFFN(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.w1, self.w3, self.w2, self.act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class StrangerForCausalLM(LlamaForCausalLM):
    """A Llama whose FFN has other names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = StrangerFFN(layer.mlp)


def test_what_the_error_says_is_enough_to_teach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    monkeypatch.setattr(anatomy, "_REGISTERED", {})
    torch.manual_seed(0)
    config = LlamaConfig(**{**TEXT, **BY_TITLE["Mistral"].sizes, "initializer_range": 0.2})
    model = StrangerForCausalLM(config).eval()
    with pytest.raises(UnknownArchitecture) as caught:
        PatchRuntime(model)
    assert "model.layers.{layer}.mlp.w1 [48, 32]" in caught.value.message
    nest.register_architecture(
        "StrangerForCausalLM", gate="model.layers.{layer}.mlp.w1", up="model.layers.{layer}.mlp.w3"
    )
    patch = make_patch(model, scale=0.3)
    expected = logits(dense(model, patch))
    with PatchRuntime(model) as runtime:
        runtime.activate(runtime.add(patch))
        assert close(logits(model), expected)
