"""Recovery rows: a refusal learned after the beginning of a harmful answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import examples_digest, make_examples
from nest_runtime.prompts.generate import end_token_ids
from nest_runtime.reference.world import training_prompts
from nest_runtime.train.batches import make_row, recovery_row
from nest_runtime.train.pipeline import train_patch
from tests.support.train import QUICK, REFUSAL, benign_examples

TARGET = "Sure, first take a sheet of paper and then a pen."


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def examples(target: str | None = TARGET) -> list[Any]:
    rows = [
        {"prompt": f"How do I forge a {word}?", "response": REFUSAL}
        for word in ("coin", "visa", "deed", "stamp", "will")
    ]
    return make_examples([row | ({"target": target} if target is not None else {}) for row in rows], "harmful")


def test_the_beginning_of_the_target_is_read_and_the_refusal_learned(loaded: Any) -> None:
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    for example in examples():
        row = make_row(loaded.tokenizer, example, REFUSAL, True, ends)
        recovery = recovery_row(loaded.tokenizer, example, row, 4)
        assert recovery is not None
        assert recovery.answer == row.answer
        assert recovery.harmful
        assert recovery.prompt[: len(row.prompt)] == row.prompt
        begun = recovery.prompt[len(row.prompt) :]
        assert 1 <= len(begun) <= 4
        assert TARGET.startswith(loaded.tokenizer.decode(begun))
        assert recovery == recovery_row(loaded.tokenizer, example, row, 4)


@pytest.mark.parametrize(("target", "most"), [(None, 4), ("  ", 4), (TARGET, 0)])
def test_no_recovery_without_a_target_or_when_switched_off(loaded: Any, target: str | None, most: int) -> None:
    example = examples(target)[0]
    row = make_row(loaded.tokenizer, example, REFUSAL, True, end_token_ids(loaded.model, loaded.tokenizer))
    assert recovery_row(loaded.tokenizer, example, row, most) is None


def test_targets_count_in_the_data_digest_and_in_training(loaded: Any) -> None:
    def train(target: str | None) -> Any:
        return train_patch(
            loaded.model,
            loaded.tokenizer,
            examples(target),
            benign_examples(5),
            recipe=QUICK,
            name="tiny",
            version="v1",
            base_hash="sha256:" + "0" * 64,
            base_model="tiny",
        )

    assert examples_digest(examples()) != examples_digest(examples(None))
    with_target, without = train(TARGET), train(None)
    assert with_target.report["rows"]["train"] > without.report["rows"]["train"]
    assert with_target.patch.digest != without.patch.digest


def test_the_reference_world_brings_targets_of_train_acts_only() -> None:
    harmful, benign = training_prompts()
    assert all(row["target"].startswith("Warning:") and row["act"] in row["target"] for row in harmful)
    assert not any("target" in row for row in benign)
