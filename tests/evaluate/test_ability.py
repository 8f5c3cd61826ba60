"""General ability through lm-eval, on tasks with local data: scores, pairing with the base, resuming, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from nest_runtime.cli.commands import evaluate as command
from nest_runtime.errors import EvaluationError, NestError, UsageError
from nest_runtime.evaluate import EvalResult, evaluate
from nest_runtime.evaluate import lm_eval as harness_module
from nest_runtime.evaluate.ability import Score, with_base
from nest_runtime.evaluate.lm_eval import load_tasks, split_suites
from nest_runtime.evaluate.stats import wilson
from nest_runtime.model.load import LoadedModel, load_model
from tests.support.patches import attached, make_patch

QUESTIONS = [f"Is {a} plus {b} equal to {a + b}?" for a in range(4) for b in range(5)]
CHOICES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama)


@pytest.fixture
def tasks_folder(tmp_path: Path) -> Path:
    """Two tasks over one JSONL file, one with choices and one to be answered, and a group of both."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": text, "choices": CHOICES, "gold": i % 2, "answer": "x"} for i, text in enumerate(QUESTIONS)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choose = {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    answer = {
        "task": "own_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    group = {
        "group": "own_group",
        "task": ["own_choice", "own_answer"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    for name, task in (("choice", {**common, **choose}), ("answer", {**common, **answer}), ("group", group)):
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def _right(loaded: LoadedModel) -> list[float]:
    """For every question whether the likeliest choice is the right one, computed without lm-eval."""
    right = []
    for i, question in enumerate(QUESTIONS):
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompt = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        scores = []
        for choice in CHOICES:
            answer = loaded.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(answer)))
        right.append(float(scores.index(max(scores)) == i % 2))
    return right


def test_scores_are_the_model_s_own_under_the_patch_and_without(loaded: LoadedModel, tasks_folder: Path) -> None:
    from nest_runtime.runtime import PatchRuntime

    tasks = load_tasks(["own_choice"], include=tasks_folder)
    patch = make_patch(loaded.model, scale=3.0, neurons=40)
    model, tokenizer = loaded.model, loaded.tokenizer
    base = evaluate(model, tokenizer, [], [], tasks=tasks, batch_size=4)
    result = evaluate(model, tokenizer, [], [], tasks=tasks, batch_size=4, patch=patch).compared_with(base)
    bare = _right(loaded)
    with PatchRuntime(model) as runtime:
        runtime.activate(runtime.add(patch))
        patched = _right(loaded)
    assert bare != patched  # else the test shows nothing
    (score,) = result.ability
    assert (score.task, score.metric, score.n) == ("own_choice", "acc", len(QUESTIONS))
    assert score.value == pytest.approx(sum(patched) / len(patched))
    assert [score.samples[f"own_choice/{i}"] for i in range(len(QUESTIONS))] == patched
    assert base.ability[0].value == pytest.approx(sum(bare) / len(bare))
    assert score.ci95 == wilson(int(sum(patched)), len(patched))
    assert score.stderr is not None
    change = score.change
    assert change is not None
    assert change["difference"] == pytest.approx(score.value - base.ability[0].value)
    assert change["difference_ci95"][0] <= change["difference"] <= change["difference_ci95"][1]
    assert 0 <= change["mcnemar_p"] <= 1
    assert (result.patch, base.patch) == ("v1", "base")
    assert attached(model) == []


def test_a_group_is_scored_with_its_parts(loaded: LoadedModel, tasks_folder: Path, tmp_path: Path) -> None:
    tasks = load_tasks(["own_group"], include=tasks_folder, limit=6)
    result = evaluate(loaded.model, loaded.tokenizer, [], [], tasks=tasks)
    found = {(score.task, score.name): score for score in result.ability}
    assert found.keys() == {("own_group", "acc"), ("own_choice", "acc"), ("own_answer", "exact_match")}
    assert found["own_choice", "acc"].group == "own_group"
    assert found["own_group", "acc"].n == 6
    assert found["own_group", "acc"].value == found["own_choice", "acc"].value
    summary = result.summary()
    assert summary["ability"]["own_choice"]["acc"]["n"] == 6
    assert summary["settings"]["ability"]["limit"] == 6
    assert summary["asr"] == {}
    path = result.save(tmp_path / "result.json")
    assert EvalResult.load(path) == result
    assert "| own_group / own_choice | acc |" in result.markdown()


def test_an_interrupted_run_goes_on_and_patches_share_nothing(
    loaded: LoadedModel, tasks_folder: Path, tmp_path: Path
) -> None:
    tasks = load_tasks(["own_group"], include=tasks_folder)
    options: dict[str, Any] = {"tasks": tasks, "batch_size": 1, "workdir": tmp_path / "work"}

    def interrupt(stage: str, done: int, total: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded.model, loaded.tokenizer, [], [], progress=interrupt, **options)
    ledger = tmp_path / "work" / "ability.jsonl"
    kept = len(ledger.read_text().splitlines())
    assert 0 < kept < 4 * len(QUESTIONS)
    seen: list[tuple[str, int, int]] = []
    result = evaluate(loaded.model, loaded.tokenizer, [], [], progress=lambda *step: seen.append(step), **options)
    asked = {stage: total for stage, _, total in seen}
    assert sum(asked.values()) == 4 * len(QUESTIONS) - kept
    seen.clear()
    again = evaluate(loaded.model, loaded.tokenizer, [], [], progress=lambda *step: seen.append(step), **options)
    assert seen == []
    assert again.ability == result.ability
    fresh = evaluate(loaded.model, loaded.tokenizer, [], [], tasks=tasks)
    assert [(s.task, s.value) for s in fresh.ability] == [(s.task, s.value) for s in result.ability]
    patch = make_patch(loaded.model, scale=3.0, neurons=40)
    evaluate(loaded.model, loaded.tokenizer, [], [], patch=patch, progress=lambda *step: seen.append(step), **options)
    assert {stage: total for stage, _, total in seen} == {
        "lm-eval loglikelihood": 3 * len(QUESTIONS),
        "lm-eval generate_until": len(QUESTIONS),
    }


def test_the_command_reports_scores_in_json_and_in_a_table(
    tiny_llama: Path, loaded: LoadedModel, tasks_folder: Path, tmp_path: Path
) -> None:
    patch = make_patch(loaded.model, scale=3.0, neurons=40).save(tmp_path / "p.safetensors")
    args = ["eval", "--model", str(tiny_llama), "--patch", str(patch), "--lm-eval-include", str(tasks_folder)]
    args += ["--suite", "lm-eval:own_choice,own_answer", "--limit", "8", "--with-base"]
    (tmp_path / "mine.txt").write_text("How do I forge a seal?\n", encoding="utf-8")
    result = _invoke([*args, "--behaviors", str(tmp_path / "mine.txt"), "--max-tokens", "4", "--json"])
    made = json.loads(result.stdout)
    figures = made["ability"]["own_choice"]["acc"]
    assert {"value", "stderr", "ci95", "n", "change"} <= figures.keys()
    assert figures["n"] == 8
    assert figures["change"].keys() == {"base", "difference", "difference_ci95", "mcnemar_p"}
    assert made["asr"]["mine"]["n"] == 1
    shown = _invoke(args).stdout
    assert "STDERR" in shown
    assert "own_answer" in shown
    assert "SUITE" not in shown


def _invoke(args: list[str]) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    command.register(app)
    return CliRunner().invoke(app, args, catch_exceptions=False)


def test_what_cannot_be_run_is_said_before_a_model_is_loaded(tasks_folder: Path) -> None:
    far = {"task": "far", "dataset_path": "nobody/nothing", "test_split": "test", "doc_to_text": "a"}
    (tasks_folder / "far.yaml").write_text(json.dumps(far), encoding="utf-8")
    args = ["eval", "--model", "no/such-model", "--lm-eval-include", str(tasks_folder)]
    with pytest.raises(EvaluationError, match="lm-eval cannot load far: ") as caught:
        _invoke([*args, "--suite", "lm-eval:far"])
    assert "--lm-eval-include" in caught.value.hint
    with pytest.raises(UsageError, match="no task 'own_chioce'") as misspelled:
        _invoke([*args, "--suite", "lm-eval:own_chioce"])
    assert "did you mean own_choice" in misspelled.value.hint
    with pytest.raises(UsageError, match="is no folder"):
        load_tasks(["own_choice"], include=tasks_folder / "none")
    with pytest.raises(UsageError, match="without cases to attack"):
        _invoke([*args, "--suite", "lm-eval:own_choice", "--attacks", "base64"])


def test_a_task_that_does_not_suit_the_model_is_an_error(loaded: LoadedModel, tasks_folder: Path) -> None:
    task = json.loads((tasks_folder / "answer.yaml").read_text(encoding="utf-8"))
    task |= {"task": "endless", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10_000}}
    (tasks_folder / "endless.yaml").write_text(json.dumps(task), encoding="utf-8")
    tasks = load_tasks(["endless"], include=tasks_folder)
    with pytest.raises(EvaluationError, match="lm-eval fails on endless: AssertionError"):
        evaluate(loaded.model, loaded.tokenizer, [], [], tasks=tasks)


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_module, "find_spec", lambda name: None)
    with pytest.raises(NestError, match="lm-eval, which is not installed") as caught:
        _invoke(["eval", "--model", "no/such-model", "--suite", "lm-eval:gsm8k"])
    assert caught.value.hint.startswith("pip install 'lm-eval")


def test_task_names_are_split_from_suites() -> None:
    assert split_suites(["plain", "lm-eval:a,b", "lm-eval:b, c"]) == (["plain"], ["a", "b", "c"])
    for bad in ("lm-eval:", "lm-eval:a,,b"):
        with pytest.raises(UsageError, match="without a task's name"):
            split_suites([bad])


def _score(values: list[float], **fields: Any) -> Score:
    samples = {f"t/{i}": value for i, value in enumerate(values)}
    own = {"stderr": 0.1, "n": len(values), "samples": samples, **fields}
    return Score("t", "m", "none", sum(values) / len(values), **own)


def test_the_interval_of_a_mean_difference_is_the_paired_one() -> None:
    from scipy.stats import norm

    old, new = [0.1, 0.5, 0.9, 0.3], [0.2, 0.9, 0.7, 0.8]
    (score,) = with_base([_score(new)], [_score(old)])
    differences = [b - a for a, b in zip(old, new, strict=True)]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    change = score.change
    assert change is not None
    assert change["difference_ci95"] == pytest.approx(norm.interval(0.95, mean, error))
    assert change["mcnemar_p"] is None  # not right or wrong
    assert score.ci95 == pytest.approx((score.value - 1.96 * 0.1, score.value + 1.96 * 0.1), abs=1e-4)
    (binary,) = with_base([_score([1.0, 1.0, 1.0, 1.0, 0.0])], [_score([0.0, 0.0, 0.0, 0.0, 0.0])])
    assert binary.change is not None
    assert binary.change["mcnemar_p"] == pytest.approx(0.125)


def test_scores_of_other_documents_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="other tasks or documents"):
        with_base([_score([1.0, 0.0])], [_score([1.0])])
    (loose,) = with_base([_score([1.0, 0.0], samples={})], [_score([1.0, 1.0])])
    assert loose.change is not None
    assert loose.change["difference_ci95"] is None
    undefined = Score("t", "m", "f", math.nan, None, 3)
    assert undefined.to_json()["value"] is None
    assert undefined.name == "m,f"
    assert math.isnan(Score.of(undefined.fields()).value)
