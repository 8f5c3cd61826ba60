"""The recipe value, and whole training runs: patches, parents, controls, interrupts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.cli.main import main
from nest_runtime.errors import BaseMismatch, DataError, SiteMismatch, TrainingError, UsageError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.base_rows import rows_digest
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.examples import examples_digest, make_examples
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.pipeline import TrainResult, train_patch
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.result import notes_on
from nest_runtime.train.tune import TuneResult
from nest_runtime.train.warm_start import carried_values, parent_sites, parent_values
from tests.support.train import QUICK, benign_examples, harmful_examples


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def base_hash(loaded: Any) -> str:
    return model_hash(loaded.model)


@pytest.fixture(autouse=True)
def _fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def run(loaded: Any, base_hash: str, recipe: Recipe = QUICK, **changes: Any) -> TrainResult:
    given = {"harmful": harmful_examples(), "benign": benign_examples(response=None), "name": "tiny", "version": "v1"}
    return train_patch(
        loaded.model,
        loaded.tokenizer,
        recipe=recipe,
        base_hash=base_hash,
        base_model="tiny-llama",
        **{**given, **changes},
    )


@pytest.fixture(scope="module")
def first(loaded: Any, base_hash: str) -> TrainResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        return run(loaded, base_hash)


def test_recipe_round_trip_and_changes() -> None:
    recipe = Recipe(z=2, refusals=("No.",), relocate=True)
    assert isinstance(recipe.z, float)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.evolve(steps=5).steps == 5
    assert Recipe.from_json({}) == Recipe()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zz": 1}, "unknown field 'zz'"),
        ({"z": "high"}, "z is 'high'; expected float"),
        ({"z": float("nan")}, "z is nan"),
        ({"steps": 1.5}, "steps is 1.5; expected int"),
        ({"steps": True}, "steps is True"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 to"),
        ({"sign": "negative"}, "sign is 'negative'"),
        ({"depth_from": 0.5, "depth_to": 0.5}, "depth_to is 0.5, not above depth_from"),
        ({"k_min": 3, "k_max": 2}, "k_max is 2, below k_min 3"),
        ({"refusals": [""]}, "refusals"),
        ({"refusals": "No."}, "refusals is 'No.'; expected a list"),  # and not three texts of one letter
        ({"relocate": "yes"}, "relocate is 'yes'; expected bool"),
        ({"delta_dtype": "int8"}, "delta_dtype"),
    ],
)
def test_recipe_names_the_field_that_is_wrong(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe.from_json(values)


def test_a_whole_training_gives_a_valid_patch(loaded: Any, base_hash: str, first: TrainResult) -> None:
    patch, report = first.patch, first.report
    assert isinstance(patch, Patch)
    assert (patch.name, patch.version, patch.serial, patch.parent) == ("tiny", "v1", 1, None)
    assert [site.name for site in patch.sites] == [site.name for site in find_projections(loaded.model)]
    assert patch.base_hash == base_hash == model_hash(loaded.model)
    assert patch.rows_digest == rows_digest(loaded.model, {s.name: s.neurons.tensor() for s in patch.sites})
    assert patch.architecture == "LlamaForCausalLM"
    assert patch.created == "2023-11-14T22:13:20Z"
    assert Recipe.from_json(patch.header()["method"]["recipe"]) == QUICK
    assert patch.data["harmful"]["digest"] == examples_digest(harmful_examples())
    assert set(patch.sites[0].stats) == {"silhouette", "probe_accuracy", "threshold"}
    assert patch.sites[0].z is not None
    assert patch.metrics["validation"]["after"]["harmful_loss"] < patch.metrics["validation"]["before"]["harmful_loss"]
    assert set(report["seconds"]) == {"answers", "locate", "cluster", "tune"}
    assert report["digest"] == patch.digest
    assert report["parameters"] == patch.parameters == report["trainable"]


def test_the_same_run_gives_the_same_patch_and_another_seed_another(
    loaded: Any, base_hash: str, first: TrainResult
) -> None:
    assert run(loaded, base_hash).patch.digest == first.patch.digest
    assert run(loaded, base_hash, QUICK.evolve(seed=1)).patch.digest != first.patch.digest


@pytest.mark.parametrize("stage", ["generate", "activations", "locate", "cluster", "tune"])
def test_an_interrupted_run_resumes_to_the_same_patch(
    loaded: Any, base_hash: str, first: TrainResult, tmp_path: Path, stage: str
) -> None:
    work, stages = tmp_path / "x.work", []

    def interrupt(name: str, done: int, total: int) -> None:
        stages.append(name)
        if name == stage and (done >= total / 2 or name == "cluster"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(loaded, base_hash, workdir=work, progress=interrupt)
    assert not list(work.rglob("*.tmp"))
    stages.clear()
    again = run(loaded, base_hash, workdir=work, progress=lambda name, *_: stages.append(name))
    assert again.patch.digest == first.patch.digest
    assert not work.exists()
    order = ["generate", "activations", "locate", "cluster", "tune"]
    done = order[: order.index(stage)]
    assert not {"generate", "activations"} & set(done) & set(stages)


def test_answers_are_kept_beside_those_that_come_instead_of_refusals(
    loaded: Any, base_hash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is asked twice, the second time what it refused. One did away with the other's answers."""
    first: dict[str, bool] = {}

    def refuses(text: str) -> bool:  # every third answer of the first time
        return first.setdefault(text, len(first) % 3 == 0)

    monkeypatch.setattr("nest_runtime.prompts.refusals.is_refusal", refuses)
    recipe, work = QUICK.evolve(answer_refused=True, keep_refused=False), tmp_path / "work"
    stages: list[str] = []

    def told(name: str, done: int, total: int) -> None:
        stages.append(name)

    for _ in range(2):
        stages.clear()
        run(loaded, base_hash, recipe, workdir=work, keep_workdir=True, progress=told)
    assert "generate" not in stages
    few, many = sorted(len(json.loads(path.read_text())) for path in work.glob("*/answers.json"))
    assert 0 < few < many


def test_finished_stages_are_used_again_until_what_they_depend_on_changes(
    loaded: Any, base_hash: str, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (work / "notes").mkdir(parents=True)

    def stages(recipe: Recipe, **changes: Any) -> set[str]:
        seen: set[str] = set()
        run(
            loaded,
            base_hash,
            recipe,
            workdir=work,
            keep_workdir=True,
            progress=lambda name, *_: seen.add(name),
            **changes,
        )
        return seen

    assert stages(QUICK) == {"generate", "activations", "locate", "cluster", "tune"}
    assert stages(QUICK) == {"locate", "cluster"}  # the finished probes and the last checkpoint are read back
    assert stages(QUICK.evolve(lr=1e-3)) == {"locate", "cluster", "tune"}
    assert "activations" in stages(QUICK.evolve(pooling="mean"))
    assert "activations" in stages(QUICK, harmful=harmful_examples(9))
    assert "generate" in stages(QUICK, resume=False)
    run(loaded, base_hash, workdir=work)
    assert [item.name for item in work.iterdir()] == ["notes"]


def test_retuning_keeps_the_parents_neurons_and_records_it(loaded: Any, base_hash: str, first: TrainResult) -> None:
    child = run(
        loaded, base_hash, QUICK.evolve(steps=5), parent=first.patch, version="v2", rehearsal=harmful_examples(3)
    )
    assert (child.patch.parent, child.patch.serial) == (first.patch.digest, 2)
    for old, new in zip(first.patch.sites, child.patch.sites, strict=True):
        assert (old.neurons, old.clusters) == (new.neurons, new.clusters)
    assert child.patch.digest != first.patch.digest
    assert child.report["parent_kept"] == 1.0
    assert child.patch.data["rehearsal"]["count"] == 3
    # what the run starts from is the parent's effect
    start = child.report["validation"]["before"]["harmful_loss"]
    assert start == pytest.approx(first.report["validation"]["after"]["harmful_loss"], rel=1e-3)


@pytest.mark.parametrize("loadings", ["tied", "signed", "learned"])
def test_retuning_can_locate_anew(loaded: Any, base_hash: str, loadings: str) -> None:
    recipe = QUICK.evolve(loadings=loadings)
    parent = run(loaded, base_hash, recipe).patch
    again = run(loaded, base_hash, recipe.evolve(relocate=True, steps=0), parent=parent)
    assert again.report["parent_kept"] == pytest.approx(1.0, abs=1e-3)  # the same prompts, the same neurons
    fewer = run(loaded, base_hash, recipe.evolve(relocate=True, steps=0, z=2.0), parent=parent)
    assert 0.0 < fewer.report["parent_kept"] < 1.0
    assert fewer.patch.neurons < parent.neurons


def test_carrying_over_is_the_nearest_update(loaded: Any, first: TrainResult) -> None:
    sites = parent_sites(first.patch, find_projections(loaded.model))
    turned = [site.evolve(clusters=tuple(0 for _ in site.neurons)) for site in sites]
    warm, share = carried_values(first.patch, turned, "learned")
    assert 0.0 < share < 1.0
    for site, old in zip(turned, first.patch.sites, strict=True):
        deltas, loadings = warm[site.site]
        best = torch.linalg.svd(old.row_deltas())
        wanted = best.S[0] * torch.outer(best.U[:, 0], best.Vh[0])
        torch.testing.assert_close(deltas[0] * loadings[:, None], wanted, atol=1e-4, rtol=1e-3)


def test_warm_values_reproduce_the_parent(loaded: Any, first: TrainResult) -> None:
    sites = parent_sites(first.patch, find_projections(loaded.model))
    deltas = Deltas(loaded.model, find_projections(loaded.model), sites, "learned", parent_values(first.patch))
    for part in deltas.sites:
        rows = part.deltas[part.clusters] * part.loadings[:, None]
        torch.testing.assert_close(rows.detach(), first.patch.site(part.site.site).row_deltas())


def test_the_random_control_is_of_equal_size(loaded: Any, base_hash: str, first: TrainResult) -> None:
    control = run(loaded, base_hash, QUICK.evolve(control="random", steps=2)).patch
    assert (control.neurons, control.clusters) == (first.patch.neurons, first.patch.clusters)
    assert control.parameters == first.patch.parameters
    assert control.method["recipe"]["control"] == "random"
    assert control.sites[0].neurons != first.patch.sites[0].neurons


def test_float32_deltas_and_empty_sites(loaded: Any, base_hash: str) -> None:
    patch = run(loaded, base_hash, QUICK.evolve(delta_dtype="float32", sign="positive", z=1.2, steps=2)).patch
    assert {site.deltas.dtype for site in patch.sites} == {torch.float32}
    assert patch.neurons > 0
    with pytest.raises(TrainingError, match="no neurons were located"):
        run(loaded, base_hash, QUICK.evolve(z=50.0))


def test_a_site_may_be_empty(loaded: Any, base_hash: str) -> None:
    for z in (2.0, 2.4, 2.8, 3.2, 3.6, 4.0):
        try:
            patch = run(loaded, base_hash, QUICK.evolve(z=z, steps=1)).patch
        except TrainingError:
            continue
        if any(site.n_neurons == 0 for site in patch.sites):
            assert all(site.deltas.shape == (0, 64) for site in patch.sites if site.n_neurons == 0)
            return
    pytest.fail("no threshold left a site empty and another not")


def test_a_range_of_layers(loaded: Any, base_hash: str, first: TrainResult) -> None:
    upper = run(loaded, base_hash, QUICK.evolve(depth_from=0.5)).patch
    assert [site.name.split(".")[2] for site in upper.sites] == ["1", "1"]
    with pytest.raises(UsageError, match="no layer of 2 lies between"):
        run(loaded, base_hash, QUICK.evolve(depth_from=0.4, depth_to=0.6))
    wide = run(loaded, base_hash, QUICK.evolve(steps=1), parent=upper)  # a kept parent keeps its own range
    assert wide.patch.neurons == upper.neurons
    narrow = run(loaded, base_hash, QUICK.evolve(depth_from=0.5, relocate=True, steps=0), parent=first.patch)
    assert 0.0 < narrow.report["parent_kept"] < 1.0


def test_refusals_that_the_base_already_gives_are_noted(first: TrainResult) -> None:
    assert not any("already gave" in note for note in first.report["notes"])
    known = TuneResult(before={"harmful_loss": 0.003, "benign_loss": 0.01}, after={})
    assert "already gave these refusals" in notes_on(known)[0]


def test_refusals_that_do_not_come_out_are_noted(loaded: Any, base_hash: str) -> None:
    short = run(loaded, base_hash, QUICK.evolve(steps=1)).report
    assert short["validation"]["after"]["harmful_exact"] == 0
    assert any("half learned" in note and "more steps" in note for note in short["notes"])
    assert notes_on(TuneResult(before={"harmful_loss": 5.0}, after={"harmful_exact": 0.1})) == []
    assert notes_on(TuneResult(before={}, after={})) == []  # nothing was held out


def test_train_tells_people_its_notes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, examples in (("bad", harmful_examples()), ("good", benign_examples(response=None))):
        Path(f"{name}.txt").write_text("\n".join(example.prompt for example in examples), encoding="utf-8")
    Path("recipe.json").write_text(json.dumps(QUICK.evolve(steps=1).to_json()), encoding="utf-8")
    files = ["--harmful", "bad.txt", "--benign", "good.txt", "--recipe", "recipe.json", "--out", "v1.safetensors"]
    assert main(["train", "--model", str(tiny_llama), *files]) == 0
    assert "half learned" in capsys.readouterr().err


def test_wrong_parents_and_prompts_are_refused(loaded: Any, base_hash: str, first: TrainResult) -> None:
    with pytest.raises(BaseMismatch, match=r"is for base sha256:0+"):
        run(loaded, base_hash, parent=first.patch.evolve(base_hash="sha256:" + "0" * 64))
    stranger = first.patch.evolve(sites=tuple(_renamed(site) for site in first.patch.sites))
    with pytest.raises(SiteMismatch, match="the model has None"):
        run(loaded, base_hash, parent=stranger)
    with pytest.raises(DataError, match="no harmful prompts"):
        run(loaded, base_hash, harmful=[])
    both = [*benign_examples(), *harmful_examples(1)]
    with pytest.raises(DataError, match="1 prompts are harmful and benign at once"):
        run(loaded, base_hash, benign=both)
    with pytest.raises(UsageError, match="rehearsal"):
        run(loaded, base_hash, rehearsal=harmful_examples(2))
    with pytest.raises(TrainingError, match="at least 2"):
        run(loaded, base_hash, harmful=harmful_examples(1))


def _renamed(site: Any) -> Any:
    from dataclasses import replace

    return replace(site, name=site.name.replace("layers", "blocks"))


def test_the_date_must_be_a_number(loaded: Any, base_hash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        run(loaded, base_hash, QUICK.evolve(steps=1))


def test_conversations_of_several_turns(loaded: Any, base_hash: str) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Let us talk."},
                {"role": "assistant", "content": "About what?"},
                {"role": "user", "content": f"How do I wash a {word}?"},
            ],
            "response": "With water.",
        }
        for word in ("cup", "dog", "car", "wall")
    ]
    assert run(loaded, base_hash, QUICK.evolve(steps=1), benign=make_examples(rows)).patch.parameters > 0
