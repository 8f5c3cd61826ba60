"""Tuning: the hooks' arithmetic, what is learned, what is not touched, and the same bits after an interrupt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from nest_runtime.errors import DataError, TrainingError
from nest_runtime.model.anatomy import find_projections, module_of
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode, make_examples
from nest_runtime.prompts.generate import end_token_ids
from nest_runtime.train.batches import REFUSALS, Row, make_batch, make_row, refusal_for, step_rows
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.forward import Readout, even_batches, hidden_states
from nest_runtime.train.lower import LowerLayers
from nest_runtime.train.objective import BaseAnswer, divergence, token_loss
from nest_runtime.train.passes import Passes
from nest_runtime.train.sites import LocatedSite
from nest_runtime.train.tune import loss_of, lr_factor, tune
from tests.support.patches import attached
from tests.support.train import QUICK, benign_examples, harmful_examples


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def some_sites(model: Any, empty: int = 0) -> list[LocatedSite]:
    return [
        LocatedSite(
            site=site.name,
            layer=site.layer,
            kind=site.kind,
            d_in=site.d_in,
            d_out=site.d_out,
            neurons=() if number < empty else (1, 4, 6, 30),
            z=() if number < empty else (2.0, -2.0, 1.5, 3.0),
            clusters=() if number < empty else (0, 1, 1, 0),
        )
        for number, site in enumerate(find_projections(model))
    ]


def some_rows(loaded: Any) -> list[Row]:
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    bad = [make_row(loaded.tokenizer, e, e.response or "", True, ends) for e in harmful_examples()]
    return bad + [make_row(loaded.tokenizer, e, e.response or "", False, ends) for e in benign_examples()]


def randomize(deltas: Deltas) -> None:
    generator = torch.Generator().manual_seed(5)
    deltas.load({name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in deltas.tensors.items()})


@pytest.mark.parametrize("model_class", ["LlamaForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("loadings", ["tied", "signed", "learned"])
def test_hooks_equal_changed_weights(tmp_path: Path, model_class: str, loadings: str) -> None:
    from tests.conftest import save_tiny

    config = {"GPT2LMHeadModel": "GPT2Config"}.get(model_class, model_class.replace("ForCausalLM", "Config"))
    loaded = load_model(save_tiny(tmp_path / "m", model_class, config))
    ids = torch.arange(3, 20)[None]
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), loadings)
    if loadings != "tied":
        assert deltas.sites[0].loadings.tolist() == [1.0, -1.0, 1.0, 1.0]
    randomize(deltas)
    with deltas.attached(), torch.no_grad():
        hooked = loaded.model(ids).logits
    for part in deltas.sites:
        rows = part.deltas[part.clusters] * (1.0 if part.loadings is None else part.loadings[:, None])
        weight = module_of(loaded.model, part.projection).weight.data
        index = part.neurons + part.projection.offset
        (weight.t() if part.projection.layout == "conv1d" else weight)[index] += rows.detach()
    with torch.no_grad():
        dense = loaded.model(ids).logits
    assert float((hooked - dense).abs().max()) < 1e-4 * float(dense.abs().max())


def test_only_the_patch_gets_gradients_and_only_from_the_lowest_site(loaded: Any) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model, empty=2), "learned")
    grads = {}
    layer = loaded.model.model.layers[1].mlp.down_proj
    first = loaded.model.model.layers[0].mlp.down_proj
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: grads.update({name: output.requires_grad}))
        for name, module in (("first", first), ("second", layer))
    ]
    before = {name: (p.clone(), p.requires_grad) for name, p in loaded.model.named_parameters()}
    rows = some_rows(loaded)
    try:
        tune(loaded.model, loaded.tokenizer, deltas, rows, [], QUICK.evolve(steps=2))
        batch = make_batch(rows, 0, torch.device("cpu"))
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(False)
        with deltas.attached():
            loss_of(Passes(loaded.model, deltas, 0, QUICK), batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_(before[name][1])
    assert grads == {"first": False, "second": True}
    assert all(torch.equal(p, before[name][0]) and p.grad is None for name, p in loaded.model.named_parameters())
    assert len(deltas.sites) == 2


def test_the_loss_counts_answer_tokens_only(loaded: Any) -> None:
    rows = some_rows(loaded)[8:12]
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    loss = loss_of(Passes(loaded.model, deltas, 0, QUICK), make_batch(rows, 0, torch.device("cpu")))
    losses: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for row in rows:
            logits = loaded.model(torch.tensor([[*row.prompt, *row.answer]])).logits[0]
            start = len(row.prompt) - 1
            for place, token in enumerate(row.answer):
                losses[row.harmful].append(-float(logits[start + place].log_softmax(-1)[token]))
    wanted = sum(sum(values) / len(values) for values in losses.values())
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_kl_to_the_base_is_zero_at_the_start_and_grows(loaded: Any) -> None:
    batch = make_batch(some_rows(loaded), 0, torch.device("cpu"))
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    plain = Passes(loaded.model, deltas, 0, QUICK)
    with deltas.attached(), torch.no_grad():
        weighed = Passes(loaded.model, deltas, 0, QUICK.evolve(kl_weight=9))
        assert float(loss_of(weighed, batch)) == pytest.approx(float(loss_of(plain, batch)), abs=1e-5)
        randomize(deltas)
        more = float(loss_of(weighed, batch) - loss_of(plain, batch))
    assert more > 1e-4


def test_given_answers_are_learned_by_their_words_and_not_by_the_base(loaded: Any) -> None:
    own = some_rows(loaded)[8:12]
    given = [row if row.harmful else replace(row, given=True) for row in own]
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    settings = QUICK.evolve(benign_weight=0, kl_weight=2, onset_weight=1)
    passes = Passes(loaded.model, deltas, 0, settings)
    worded = Passes(loaded.model, deltas, 0, settings.evolve(benign_weight=2, kl_weight=0))
    with deltas.attached(), torch.no_grad():
        randomize(deltas)
        batches = [make_batch(rows, 0, torch.device("cpu")) for rows in (own, given)]
        near, words = (float(loss_of(passes, batch)) for batch in batches)
        assert words == pytest.approx(float(loss_of(worded, batches[0])), rel=1e-5)
        assert near != pytest.approx(words, rel=1e-2)


def test_tuning_learns_and_ships_what_it_measured(loaded: Any) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "learned")
    rows = some_rows(loaded)
    result = tune(loaded.model, loaded.tokenizer, deltas, rows, rows[8:12], QUICK)
    assert result.steps == 30
    assert result.after["harmful_loss"] < result.before["harmful_loss"]
    assert result.after["benign_loss"] < result.before["benign_loss"]
    assert [entry["step"] for entry in result.history] == [5, 10, 15, 20, 25, 30]
    for part in deltas.sites:
        assert torch.equal(part.deltas, part.deltas.to(torch.bfloat16).float())


def test_best_state_and_early_stop(loaded: Any) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    rows = some_rows(loaded)
    others = [Row(row.prompt, (7, 9, 2), row.harmful) for row in rows[8:12]]  # learning the rows makes these worse
    wild = QUICK.evolve(lr=1.0, steps=60, validate_every=2, patience=3, schedule="constant", delta_dtype="float32")
    result = tune(loaded.model, loaded.tokenizer, deltas, rows, others, wild)
    assert result.steps < 60
    scores = {e["step"]: e["harmful_loss"] + e["benign_loss"] for e in result.history}
    assert result.best_step == min(scores, key=lambda step: scores[step])
    assert result.after["harmful_loss"] + result.after["benign_loss"] == pytest.approx(scores[result.best_step])


def test_without_validation_rows_the_last_state_is_kept(loaded: Any) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    result = tune(loaded.model, loaded.tokenizer, deltas, some_rows(loaded), [], QUICK.evolve(steps=7))
    assert (result.before, result.after, result.best_step) == ({}, {}, 7)


def test_strength_multiplies_the_rows_that_training_found(loaded: Any) -> None:
    found = {}
    for strength in (1.0, 1.5):
        deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "learned")
        settings = QUICK.evolve(steps=4, strength=strength, delta_dtype="float32")
        result = tune(loaded.model, loaded.tokenizer, deltas, some_rows(loaded), some_rows(loaded)[:4], settings)
        found[strength] = (deltas.sites[0].deltas.detach().clone(), result.after["harmful_loss"])
    assert torch.equal(found[1.5][0], 1.5 * found[1.0][0])
    assert found[1.5][1] != found[1.0][1]  # what is measured last is what ships


def test_no_steps_is_a_patch_that_changes_nothing(loaded: Any) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    tune(loaded.model, loaded.tokenizer, deltas, some_rows(loaded), [], QUICK.evolve(steps=0))
    assert not any(bool(part.deltas.any()) for part in deltas.sites)


@pytest.mark.parametrize("often", [2, 1000])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_an_interrupted_run_ends_with_the_same_bits(
    loaded: Any, tmp_path: Path, schedule: str, often: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where rows come again, so that what the base computes of them is kept, and where they do not."""
    monkeypatch.setattr("nest_runtime.train.passes.OFTEN", often)
    rows, settings = some_rows(loaded), QUICK.evolve(schedule=schedule, kl_weight=0.5)

    def run(workdir: Path | None, stop: int = 0) -> tuple[dict[str, torch.Tensor], Any]:
        def interrupt(_: str, done: int, __: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "learned")
        result = tune(
            loaded.model, loaded.tokenizer, deltas, rows, rows[8:12], settings, workdir=workdir, progress=interrupt
        )
        return deltas.copy(), result

    whole, report = run(None)
    for stop in (3, 13, 21):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stop)
        assert attached(loaded.model) == []
        assert all(parameter.requires_grad for parameter in loaded.model.parameters())
        assert [item.name for item in tmp_path.iterdir() if item.name != "nest-home"] in (
            [],
            ["checkpoint.safetensors"],
        )
    again, resumed = run(tmp_path)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert resumed == report


def test_an_interrupt_costs_seconds_and_not_the_steps_since_the_last_validation(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = some_rows(loaded), QUICK.evolve(validate_every=1000)
    monkeypatch.setattr("nest_runtime.train.tune.KEEP_SECONDS", 0.0)

    def run(workdir: Path | None, stop: int = 0) -> tuple[list[int], dict[str, torch.Tensor]]:
        seen: list[int] = []

        def told(_: str, done: int, __: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "learned")
        tune(loaded.model, loaded.tokenizer, deltas, rows, rows[8:12], settings, workdir=workdir, progress=told)
        return seen, deltas.copy()

    _, whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 5)
    seen, again = run(tmp_path)
    assert seen[0] == 6
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_half_precision_base_trains_float32_numbers(tiny_llama: Path) -> None:
    half = load_model(tiny_llama, dtype="bfloat16")
    deltas = Deltas(half.model, find_projections(half.model), some_sites(half.model), "learned")
    rows = some_rows(half)
    result = tune(half.model, half.tokenizer, deltas, rows, rows[8:12], QUICK.evolve(lr_unit="row-rms", lr=0.2))
    assert all(tensor.dtype == torch.float32 for tensor in deltas.tensors.values())
    assert result.after["harmful_loss"] < result.before["harmful_loss"]


def test_what_cannot_be_trained_is_said(loaded: Any) -> None:
    sites, rows = find_projections(loaded.model), some_rows(loaded)
    with pytest.raises(TrainingError, match="no neurons"):
        tune(
            loaded.model,
            loaded.tokenizer,
            Deltas(loaded.model, sites, some_sites(loaded.model, 99), "tied"),
            rows,
            [],
            QUICK,
        )
    deltas = Deltas(loaded.model, sites, some_sites(loaded.model), "tied")
    with pytest.raises(TrainingError, match="no rows"):
        tune(loaded.model, loaded.tokenizer, deltas, [], [], QUICK)
    deltas.load({name: torch.full_like(tensor, torch.nan) for name, tensor in deltas.tensors.items()})
    with pytest.raises(TrainingError, match="the loss is nan"):
        tune(loaded.model, loaded.tokenizer, deltas, rows, [], QUICK)


def test_rows_end_with_the_end_token(loaded: Any) -> None:
    example = make_examples([{"prompt": "Hello?", "response": "Hi."}])[0]
    row = make_row(loaded.tokenizer, example, "Hi.", False, [2])
    assert list(row.prompt) == encode(loaded.tokenizer, example.messages)
    assert loaded.tokenizer.decode(row.answer) == "Hi.</s>"
    template = loaded.tokenizer.chat_template
    try:
        loaded.tokenizer.chat_template = None
        row = make_row(loaded.tokenizer, example, " Hi.", False, [2])
        assert loaded.tokenizer.decode([*row.prompt, *row.answer]) == "Hello? Hi.</s>"
    finally:
        loaded.tokenizer.chat_template = template
    with pytest.raises(DataError, match="empty"):
        make_row(loaded.tokenizer, example, " ", False, [2])


def test_refusals() -> None:
    given, missing = make_examples([{"prompt": "a", "response": "No."}, {"prompt": "a"}])
    assert refusal_for(given) == "No."
    assert refusal_for(missing) in REFUSALS
    assert refusal_for(missing) == refusal_for(missing)
    assert refusal_for(missing, ["Never."]) == "Never."


def test_steps_mix_classes_and_go_through_every_row() -> None:
    rows = [Row((number,), (1,), number < 6) for number in range(20)]
    steps = [step_rows(rows, step, 8, 0.25, seed=3) for step in range(3)]
    assert all(sum(row.harmful for row in step) == 2 for step in steps)
    assert {row.prompt[0] for step in steps for row in step if row.harmful} == set(range(6))
    assert steps[1] == step_rows(rows, 1, 8, 0.25, seed=3)
    assert steps[1] != step_rows(rows, 1, 8, 0.25, seed=4)
    assert len(step_rows(rows[6:], 0, 8, 0.25, seed=3)) == 8


def test_the_learning_rate_rises_and_falls() -> None:
    settings = QUICK.evolve(steps=100, warmup=0.1, schedule="cosine")
    factors = [lr_factor(step, settings) for step in range(100)]
    assert factors[0] < factors[5] < factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(99, settings.evolve(schedule="constant")) == 1.0


def test_logits_at_chosen_positions_match_the_whole_pass(loaded: Any, tmp_path: Path) -> None:
    from tests.conftest import save_tiny

    ids = torch.arange(3, 12).repeat(2, 1)
    mask, where = torch.ones_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    where[:, 4:6] = True
    capped = load_model(save_tiny(tmp_path / "g", "Gemma2ForCausalLM", "Gemma2Config", head_dim=16))
    for model in (loaded.model, capped.model):
        readout = Readout(model)
        assert readout.sliced
        with torch.no_grad():
            torch.testing.assert_close(readout.logits(ids, mask, where), model(ids).logits[where], atol=1e-5, rtol=1e-4)
    readout.model.lm_head.register_forward_hook(lambda _, __, output: output)
    readout.sliced = False
    with torch.no_grad():
        torch.testing.assert_close(readout.logits(ids, mask, where), model(ids).logits[where])
        assert hidden_states(model, ids, mask).shape == (2, 9, 64)


def test_the_divergence_is_that_of_the_whole_distribution_where_few_tokens_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    base, ours = (torch.randn(5, 40, generator=generator) * 3 for _ in range(2))
    kept = BaseAnswer.of(base)
    assert kept.tokens.shape == (5, 40)  # of a small vocabulary everything
    whole = torch.nn.functional.kl_div(ours.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(divergence(ours, kept.tokens, kept.logs), whole.sum(-1), atol=1e-4, rtol=1e-3)
    few = BaseAnswer(kept.tokens[:, :8], kept.logs[:, :8])
    part = divergence(ours, few.tokens, few.logs)
    assert bool((part <= whole.sum(-1) + 1e-5).all())
    assert bool((part > 0).all())
    torch.testing.assert_close(divergence(base, few.tokens, few.logs), torch.zeros(5), atol=1e-5, rtol=0)


def test_slices_give_the_gradient_of_the_whole(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "learned")
    randomize(deltas)
    settings, rows = QUICK.evolve(kl_weight=0.7, onset_weight=3.0, benign_weight=0.5), some_rows(loaded)
    found = []
    for numbers in (2**24, 700):  # all at once; a few tokens at a time
        monkeypatch.setattr("nest_runtime.train.objective.SLICE_NUMBERS", numbers)
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(False)
        try:
            with deltas.attached():
                loss = loss_of(Passes(loaded.model, deltas, 0, settings), make_batch(rows, 0, torch.device("cpu")))
                gradients = torch.autograd.grad(loss, list(deltas.tensors.values()))
        finally:
            for parameter in loaded.model.parameters():
                parameter.requires_grad_(True)
        found.append((loss.detach(), *gradients))
    for whole, sliced in zip(*found, strict=True):
        torch.testing.assert_close(sliced, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "model_class", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM"]
)
def test_lower_layers_run_once_and_change_nothing(tmp_path: Path, model_class: str) -> None:
    from tests.conftest import save_tiny

    config = {"GPT2LMHeadModel": "GPT2Config"}.get(model_class, model_class.replace("ForCausalLM", "Config"))
    extra = {"head_dim": 16} if model_class.startswith("Gemma") else {}
    loaded = load_model(save_tiny(tmp_path / "m", model_class, config, **extra), dtype="float32")
    top = find_projections(loaded.model)[-1]
    lower = LowerLayers(loaded.model, top)
    assert lower.usable
    assert lower.count == top.layer > 0
    calls = []
    handle = lower.layers[0].register_forward_hook(lambda *_: calls.append(1))
    rows = [Row(tuple(range(3, 9)), (7, 9, 2), True), Row(tuple(range(4, 8)), (5, 2), False)]
    batch = make_batch(rows, 0, torch.device("cpu"))
    with torch.no_grad():
        whole = hidden_states(loaded.model, batch.ids, batch.mask)
        first, second = lower.hidden(batch, rows), lower.hidden(batch, rows)
    handle.remove()
    assert len(calls) == 3  # the whole pass, and one for each row
    for found in (first, second):
        torch.testing.assert_close(found[batch.where], whole[batch.where], atol=1e-5, rtol=1e-4)


def test_rows_that_come_once_go_through_the_base_together_and_nothing_of_them_is_kept(loaded: Any) -> None:
    top, rows = [site for site in some_sites(loaded.model) if site.layer], some_rows(loaded)
    answers, losses, passes_made = [], [], []
    for steps in (0, 10_000):  # rows come never, or again and again
        deltas = Deltas(loaded.model, find_projections(loaded.model), top, "learned")
        randomize(deltas)
        with deltas.attached(), torch.no_grad():
            passes = Passes(loaded.model, deltas, 0, QUICK.evolve(steps=steps, kl_weight=1.0, step_tokens=4096))
            passes.prepare(rows)
            assert passes.keeps == (steps > 0)
            calls: list[int] = []
            handle = passes.lower.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[index]
            batch = make_batch(rows, 0, torch.device("cpu"))
            for _ in range(2):
                with passes.entered(batch):
                    base = passes.base_answers(batch)
                    loss = loss_of(passes, batch, None, base)
            handle.remove()
            answers.append(base)
            losses.append(loss)
            passes_made.append(len(calls))
    near = torch.tensor([not row.harmful for row in rows for _ in row.answer])
    torch.testing.assert_close(answers[0].logs[near], answers[1].logs[near], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
    assert passes_made == [2, len(rows)]  # one a batch, one a row


def test_rows_of_like_length_share_a_pass() -> None:
    lengths = [5, 300, 40, 42, 6, 41, 200]
    batches = even_batches(lengths, tokens=256)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        widest, narrowest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        assert widest <= 1.3 * narrowest + 8
        assert len(batch) == 1 or widest * len(batch) <= 256


def test_rows_of_many_lengths_have_few_widths_and_none_beyond_the_model(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "tied")
    passes = Passes(loaded.model, deltas, 0, QUICK)
    rows = [Row((5,) * length, (7, 2), False) for length in range(1, 60)]
    widths = {batch.ids.shape[1] for row in rows for batch in passes.batches([row])}
    assert widths == {16, 32, 48, 64}
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 60)
    (full,) = passes.batches([Row((5,) * 55, (7, 2), False)])
    assert full.ids.shape[1] == 57


def test_a_cut_answer_teaches_no_end(loaded: Any) -> None:
    example = make_examples([{"prompt": "Hello?"}])[0]
    whole, cut = (make_row(loaded.tokenizer, example, "Hi there", False, [2], whole=value) for value in (True, False))
    assert whole.answer == (*cut.answer, 2)


def test_ablation_takes_the_direction_from_harmful_rows_alone(loaded: Any) -> None:
    deltas = Deltas(loaded.model, find_projections(loaded.model), some_sites(loaded.model), "learned")
    rows, settings = some_rows(loaded), QUICK.evolve(ablation=1.0)
    with deltas.attached(), torch.no_grad():
        passes = Passes(loaded.model, deltas, 0, settings)
        passes.prepare(rows)
        assert passes.ablation is not None
        batch = make_batch([rows[0], rows[-1]], 0, torch.device("cpu"))
        plain = hidden_states(loaded.model, batch.ids, batch.mask)
        with passes.ablation.during(batch, 3):
            ablated = hidden_states(loaded.model, batch.ids, batch.mask)
        after = hidden_states(loaded.model, batch.ids, batch.mask)
    assert not torch.allclose(plain[0], ablated[0], atol=1e-4)
    torch.testing.assert_close(plain[1], ablated[1])
    torch.testing.assert_close(plain, after)


@pytest.mark.parametrize("sure", [1.0, 40.0])
def test_the_gradient_of_the_loss_is_autograds(sure: float) -> None:
    """One softmax gives what autograd makes of cross-entropy and divergence, tokens without weight or base included."""
    generator = torch.Generator().manual_seed(3)
    logits = (sure * torch.randn(7, 300, generator=generator)).requires_grad_(True)
    base = BaseAnswer.of(sure * torch.randn(7, 300, generator=generator))
    targets = torch.randint(0, 300, (7,), generator=generator)
    weights, base_weights = torch.tensor([1.0, 0, 2, 0.5, 0, 1, 0]), torch.tensor([0.0, 1, 0, 2, 0.5, 0, 0])
    for known in (base, None):
        value = token_loss(logits, targets, weights, known, base_weights)
        (found,) = torch.autograd.grad(3 * value, logits)
        wanted = (weights * cross_entropy(logits, targets, reduction="none")).sum()
        if known is not None:
            wanted = wanted + (base_weights * divergence(logits, known.tokens, known.logs)).sum()
        (expected,) = torch.autograd.grad(3 * wanted, logits)
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(token_loss(logits, targets, weights, known, base_weights), value.detach())
