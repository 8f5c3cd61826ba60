"""Settings beyond the paper: causal scores against real ablation, one kind of projection, a margin over targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest_runtime.errors import UsageError
from nest_runtime.model.anatomy import find_projections, module_of
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import Example
from nest_runtime.train.batches import OPENING, Row, recovery_row, rival_row
from nest_runtime.train.causal import refusal_effects
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.locate import chosen_projections
from nest_runtime.train.objective import MARGIN, margin
from nest_runtime.train.passes import Passes
from nest_runtime.train.pipeline import locate_sites, train_patch
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.sites import LocatedSite
from nest_runtime.train.teaching import refusal_row
from nest_runtime.train.tune import loss_of
from tests.conftest import save_tiny
from tests.support.train import QUICK, benign_examples, harmful_examples

CAUSAL = QUICK.evolve(score="causal", sign="positive", z=0.5)


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def rows_of(loaded: Any) -> list[Row]:
    return [refusal_row(loaded.tokenizer, example, QUICK, [2]) for example in harmful_examples(4)]


def said(loaded: Any, rows: list[Row], projection: Any, neuron: int, factor: float) -> float:
    """Mean log-probability of the rows' first answer tokens, each row alone, with one neuron's output scaled."""

    def scale(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        index = int(projection.rows(torch.tensor([neuron]))[0])
        output = output.double().clone()
        output[..., index] *= factor
        return output.float()

    handle, total = module_of(loaded.model, projection).register_forward_hook(scale), 0.0
    try:
        for row in rows:
            answer = row.answer[:OPENING]
            with torch.no_grad():
                logits = loaded.model(torch.tensor([[*row.prompt, *answer]])).logits[0].double()
            logs = logits.log_softmax(-1)
            total += sum(float(logs[len(row.prompt) - 1 + place, token]) for place, token in enumerate(answer))
    finally:
        handle.remove()
    return total / len(rows)


def test_an_effect_is_the_slope_of_turning_a_neuron_down(loaded: Any) -> None:
    projections, rows = find_projections(loaded.model), rows_of(loaded)
    effects = refusal_effects(loaded.model, rows, projections, 0, step_tokens=40)  # several batches, padding in them
    for projection, effect in zip(projections, effects, strict=True):
        assert effect.shape == (projection.d_out,)
        assert effect.dtype == np.float32
        for neuron in (int(effect.argmax()), int(effect.argmin()), 7):
            slope = (said(loaded, rows, projection, neuron, 1.02) - said(loaded, rows, projection, neuron, 0.98)) / 0.04
            assert effect[neuron] == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_causal_scores_keep_neurons_that_refusals_rest_on(loaded: Any, tmp_path: Path) -> None:
    found = locate_sites(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(),
        benign_examples(),
        recipe=CAUSAL,
        base_hash=loaded.hash,
        workdir=tmp_path,
    )
    sites = found.file.sites
    rows = [refusal_row(loaded.tokenizer, example, CAUSAL, [2]) for example in harmful_examples()]
    for site, effect in zip(sites, refusal_effects(loaded.model, rows, find_projections(loaded.model), 0), strict=True):
        assert site.probe_accuracy is None
        assert site.neurons
        assert min(effect[list(site.neurons)]) > 0
        assert min(effect[list(site.neurons)]) >= np.delete(effect, list(site.neurons)).max()


def test_a_patch_is_trained_on_causal_scores(loaded: Any, tmp_path: Path) -> None:
    made = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(),
        benign_examples(),
        recipe=CAUSAL,
        name="causal",
        version="v1",
        base_hash=loaded.hash,
        base_model="tiny",
        workdir=tmp_path,
    )
    assert made.patch.method["recipe"]["score"] == "causal"
    assert made.report["validation"]["after"]["harmful_loss"] < made.report["validation"]["before"]["harmful_loss"]


def test_experts_have_no_causal_scores(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2)
    model = load_model(folder)
    with pytest.raises(UsageError, match="FFN is one of experts"):
        refusal_effects(model.model, rows_of(model), find_projections(model.model), 0)


@pytest.mark.parametrize("kind", ["gate", "up"])
def test_one_kind_of_projection(loaded: Any, kind: str) -> None:
    every = find_projections(loaded.model)
    chosen = chosen_projections(every, QUICK.evolve(projections=kind))
    assert chosen == tuple(projection for projection in every if projection.kind == kind)
    assert chosen


def test_a_kind_that_the_model_has_not(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4)
    projections = find_projections(load_model(folder).model)
    with pytest.raises(UsageError, match="projections is up; this model's are fc"):
        chosen_projections(projections, QUICK.evolve(projections="up"))


def example_with(target: str) -> Example:
    return replace(harmful_examples(1)[0], meta={"target": target})


def test_a_rival_is_the_harmful_answers_next_token(loaded: Any) -> None:
    example, settings = example_with("Sure, here is how to forge a passport"), QUICK.evolve(margin_weight=1.0)
    row = refusal_row(loaded.tokenizer, example, settings, [2])
    target = loaded.tokenizer("Sure, here is how to forge a passport", add_special_tokens=False)["input_ids"]
    assert row.rival == target[0]
    recovery = recovery_row(loaded.tokenizer, example, row, 3)
    assert recovery is not None
    begun = len(recovery.prompt) - len(row.prompt)
    assert list(recovery.prompt[len(row.prompt) :]) == target[:begun]
    assert recovery.rival == target[begun]
    assert refusal_row(loaded.tokenizer, example, QUICK, [2]).rival == -1  # no margin asked for
    assert rival_row(loaded.tokenizer, harmful_examples(1)[0], rows_of(loaded)[0]).rival == -1  # no target
    assert row.content != replace(row, rival=-1).content


def test_the_margin_falls_with_the_lead_and_spares_rows_without_a_rival() -> None:
    logits = torch.zeros(4, 6)
    logits[1, 2], logits[2, 2] = MARGIN, 100.0
    found = margin(logits, torch.full((4,), 2), torch.tensor([3, 3, 3, -1]))
    assert found[0] == pytest.approx(MARGIN, abs=0.01)
    assert found[1] == pytest.approx(float(np.log(2)), abs=1e-5)
    assert found[2] == pytest.approx(0.0, abs=1e-6)
    assert found[3] == 0.0


def test_the_loss_counts_the_margin_at_the_first_token(loaded: Any) -> None:
    settings = QUICK.evolve(margin_weight=2.0, onset_weight=1.0, benign_weight=1.0)
    row = refusal_row(loaded.tokenizer, example_with("Sure, here"), settings, [2])
    site = LocatedSite("model.layers.0.mlp.up_proj", 0, "up", 64, 96, (1, 5), (1.0, 1.0), (0, 0))
    deltas = Deltas(loaded.model, find_projections(loaded.model), [site], "learned")
    with deltas.attached(), torch.no_grad():
        passes = Passes(loaded.model, deltas, 0, settings)
        (batch,) = passes.batches([row])
        without = Passes(loaded.model, deltas, 0, settings.evolve(margin_weight=0.0))
        more = float(loss_of(passes, batch) - loss_of(without, batch))
        logits = loaded.model(torch.tensor([row.prompt])).logits[0, -1].float()
    ahead = float(logits[row.answer[0]] - logits[row.rival])
    expected = float(torch.nn.functional.softplus(torch.tensor(MARGIN - ahead)))
    assert more == pytest.approx(2.0 * expected / len(row.answer), rel=1e-3)


def test_masked_neurons_do_not_ship(loaded: Any, tmp_path: Path) -> None:
    last = {"validation_fraction": 0.0}  # the state after the last step is kept

    def made(weight: float) -> Any:
        return train_patch(
            loaded.model,
            loaded.tokenizer,
            harmful_examples(),
            benign_examples(),
            recipe=QUICK.evolve(**last, mask_weight=weight, loadings="learned", loadings_lr=0.1, grad_clip=0.0),
            name="masked",
            version="v1",
            base_hash=loaded.hash,
            base_model="tiny",
            workdir=tmp_path / f"{weight}",
        )

    whole, masked = made(0.0), made(50.0)
    assert 0 < masked.patch.neurons < whole.patch.neurons
    for site in masked.patch.sites:
        if site.n_neurons:
            assert float(site.loadings.tensor().abs().max()) > 0
            assert set(site.clusters.tensor().tolist()) == set(range(site.n_clusters))


def test_masks_need_learned_loadings() -> None:
    with pytest.raises(UsageError, match="mask_weight is 1 and loadings are tied"):
        QUICK.evolve(mask_weight=1.0, loadings="tied")


def test_settings_of_earlier_patches_are_off() -> None:
    assert (
        Recipe.of_header({}).to_json().items()
        >= {"score": "probe", "projections": "all", "margin_weight": 0.0, "mask_weight": 0.0}.items()
    )


def test_a_row_of_its_own_for_every_neuron(loaded: Any, tmp_path: Path) -> None:
    recipe = QUICK.evolve(rows="neuron", loadings="tied", z=2.0, steps=3)
    patch = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(),
        benign_examples(),
        recipe=recipe,
        name="untied",
        version="v1",
        base_hash=loaded.hash,
        base_model="tiny",
        workdir=tmp_path,
    ).patch
    assert patch.clusters == patch.neurons > 0
    assert patch.parameters == sum(site.n_neurons * site.d_in for site in patch.sites)
