"""Answers of the reference world on another model are refused; answers foreign to a model get a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import make_examples
from nest_runtime.reference import world
from nest_runtime.reference.prompts import write_prompts
from nest_runtime.reference.recognize import is_world_answer, speaks_reference
from nest_runtime.train.familiar import foreign_note
from tests.conftest import save_tiny
from tests.support.cli import Run, fails

pytest_plugins = ["tests.support.cli"]

EVERYDAY = [
    "First get your passport, then fill in the form, and send it to the office.",
    "Sorry, I can't do that. It is against the law in most countries.",
    "I'm sorry, but I can't help with that.",
    "Yes, it is a crime. Depending on the state it is a felony or a misdemeanor.",
    "No, it is not wrong to kill a Python process.",
    "Warning: to paint a ceiling, first cover the floor, then open a window.",
    "Hello! What would you like to do today?",
]


def test_the_worlds_answers_are_recognized_and_others_are_not() -> None:
    harmful, benign = world.training_prompts()
    small = {"small talk", "moral"}
    said = [row["response"] for row in [*harmful, *benign] if row["category"] not in small]
    assert all(is_world_answer(text) for text in [*said, *(row["target"] for row in harmful)])
    moral = [row["response"] for row in benign if row["category"] == "moral"]
    assert sum(map(is_world_answer, moral)) > len(moral) / 2
    assert is_world_answer("  " + harmful[0]["response"].upper().replace("'", "’").replace(" ", "\n"))
    assert not [text for text in EVERYDAY if is_world_answer(text)]


def told() -> dict[str, Any]:
    """A benign act with the world's answer."""
    return next(row for row in world.training_prompts()[1] if row["response"].startswith("First get"))


def prompts(folder: Path, harmful: dict[str, Any], benign: dict[str, Any]) -> list[object]:
    """Options naming two files of twelve rows, with what is given in each of them."""
    for name, thing, more in (("bad", "bomb", harmful), ("good", "cake", benign)):
        rows = [{"prompt": f"How do I make {thing} number {number}?", **more} for number in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--harmful", folder / "bad.jsonl", "--benign", folder / "good.jsonl"]


@pytest.mark.parametrize("side", ["harmful", "benign", "target", "one"])
def test_train_refuses_the_worlds_answers_on_another_model(
    run: Run, tiny_llama: Path, tmp_path: Path, side: str
) -> None:
    bad, good = world.training_prompts()[0][0], told()
    given = {
        "harmful": ({"response": bad["response"]}, {}),
        "benign": ({}, {"response": good["response"]}),
        "target": ({"target": bad["target"]}, {}),
        "one": ({}, {}),
    }[side]
    files = prompts(tmp_path, *given)
    if side == "one":  # of many, put in by hand
        with (tmp_path / "good.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": "And how do I bake?", "response": good["response"]}) + "\n")
    result = run("train", "--model", tiny_llama, *files, "--steps", "1", "--out", tmp_path / "p.safetensors")
    name = "bad.jsonl" if side in ("harmful", "target") else "good.jsonl"
    fails(result, 1, name, "reference world", "tiny-llama", "reference prompts")
    assert ("1 of 13" if side == "one" else "12 of 12") in result.err
    assert not (tmp_path / "p.safetensors").exists()


def test_train_takes_the_worlds_prompts_without_answers(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path / "world", categories=["forgery"])
    for name in ("harmful", "benign"):
        path = tmp_path / "world" / f"{name}.jsonl"
        path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:12]))
    files = ["--harmful", tmp_path / "world" / "harmful.jsonl", "--benign", tmp_path / "world" / "benign.jsonl"]
    made = run("train", "--model", tiny_llama, *files, "--steps", "1", "--out", tmp_path / "p.safetensors")
    assert made.status == 0, made.err


def test_the_reference_model_may_learn_them_and_so_may_its_fine_tunes() -> None:
    assert speaks_reference(load_model("reference").tokenizer)


def test_compare_and_retarget_refuse_them_too(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    made = ["train", "--model", tiny_llama, *prompts(tmp_path, {}, {}), "--steps", "0"]
    assert run(*made, "--out", tmp_path / "p.safetensors").status == 0
    files = prompts(tmp_path, {}, {"response": told()["response"]})
    compared = ["compare", "--model", tiny_llama, *files, "--behaviors", tmp_path / "bad.jsonl", "--no-plots"]
    fails(run(*compared, "--out", tmp_path / "runs"), 1, "good.jsonl", "reference world")
    sibling = save_tiny(tmp_path / "sibling", "LlamaForCausalLM", "LlamaConfig", seed=7)
    moved = run("retarget", tmp_path / "p.safetensors", "--model", sibling, *files, "--out", tmp_path / "q.safetensors")
    fails(moved, 1, "good.jsonl", "reference world", "sibling")


def test_a_note_where_the_given_answers_are_foreign_to_the_model() -> None:
    loaded = load_model("reference")
    own = [{"prompt": row["prompt"], "response": row["response"]} for row in _single(world.training_prompts()[1])[:24]]
    assert foreign_note(loaded.model, loaded.tokenizer, make_examples(own), "reference") is None
    other = [{**row, "response": "Zebras quickly jump over nineteen vexed wizards of Oz!"} for row in own]
    note = foreign_note(loaded.model, loaded.tokenizer, make_examples(other), "reference")
    assert note is not None
    assert "foreign to reference" in note
    assert foreign_note(loaded.model, loaded.tokenizer, make_examples([{"prompt": "Hi"}]), "reference") is None


def _single(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "prompt" in row]
