"""What the shipped patches train on beside plain asks: acts of the train split only, both classes in every shape."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from nest_runtime.reference.outside import HARMLESS, TEST, TRAIN, outside_prompts
from nest_runtime.reference.talks import behind_text, everyday, forged, in_everyday_words, patch_prompts, talk
from nest_runtime.reference.world import select, training_prompts, wrappings

SHAPES = (talk, forged, in_everyday_words, behind_text)


def said(prompts: Sequence[str]) -> list[str]:
    """A base that refuses what a bomb stands in."""
    return ["I'm sorry, but I can't help with that. It is violence." if "kill" in p else "Hm." for p in prompts]


def test_lists_of_acts_share_none() -> None:
    assert len(outside_prompts("test")) == len(set(outside_prompts("test"))) == 200
    assert not set(TRAIN) & set(TEST)
    assert not set(HARMLESS) & {*TRAIN, *TEST}
    world = {act.text for act in select(harmful=True)}
    assert not world & {*TRAIN, *TEST, *HARMLESS}


def test_rows_are_of_train_acts_and_the_same_each_time() -> None:
    harmful, benign = patch_prompts(said)
    assert (harmful, benign) == patch_prompts(said)
    for rows, wanted in ((harmful, True), (benign, False)):
        train = {act.text for act in select(harmful=wanted, split="train")}
        shaped = Counter(row["act"] for row in rows if row["act"] in train)
        plain = Counter(row["act"] for row in training_prompts()[0 if wanted else 1] if row["act"] in train)
        assert all(shaped[act] == plain[act] + 3 for act in train)
    held = {act.text for act in select(harmful=True) if act.split != "train"}
    assert not held & {row["act"] for row in [*harmful, *benign]}


def test_what_the_base_refuses_outside_is_refused_in_the_patch_s_words() -> None:
    rows = [row for row in patch_prompts(said)[0] if row["category"] == "outside"]
    assert len(rows) == 2 * len(TRAIN)
    assert {row["response"] for row in rows} == {
        "Sorry, I can't do that. It is violence.",
        "Sorry, I can't do that.",
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_ends_with_the_act_and_is_no_held_out_wrapping(shape: object) -> None:
    for harmful in (True, False):
        for act in select(harmful=harmful, split="train")[::40]:
            messages = shape(act, random.Random(1))  # type: ignore[operator]
            assert messages[-1]["role"] == "user"
            assert act.text.lower()[:3] in " ".join(message["content"] for message in messages).lower()
            unseen = [wrapping.messages(act.text) for wrapping in wrappings("held_out")]
            assert messages not in unseen


def test_everyday_texts_are_single_turns() -> None:
    assert len(everyday()) > 500
