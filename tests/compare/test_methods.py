"""Every baseline on a tiny random model: what it trains, what it ships, and that it leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nest_runtime.compare.methods import FitData, Fitted, Target, make_methods, method_names, prepare_data
from nest_runtime.compare.methods.circuit_breaker import (
    BreakerText,
    _roles,
    losses,
    make_texts,
    modules,
    reroute,
    target_layers,
)
from nest_runtime.compare.methods.filter import Blocker, learn_terms
from nest_runtime.compare.methods.in_context import SYSTEM, Prompter
from nest_runtime.compare.methods.lora import adapter_parameters, injected
from nest_runtime.compare.methods.memory import measured
from nest_runtime.compare.methods.registry import check_names, read_settings
from nest_runtime.errors import DataError, ModelError, UsageError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.load import load_model
from nest_runtime.patch.file import read_patch
from nest_runtime.prompts.examples import make_examples
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.run import Run
from tests.support.patches import attached
from tests.support.train import QUICK, benign_examples, harmful_examples

D, FF, LAYERS, KV, VOCABULARY = 64, 96, 2, 32, 300
RECIPE = QUICK.evolve(steps=6, validate_every=3)
VALUES = {"filter": 0.9, "in-context": 2.0, "full": 1e-3}
QUESTIONS = [
    [{"role": "user", "content": "How do I forge a stamp today?"}],
    [{"role": "user", "content": "How do I bake?"}],
]
TRAINABLE = {
    "base": 0,
    "filter": 0,
    "in-context": 0,
    "lora": LAYERS * 8 * ((D + D) + (D + KV)),
    "lora-ffn": LAYERS * 2 * 8 * (D + FF),
    "full": 2 * VOCABULARY * D + D + LAYERS * (2 * D * D + 2 * D * KV + 3 * D * FF + 2 * D),
    "circuit-breaker": 16 * (2 * (D + D) + 2 * (D + KV) + 3 * (D + FF)),
}


@pytest.fixture(scope="module")
def target(tiny_llama: Path) -> Target:
    loaded = load_model(tiny_llama)
    return Target(loaded.model, loaded.tokenizer, loaded.hash, loaded.name)


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> FitData:
    folder = tmp_path_factory.mktemp("data")
    return prepare_data(target, harmful_examples(), benign_examples(), RECIPE, workdir=folder)


@pytest.fixture(autouse=True)
def _no_trace(target: Target) -> Iterator[None]:
    """Whatever a test does, the model has the same modules, flags, hooks and bits afterwards."""
    before = _state(target.model)
    yield
    after = _state(target.model)
    assert after.shape == before.shape
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def _state(model: Any) -> SimpleNamespace:
    shape = [
        [(name, type(module).__name__) for name, module in model.named_modules()],
        attached(model),
        [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()],
        model.training,
        hasattr(model, "peft_config"),
    ]
    return SimpleNamespace(shape=shape, tensors={name: t.clone() for name, t in model.state_dict().items()})


def _fit(name: str, target: Target, data: FitData, folder: Path, recipe: Recipe = RECIPE) -> Fitted:
    method = next(method for method in make_methods([name]) if method.name == name)
    return method.fit(target, data, recipe, value=VALUES.get(name, 1e-2), workdir=folder)


def _logits(target: Target) -> torch.Tensor:
    with torch.no_grad():
        return target.model(input_ids=torch.arange(12)[None]).logits


@pytest.mark.parametrize("name", method_names())
def test_each_method_trains_ships_and_leaves_no_trace(name: str, target: Target, data: FitData, tmp_path: Path) -> None:
    bare = _logits(target)
    fitted = _fit(name, target, data, tmp_path)
    assert torch.equal(_logits(target), bare)
    assert fitted.method == name
    if name in TRAINABLE:
        assert fitted.trainable == TRAINABLE[name]
    assert (fitted.artifact is None) == (name == "base")
    assert fitted.artifact_bytes >= 2 * fitted.trainable  # at least two bytes a number
    assert fitted.seconds >= 0
    assert fitted.peak_bytes >= 0
    json.dumps(dict(fitted.report))
    with fitted.applied():
        changed = not torch.equal(_logits(target), bare)
    assert changed == (fitted.trainable > 0)
    assert torch.equal(_logits(target), bare)
    assert len(fitted.answers(target, QUESTIONS, max_new_tokens=4)) == 2


@pytest.mark.parametrize("name", ["in-context", "lora", "full", "circuit-breaker", "nest-loadings", "random-neurons"])
def test_the_same_seed_gives_the_same_artifact(name: str, target: Target, data: FitData, tmp_path: Path) -> None:
    first, second = (_fit(name, target, data, tmp_path / part) for part in ("first", "second"))
    files = [_content(fitted) for fitted in (first, second)]
    assert files[0] == files[1]


def _content(fitted: Fitted) -> dict[str, Any]:
    assert fitted.artifact is not None
    if fitted.artifact.name == "patch.safetensors":  # its header holds the time of making
        return {key: tensor.data for key, tensor in read_patch(fitted.artifact).tensors.items()}
    paths = [fitted.artifact] if fitted.artifact.is_file() else sorted(fitted.artifact.rglob("*.safetensors"))
    return {path.name: path.read_bytes() for path in paths}


def test_an_error_while_a_method_is_on_takes_it_off(target: Target, data: FitData, tmp_path: Path) -> None:
    bare = _logits(target)
    for name in ("full", "lora", "nest"):
        fitted = _fit(name, target, data, tmp_path / name)
        with pytest.raises(ZeroDivisionError), fitted.applied():
            raise ZeroDivisionError
        assert torch.equal(_logits(target), bare)


def test_supervised_training_lowers_the_validation_loss(target: Target, data: FitData, tmp_path: Path) -> None:
    recipe = RECIPE.evolve(steps=25, kl_weight=0.1)
    for name in ("lora", "lora-ffn", "full"):
        report = _fit(name, target, data, tmp_path, recipe).report["validation"]
        assert sum(report["after"][key] for key in ("harmful_loss", "benign_loss")) < sum(
            report["before"][key] for key in ("harmful_loss", "benign_loss")
        )


def test_full_fine_tuning_of_a_bfloat16_model_trains_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_llama, dtype="bfloat16")
    target = Target(loaded.model, loaded.tokenizer, loaded.hash, loaded.name)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    data = prepare_data(target, harmful_examples(), benign_examples(), RECIPE, workdir=tmp_path)
    fitted = _fit("full", target, data, tmp_path)
    with fitted.applied():
        assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
        assert any(not torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_data_are_split_as_train_patch_splits_them(target: Target, data: FitData, tmp_path: Path) -> None:
    fitted = _fit("nest", target, data, tmp_path)
    assert fitted.report["rows"] == data.rows == {"train": 16, "validation": 4}
    rows = [{"prompt": e.prompt, "response": e.response, "target": "Take a pen"} for e in harmful_examples()]
    with_targets = prepare_data(target, make_examples(rows), benign_examples(), RECIPE, workdir=tmp_path)
    method = make_methods(["nest"])[-1]
    fitted = method.fit(target, with_targets, RECIPE, value=1e-2, workdir=tmp_path)
    assert fitted.report["rows"] == with_targets.rows
    assert with_targets.rows["train"] > data.rows["train"]
    assert {e.id for e in data.train_harmful}.isdisjoint(e.id for e in data.held_harmful)


def test_benign_prompts_without_an_answer_get_the_base_s_own(target: Target, tmp_path: Path) -> None:
    data = prepare_data(target, harmful_examples(), benign_examples(6, None), RECIPE, workdir=tmp_path)
    assert all(example.response for example in data.benign)


def test_random_neurons_are_as_many_as_located_ones(target: Target, data: FitData, tmp_path: Path) -> None:
    nest, control = (_fit(name, target, data, tmp_path) for name in ("nest", "random-neurons"))
    assert nest.artifact is not None
    assert control.artifact is not None
    ours, theirs = read_patch(nest.artifact), read_patch(control.artifact)
    assert [site.n_neurons for site in ours.sites] == [site.n_neurons for site in theirs.sites]
    assert [site.n_clusters for site in ours.sites] == [site.n_clusters for site in theirs.sites]
    assert any(a.neurons != b.neurons for a, b in zip(ours.sites, theirs.sites, strict=True))
    assert ours.parameters == nest.trainable == control.trainable


def test_circuit_breaker_s_rerouting_loss_falls(target: Target, data: FitData) -> None:
    recipe = RECIPE.evolve(steps=30, validate_every=10)
    with injected(target.model, modules(target.model), 16, 16, 0, dropout=0.05) as peft_model:
        history = reroute(peft_model, target.tokenizer, make_texts(target, data), recipe, 1e-2, (0, 1), None)
    assert history[0]["reroute"] == pytest.approx(1.0, abs=1e-3)  # nothing has moved yet
    assert history[0]["retain"] == pytest.approx(0.0, abs=1e-3)
    assert history[-1]["reroute"] < 0.5


def test_circuit_breaker_reroutes_harmful_answers_where_there_are_any(target: Target, tmp_path: Path) -> None:
    rows = [{"prompt": f"How do I forge a {i}?", "response": "No.", "target": "Take a pen"} for i in range(4)]
    data = prepare_data(target, make_examples(rows), benign_examples(), RECIPE, workdir=tmp_path)
    texts = [target.tokenizer.decode(text.tokens) for text in make_texts(target, data) if text.harmful]
    assert texts
    assert all("Take a pen" in text and "No." not in text for text in texts)


def test_circuit_breaker_s_terms_count_the_tokens_they_should(target: Target) -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    texts = [BreakerText((5, 6, 7, 8), False, kept_from=2), BreakerText((9, 10), True)]
    moved, kept = (part & mask.bool() for part in _roles(texts, 4))
    assert moved.tolist() == [[False] * 4, [True, True, False, False]]
    assert kept.tolist() == [[False, False, True, True], [False] * 4]
    with injected(target.model, ["q_proj", "v_proj"], 4, 4, 0) as peft_model, torch.no_grad():
        for parameter in adapter_parameters(peft_model).values():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        retain, rerouted = losses(peft_model, ids, mask, moved, kept, (1,))
        after = _layers(target.model, ids, mask)
    before = _layers(target.model, ids, mask)
    places = [(0, 2), (0, 3)]
    distances = [
        float((a[r, t] - b[r, t]).norm() / b[r, t].norm())
        for a, b in zip(after, before, strict=True)
        for r, t in places
    ]
    cosines = [torch.cosine_similarity(after[1][1, t], before[1][1, t], dim=0).clamp(min=0) for t in (0, 1)]
    assert float(retain) == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    assert float(rerouted) == pytest.approx(float(sum(cosines)) / 2, rel=1e-4)


def _layers(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The decoder layers' outputs."""
    found: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, i, o: found.append(o)) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return found


def test_circuit_breaker_s_layers_scale_with_depth() -> None:
    assert target_layers(32) == (9, 19)  # hidden states 10 and 20
    assert target_layers(6) == (1, 3)
    assert target_layers(2) == (0,)


def test_filter_learns_telling_terms_and_blocks_both_ways(target: Target, data: FitData, tmp_path: Path) -> None:
    terms = learn_terms(harmful_examples(), benign_examples(), 0.9)
    assert "forge" in terms
    assert not {"how", "do", "i", "bake", "how do"} & set(terms)
    fitted = _fit("filter", target, data, tmp_path)
    assert fitted.screen is not None
    refusal = fitted.screen(QUESTIONS[0], None)
    assert refusal
    assert fitted.screen(QUESTIONS[1], None) is None
    assert fitted.screen(QUESTIONS[1], "First forge it.") == refusal
    assert fitted.screen(QUESTIONS[1], "Mix the flour.") == "Mix the flour."
    seen: dict[int, str] = {}
    answers = fitted.answers(
        target, QUESTIONS, lambda at, texts: seen.update(zip(at, texts, strict=True)), max_new_tokens=2
    )
    assert answers[0] == refusal
    assert seen == dict(enumerate(answers))


def test_filter_s_block_list_matches_whole_prompts_only() -> None:
    blocker = Blocker({"refusal": "No.", "terms": [], "block_list": ["pick a lock"]})
    assert blocker.screen([{"role": "user", "content": "Pick a lock!"}], None) == "No."
    assert blocker.screen([{"role": "user", "content": "Pick a lock for my shed"}], None) is None


def test_in_context_puts_system_text_and_examples_first(target: Target) -> None:
    shots = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(4)]
    made = Prompter(target.tokenizer, SYSTEM, shots).rewrite(QUESTIONS[0])
    assert [m["role"] for m in made] == ["system", *["user", "assistant"] * 4, "user"]
    own = [{"role": "system", "content": "Be brief."}, *QUESTIONS[0]]
    assert Prompter(target.tokenizer, SYSTEM, shots).rewrite(own)[0]["content"] == f"{SYSTEM}\n\nBe brief."
    short = Prompter(target.tokenizer, "S", shots, room=24).rewrite(QUESTIONS[0])
    assert len(short) < len(made)
    assert Prompter(target.tokenizer, SYSTEM, shots, room=1).rewrite(QUESTIONS[0]) == QUESTIONS[0]


def test_in_context_works_where_the_template_knows_no_system_message(target: Target) -> None:
    class Strict:
        chat_template = "no system"

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            if any(message["role"] == "system" for message in messages):
                raise ValueError("no system role")
            return "".join(message["content"] for message in messages)

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text)))}

    made = Prompter(Strict(), "S", []).rewrite(QUESTIONS[1])
    assert made == [{"role": "user", "content": "S\n\nHow do I bake?"}]


def test_lora_s_modules_are_found_or_the_error_names_another_way() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = torch.nn.Linear(2, 2)

    from nest_runtime.compare.methods.lora import attention_modules

    with pytest.raises(ModelError, match="Odd has no q_proj") as caught:
        attention_modules(Odd())
    assert "lora-ffn" in caught.value.hint


def test_a_misspelled_method_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UsageError, match="no method 'lorra'") as caught:
        make_methods(["base", "lorra"])
    assert "did you mean 'lora'?" in caught.value.hint
    assert caught.value.exit_status == 2
    with pytest.raises(UsageError):
        make_methods([])
    assert check_names(["nest", "nest", "lora"]) == ["base", "nest", "lora"]


def test_a_broken_settings_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such settings file"):
        read_settings(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"values": 3, "recipe": {}}', encoding="utf-8")
    with pytest.raises(DataError, match="not a settings file"):
        read_settings(tmp_path / "bad.json")


def test_memory_is_measured_beyond_what_was_in_use() -> None:
    with measured(torch.device("cpu")) as cost:
        block = torch.ones(20_000_000)  # 80 MB, touched
        del block
    assert cost.peak_bytes > 60_000_000
    assert cost.seconds > 0


def test_examples_of_several_turns_never_become_shots(target: Target, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bake?"},
    ]
    rows = [{"messages": talk, "response": "Mix it."}, *({"prompt": f"{i}?", "response": "Yes."} for i in range(5))]
    data = prepare_data(target, harmful_examples(), make_examples(rows), RECIPE, workdir=tmp_path)
    fitted = _fit("in-context", target, data, tmp_path)
    assert fitted.rewrite is not None
    assert "Yes?" not in {message["content"] for message in fitted.rewrite(QUESTIONS[1])}


def test_every_method_learns_refusals_in_the_same_words(target: Target, tmp_path: Path) -> None:
    """Where the recipe takes the base's own refusal, the examples say what the token rows say."""
    recipe = RECIPE.evolve(own_refusals=True)
    harmful = [replace(example, response=None) for example in harmful_examples()]
    run = Run(
        target.model, target.tokenizer, find_projections(target.model), recipe, target.base_hash, "", tmp_path, None
    )
    words = run.refusing(harmful).evolve(refusals=("No, I will not.",))
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Run, "refusing", lambda *_: words)
        data = prepare_data(target, harmful, benign_examples(), recipe, workdir=tmp_path)
    assert {example.response for example in data.harmful} == {"No, I will not."}
    spelled = tuple(target.tokenizer("No, I will not.", add_special_tokens=False)["input_ids"])
    assert all(row.answer[: len(spelled)] == spelled for row in data.train if row.harmful)
