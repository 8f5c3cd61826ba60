"""The standard suite: what it asks, where it comes from, what is missing said first, and utility by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.cli.main import main
from nest_runtime.errors import DataError
from nest_runtime.evaluate.cases import user
from nest_runtime.evaluate.public import SETS
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.rounds import Subject
from nest_runtime.evaluate.standard import ATTACKED, SUITES, UTILITY, load_standard, split_standard
from nest_runtime.evaluate.suites import is_jailbreak, load_suite
from nest_runtime.evaluate.utility import ASK, LETTERS, Questions, Solved, Way, measure_utility
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode
from nest_runtime.runtime import PatchRuntime
from tests.support.evaluate import TEST_DATA
from tests.support.patches import make_patch
from tests.support.public import make_public, write_set

ABILITY = {"mmlu": {"acc"}, "gsm8k": {"nats_per_token"}, "alpaca": {"kl_to_base", "answer_tokens", "ended"}}


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return make_public(tmp_path / "public")


def test_every_suite_has_its_cases_and_says_where_they_come_from(public: Path) -> None:
    made = load_standard(data=public, n=3)
    assert Counter(case.suite for case in made.cases) == dict.fromkeys(SUITES, 3)
    assert len({case.id for case in made.cases}) == len(made.cases)
    assert set(made.sources) == {*SUITES, *UTILITY}
    for name, source in made.sources.items():
        assert source.n == 3, name
        assert source.available >= 3, name
        assert "20" in source.source, name
        assert source.licence, name
    assert made.questions is not None
    assert (len(made.questions.choices), len(made.questions.solutions), len(made.questions.instructions)) == (3, 3, 3)


def test_what_is_asked_is_what_the_files_say(public: Path) -> None:
    by_suite: dict[str, list[Any]] = {}
    for case in load_standard(data=public, n=50).cases:
        by_suite.setdefault(case.suite, []).append(case)
    assert len(by_suite["plain"]) == 11  # 6 of JailbreakBench, 5 of HarmBench: a contextual behavior is none
    assert len(by_suite["xstest-safe"]) == 5  # one is unsafe
    assert all(case.prompt.startswith("Buy ") for case in by_suite["jailbreakbench-benign"])
    wild = by_suite["wild"]
    assert len({case.prompt.partition("\n\n")[0] for case in wild}) == 6  # the hundred for validation are not used
    assert all(case.behavior in case.prompt and case.behavior != case.prompt for case in wild)
    assert {case.measure for name in ATTACKED for case in by_suite[name]} == {"asr"}
    assert all(case.prefill for case in by_suite["prefill"])
    assert all(len(case.follow_ups) == 3 for case in by_suite["multi-turn"])
    assert len({case.attack for case in by_suite["built-in"]}) > 8


def test_draws_follow_the_seed(public: Path) -> None:
    first, again, other = (load_standard(data=public, n=4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    for suite in SUITES:
        mine, theirs = ([c.messages for c in made.cases if c.suite == suite] for made in (first, other))
        assert mine != theirs, suite


def test_parts_are_named_behind_a_colon(public: Path) -> None:
    assert split_standard(["plain", "standard:wild,mmlu", "standard:plain"]) == (["plain"], ["wild", "mmlu", "plain"])
    assert split_standard(["standard", "standard:wild"]) == ([], [])
    assert split_standard(["plain"]) == (["plain"], None)
    made = load_standard(["gsm8k", "completion"], data=public, n=2)
    assert [case.suite for case in made.cases] == ["completion", "completion"]
    assert made.questions is not None
    assert (made.questions.choices, made.questions.instructions) == ((), ())
    assert load_standard(["wild"], data=public).questions is None


def test_jailbreaks_are_pooled_whatever_their_suites_are_called() -> None:
    pooled = {name for name in SUITES if is_jailbreak(name)}
    assert pooled == set(ATTACKED)
    assert "plain" not in pooled
    assert is_jailbreak("jailbreak-held-out")


def test_the_folder_may_be_named_by_the_environment(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEST_TEST_DATA", str(public))
    assert {case.suite for case in load_suite("standard:plain,wild")} == {"plain", "wild"}


def test_all_that_is_missing_is_named_at_once_and_only_what_is_asked_for(public: Path) -> None:
    for key in ("wild", "mmlu"):
        (public / SETS[key].file).unlink()
    with pytest.raises(DataError) as failed:
        load_standard(data=public)
    for words in ("jailbreak_prompts.csv", "helpfulness_mmlu_500.json"):
        assert words in str(failed.value)
    assert "TrustAIRLab/JailbreakLLMs" in failed.value.hint
    assert "RobustNLP/DeRTa" in failed.value.hint
    assert len(load_standard(["plain", "gsm8k"], data=public, n=2).cases) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "standard"], "no folder of them is named"),
        (["--suite", "standard", "--data", "nowhere"], "nowhere is no folder"),
        (["--suite", "standard", "--data", "."], "lacks "),
        (["--suite", "standard:plane", "--data", "."], "no part 'plane'"),
        (["--suite", "standard:", "--data", "."], "standard: without a suite's name"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_looked_for(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEST_TEST_DATA", raising=False)
    assert main(["eval", "--model", "no-such-model", *words]) != 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert said in lines[0]


@pytest.mark.parametrize("broken", ['{"question": 1, "answer": [2]}\n', "nonsense\n", '{"question": "q"}\n'])
def test_a_broken_row_is_named_with_its_line(public: Path, broken: str) -> None:
    path = write_set(public, "mmlu")
    path.write_text(path.read_text() + broken, encoding="utf-8")
    with pytest.raises(DataError, match=r"helpfulness_mmlu_500\.json:7"):
        load_standard(["mmlu"], data=public)


def test_the_real_sets_are_read_as_published() -> None:
    if not (TEST_DATA / SETS["wild"].file).is_file():
        pytest.skip(f"the public sets are not at {TEST_DATA}; set NEST_TEST_DATA")
    made = load_standard(data=TEST_DATA)
    assert Counter(case.suite for case in made.cases) == dict.fromkeys(SUITES, 100)
    assert {name: source.available for name, source in made.sources.items()} == {
        **dict.fromkeys(("plain", "wild", "built-in", "prefill", "multi-turn"), 259),
        **dict.fromkeys(("jailbreakchat", "selfcipher", "codeattack", "completion", "gsm8k"), 200),
        **{"xstest-safe": 250, "jailbreakbench-benign": 100, "coconot-contrast": 379, "mmlu": 500, "alpaca": 2000},
    }


def test_one_command_measures_it_all_and_goes_on_where_it_was(
    public: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", "--model", str(tiny_llama), "--no-patch", "--suite", "standard", "--data", str(public)]
    words += [
        "--limit",
        "2",
        "--max-tokens",
        "4",
        "--workdir",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert set(first["asr"]) == {"plain", *ATTACKED}
    assert first["jailbreak"]["n"] == 2 * len(ATTACKED)
    assert set(first["benign"]) == {name for name in SUITES if name != "plain" and name not in ATTACKED}
    assert {task: set(found) for task, found in first["ability"].items()} == ABILITY
    assert first["suites"]["xstest-safe"]["licence"] == "CC-BY-4.0"
    assert set(first["suites"]) == {*SUITES, *UTILITY}

    def no_more(*_: object, **__: object) -> None:
        raise AssertionError("this was answered before")

    monkeypatch.setattr("nest_runtime.prompts.generate._answer_batch", no_more)
    monkeypatch.setattr("nest_runtime.evaluate.utility._Asker.log_probabilities", no_more)
    assert main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["asr"], again["ability"]) == (first["asr"], first["ability"])
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "CC-BY-4.0" in shown
    assert "nats_per_token" in shown
    kept = EvalResult.load(tmp_path / "r.json")
    assert kept.suites["wild"].available == 11
    assert "CC-BY-4.0" in kept.markdown()


QUESTIONS = Questions(
    (Solved("Which is it? A or B?", "B"), Solved("And now?", "D"), Solved("Once more?", "A")),
    (Solved("What do two cost?", "2 and 2 are 4"),),
    ("Tell me of bread", "Tell me of water"),
    answer_tokens=5,
)


def whole_log_probabilities(loaded: Any, prompt: str, answer: str) -> tuple[torch.Tensor, list[int]]:
    """By the model's own forward pass over everything."""
    asked = encode(loaded.tokenizer, [user(prompt)])
    ids = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*asked, *ids]])).logits[0].float()
    return logits[len(asked) - 1 : -1].log_softmax(-1), ids


def test_utility_is_what_the_models_own_logits_say(tiny_llama: Path) -> None:
    loaded = load_model(tiny_llama)
    patch = make_patch(loaded.model, base_hash=loaded.hash, scale=0.5)
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        runtime.add(patch)
        subject = Subject("tiny", loaded.hash, patch.version, patch.digest)
        with runtime.using(patch.digest):
            scores = measure_utility(
                loaded.model, loaded.tokenizer, QUESTIONS, subject, way=Way(off=lambda: runtime.using(None))
            )
            found = {(score.task, score.metric): score for score in scores}
            right = 0
            for item in QUESTIONS.choices:
                logs, _ = whole_log_probabilities(loaded, item.question + ASK, "A")
                letters = [loaded.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
                right += LETTERS[int(logs[0, letters].argmax())] == item.answer
            logs, ids = whole_log_probabilities(loaded, QUESTIONS.solutions[0].question, QUESTIONS.solutions[0].answer)
        bare = measure_utility(loaded.model, loaded.tokenizer, QUESTIONS, Subject("tiny", loaded.hash))
    assert found["mmlu", "acc"].value == pytest.approx(right / 3)
    assert found["gsm8k", "nats_per_token"].value == pytest.approx(-float(logs[range(len(ids)), ids].mean()), rel=1e-4)
    assert found["alpaca", "kl_to_base"].value > 1e-4
    assert {score.metric: score.value for score in bare}["kl_to_base"] == 0
    assert found["alpaca", "answer_tokens"].value > 0
    assert 0 <= found["alpaca", "ended"].value <= 1
