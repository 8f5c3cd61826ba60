"""Which examples training sees: the split comes before the framings, and both classes get the same framings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nest_runtime.errors import DataError
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import Example
from nest_runtime.prompts.generate import ModelAnswer, answer_conversations, end_token_ids
from nest_runtime.train.mix import benign_mix, harmful_mix
from nest_runtime.train.recipe import RECIPES
from nest_runtime.train.teaching import is_whole, own_refusals, teach
from tests.support.train import benign_examples, harmful_examples

RECIPE = RECIPES["default"].evolve(steps=4, batch_size=8, validation_fraction=0.2)


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def bare(examples: list[Example]) -> set[str]:
    return {example.id.partition("::")[0] for example in examples}


def test_no_framing_of_a_held_out_prompt_is_trained_on(loaded: Any) -> None:
    mix = harmful_mix(loaded.tokenizer, harmful_examples(response=None), RECIPE)
    assert not bare(list(mix.train)) & bare(list(mix.held))
    framed = [example for example in mix.train if "::" in example.id]
    assert framed
    assert all(example.prompt.casefold() != "" for example in framed)
    assert {example.id.partition("::")[0] for example in framed} <= bare(list(mix.located))
    assert any("::" in example.id for example in mix.held)  # rewordings that training never uses


def test_benign_examples_are_no_more_than_the_steps_see(loaded: Any) -> None:
    few = RECIPE.evolve(steps=2)
    mix = benign_mix(loaded.tokenizer, benign_examples(response=None), few)
    assert len(mix.train) == round(few.steps * few.batch_size * (1 - few.harmful_share))
    plain = benign_mix(loaded.tokenizer, benign_examples(response=None), RECIPE.evolve(framings=0, code_framings=0))
    assert {example.id for example in plain.train} == {example.id for example in plain.located}


def test_an_answer_given_for_the_bare_question_is_not_put_under_a_framed_one(loaded: Any) -> None:
    mix = benign_mix(loaded.tokenizer, benign_examples(), RECIPE)
    assert all("::" not in example.id or "moved on" in example.id for example in mix.train)


def taught(loaded: Any, answers: Any, **changes: Any) -> Any:
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    recipe = RECIPE.evolve(framings=0, code_framings=0, **changes)
    bad, good = harmful_examples(response=None), benign_examples(response=None)
    return teach(loaded.tokenizer, bad, good, [], recipe, ends, answers)


def test_benign_prompts_that_the_base_refuses_are_left_out_and_said(loaded: Any) -> None:
    def answers(examples: Any) -> list[ModelAnswer]:
        said = [
            "I'm sorry, but I can't assist with that." if index < 3 else "Mix it." for index in range(len(examples))
        ]
        return [ModelAnswer(text, True) for text in said]

    found = taught(loaded, answers, answer_refused=False)
    assert len(found.refused) == 3
    assert "refuses 3 of the benign prompts" in found.notes[0]
    rows = [row for row in (*found.train, *found.validation) if not row.harmful and not row.probe]
    assert len(rows) == 7
    kept = taught(loaded, answers, keep_refused=True)
    assert len([row for row in (*kept.train, *kept.validation) if not row.harmful and not row.probe]) == 10
    with pytest.raises(DataError, match="answers none of the"):
        taught(loaded, lambda examples, _=(): [ModelAnswer("I'm sorry, but I can't.", True)] * len(examples))


def test_benign_prompts_that_the_base_refuses_can_be_learned_with_another_answer(loaded: Any) -> None:
    asked: list[Any] = []

    def answers(examples: Any, beginnings: Any = ()) -> list[ModelAnswer]:
        asked.append((len(examples), list(beginnings)))
        if beginnings:  # one is refused in other words, one gets nothing
            return [
                ModelAnswer("Stir it.", True),
                ModelAnswer("Sorry, I can't help with that.", True),
                ModelAnswer("", True),
            ]
        said = ["I can't assist with that." if index < 3 else "Mix it." for index in range(len(examples))]
        return [ModelAnswer(text, True) for text in said]

    found = taught(loaded, answers, answer_refused=True)
    assert asked == [(10, []), (3, ["I"])]
    assert len(found.answered) == 1
    assert len(found.refused) == 2
    rows = [row for row in (*found.train, *found.validation) if not row.harmful and not row.probe]
    assert sum(row.given for row in rows) == 1
    assert len(rows) == 8
    assert any("answer_refused" in note for note in found.notes)


def test_no_answer_begins_with_a_banned_token(loaded: Any) -> None:
    asked = [[{"role": "user", "content": "Hello."}]]
    (first,) = answer_conversations(loaded.model, loaded.tokenizer, asked, max_new_tokens=1)
    banned = loaded.tokenizer(first.text, add_special_tokens=False)["input_ids"][:1]
    (other,) = answer_conversations(loaded.model, loaded.tokenizer, asked, max_new_tokens=1, not_first=banned)
    assert other.text != first.text


def test_cut_answers_end_nowhere_and_held_benign_prompts_are_probed(loaded: Any) -> None:
    found = taught(loaded, lambda examples: [ModelAnswer("Mix the", False)] * len(examples))
    end = end_token_ids(loaded.model, loaded.tokenizer)[0]
    benign = [row for row in found.train if not row.harmful]
    assert benign
    assert all(end not in row.answer for row in benign)
    probes = [row for row in found.validation if row.probe]
    assert len(probes) == 2
    assert all(len(row.answer) == 3 and not row.harmful for row in probes)


def test_a_given_response_that_stops_in_the_middle_is_known() -> None:
    assert [is_whole(text) for text in ("It is so.", "Ist es so?", "`x = 1`", "and then the", "1, 2,")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_the_bases_own_refusal_is_its_most_frequent_first_sentence() -> None:
    said = ["I'm sorry, but I can't assist with that. Ask again.", "I'm sorry, but I can't assist with that."]
    said += ["I cannot help you.", "Sure! Here is how.", "Sure! Here is how."]
    assert own_refusals([ModelAnswer(text, True) for text in said]) == ("I'm sorry, but I can't assist with that.",)
    assert (
        own_refusals([ModelAnswer("Sure! Here is how.", True)] * 20 + [ModelAnswer("I cannot help you.", True)]) == ()
    )
    assert own_refusals([]) == ()
