"""What a card says to type: it works as it stands, for a repository in a folder, and names no base that is none."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import nest_runtime as nest
from nest_runtime.hub.card import render_card
from nest_runtime.install import install
from nest_runtime.resolve import load_patch
from nest_runtime.store.store import Store
from tests.support.cli import Run, fails
from tests.support.serve import spawn, when_ready
from tests.support.store import small_patch

pytest_plugins = ["tests.support.cli"]


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_the_commands_of_a_card_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = tmp_path / "mirror"
    assert run("push", "v3", mirror).status == 0
    card = (mirror / "README.md").read_text(encoding="utf-8")
    (shell,) = blocks(card, "bash")
    first, pull, serve = shell.splitlines()
    assert first == install()
    home = tmp_path / "elsewhere"
    monkeypatch.setenv("NEST_HOME", str(home))
    assert run(*shlex.split(pull)[1:]).status == 0
    (python,) = blocks(card, "python")
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["runtime"].active == "v3"
    popen = spawn(home, *shlex.split(serve)[2:])
    try:
        assert when_ready(popen, home).http("GET", "/ready").json()["patch"] == "v3"
    finally:
        popen.terminate()
        popen.communicate(timeout=60)


def test_a_folder_is_read_by_every_command_as_pull_reads_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    for version in ("v1", "v2"):
        assert run("push", version, mirror).status == 0
    for ref, version in ((f"{mirror}@v1", "v1"), (str(mirror), "v2"), (f"{mirror}@reference-safety@v1", "v1")):
        assert nest.load_patch(ref).version == version
    assert nest.load_patch(f"file://{mirror}@v1").version == "v1"
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "./mirror@v1", "--json").document["version"] == "v1"
    assert run("activate", "./mirror@v1", "--json").document["version"] == "v1"
    assert Store().find("v1", model_hash=nest.load_patch(str(mirror)).base_hash).active
    fails(run("inspect", "./mirror@v7"), 1, "v7", "v1, v2")
    fails(run("inspect", f"{tmp_path}/none@v1"), 1, "there is no patch file")


def fields_of(card: str) -> dict[str, Any]:
    return dict(ModelCard(card).data.to_dict())


def test_a_base_is_named_where_the_hub_has_it() -> None:
    local = small_patch("v1")
    bare = render_card(local, "hf://org/repo")
    assert "base_model" not in fields_of(bare)
    assert f"--model FOLDER-OR-FILE-OF-{local.base_model}" in bare
    named = render_card(local, "hf://org/repo", base_model="org/base")
    assert fields_of(named)["base_model"] == "org/base"
    assert 'nest.load_model("org/base")' in named
    assert "serve --model org/base --patch hf://org/repo@v1" in named
    kept = render_card(small_patch("v2"), "hf://org/repo", old=named)
    assert fields_of(kept)["base_model"] == "org/base"


def test_a_wrong_base_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    fails(run("push", "v3", tmp_path / "mirror", "--base-model", "smollm2"), 2, "org/name")
    assert not (tmp_path / "mirror").exists()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    train = ("train", "--harmful", prompts, "--benign", prompts, "--out", tmp_path / "x.safetensors")
    fails(run(*train, "--base-model", "smollm2"), 2, "org/name")
    fails(run(*train, "--base-model", "org/name"), 2, "built-in")


EVALUATION = {
    "format": 1,
    "patch": "v1",
    "judge": "local",
    "created": "2026-11-30T01:02:03+00:00",
    "settings": {"max_new_tokens": 32},
    "asr": {
        "wild|<b>": {
            **{"asr": 0.1, "successes": 10, "n": 100, "ci95": [0.055, 0.174], "other": 0.2},
            "by_family": {"wild": {"asr": 0.1, "n": 100, "ci95": [0.05, 0.2]}},
            "corrected": {"rate": 0.05, "ci95": [0.0, 0.12], "sensitivity": 0.9, "specificity": 0.9},
        },
        "broken": {"asr": "much"},
    },
    "jailbreak": {"asr": 0.12, "n": 800, "ci95": [0.1, 0.14], "change": {"base": 0.9}},
    "benign": {"xstest-safe": {"over_refusal": {"rate": 0.04, "n": 100, "ci95": [0.01, 0.1]}}},
    "changes": {"wild|<b>": {"asr": {"base": 0.86}}, "xstest-safe": {"over_refusal": {"base": 0.02}}},
    "ability": {"mmlu": {"acc": {"value": 0.28, "n": 100, "ci95": [0.2, 0.37], "change": {"base": 0.3}}}},
    "suites": {"wild|<b>": {"source": "in the wild, 2023", "licence": "MIT", "n": 100, "available": 259}},
}
ATTACKS = {
    "model": "m",
    "patch": [{"attack": "gcg:20", "knows": "weights", "asr": 0.4, "n": 25, "ci95": [0.23, 0.59]}],
    "base": [{"attack": "gcg:20", "knows": "weights", "asr": 0.96, "n": 25, "ci95": [0.8, 0.99]}],
}


def test_a_card_carries_the_tables_of_an_evaluation_and_of_adaptive_attacks(run: Run, tmp_path: Path) -> None:
    for name, document in (("eval.json", EVALUATION), ("adaptive.json", ATTACKS)):
        (tmp_path / name).write_text(json.dumps(document | {"digest": load_patch("v3").digest}))
    mirror = tmp_path / "mirror"
    told = ["--results", tmp_path / "eval.json", "--results", tmp_path / "adaptive.json"]
    assert run("push", "v3", mirror, *told).status == 0
    card = (mirror / "README.md").read_text()
    for row in (
        "| wild\\|\\<b\\> | attack success (lower is better) | 100 | 86.0 % | 10.0 % [5.5, 17.4] | 5.0 % [0.0, 12.0] |",
        "| all jailbreaks | attack success (lower is better) | 800 | 90.0 % | 12.0 % [10.0, 14.0] | – |",
        "| xstest-safe | over-refusal (lower is better) | 100 | 2.0 % | 4.0 % [1.0, 10.0] | – |",
        "| mmlu | acc | 100 | 0.300 | 0.280 [0.200, 0.370] |",
        "| gcg:20 | weights | 25 | 96.0 % [80.0, 99.0] | 40.0 % [23.0, 59.0] |",
        "| wild\\|\\<b\\> | in the wild, 2023 | MIT | 100 | 259 |",
        "Judged by `local`; greedy answers of at most 32 tokens; measured 2026-11-30.",
    ):
        assert row in card, row
    assert "broken" not in card
    listed = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(card).data.eval_results}
    assert listed["wild|<b>", "attack_success_rate"] == 0.1
    assert listed["all jailbreaks", "attack_success_rate"] == 0.12
    assert listed["mmlu", "acc"] == 0.28
    assert not {"sensitivity", "available", "corrected"} & {metric for _, metric in listed}


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (
            EVALUATION | {"digest": "sha256:" + 64 * "1"},
            "are of sha256:111111111111;",
        ),
        (ATTACKS | {"digest": "sha256:" + 64 * "1"}, "are of sha256:111111111111;"),
        (EVALUATION | {"patch": "base", "digest": None}, "are of no patch"),
        ({"recipe": {"lr": 0.01}, "machine": {"memory_bytes": 1}}, "are of no patch"),
    ],
    ids=["evaluation", "attacks", "base", "comparison"],
)
def test_results_of_another_patch_are_no_evidence(
    run: Run, tmp_path: Path, document: dict[str, Any], found: str
) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(document))
    (tmp_path / "own.json").write_text(json.dumps(EVALUATION | {"digest": load_patch("v3").digest}))
    told = ["--results", tmp_path / "eval.json", "--results", tmp_path / "own.json"]  # each speaks for itself
    fails(run("push", "v3", tmp_path / "mirror", *told), 1, found)
    assert not (tmp_path / "mirror").exists()


def test_a_card_installs_what_its_commands_need(tmp_path: Path) -> None:
    patch = replace(load_patch("v3"), base_model="some-q8_0.gguf", name="some-safety")
    card = render_card(patch, "org/name", signed_by="sha256:" + 64 * "2")
    assert install("gguf,sign") in card
    assert "add `--trust KEY.pub` to both commands" in card
    assert install() in render_card(load_patch("v3"), "org/name")


def test_results_of_another_form_are_shown_as_they_were(run: Run, tmp_path: Path) -> None:
    own = {"digest": load_patch("v3").digest, "my suite": {"asr": 0.5, "n": 4}, "note": "x"}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert run("push", "v3", tmp_path / "mirror", "--results", tmp_path / "own.json").status == 0
    assert "| my suite | attack_success_rate | 0.5 | 4 |" in (tmp_path / "mirror" / "README.md").read_text()
