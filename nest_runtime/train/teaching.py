"""What training teaches: refusals to the harmful examples of a mix, the base's or given answers to the benign ones.

Rows are made with the examples they come from. The base's answers come from the caller (run.py keeps them).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.prompts.examples import Example
from nest_runtime.prompts.generate import ModelAnswer
from nest_runtime.train.batches import Row, make_row, probe_row, recovery_row, refusal_for
from nest_runtime.train.mix import Mix, benign_mix, harmful_mix, hold_out
from nest_runtime.train.recipe import Recipe

ASKED = 24  # harmful prompts that show how a base refuses
OWN_SHARE = 0.2  # of them that it must refuse for its words to be taken
Answers = Callable[..., list[ModelAnswer]]  # (examples, beginnings that no answer may have)
ENDINGS = tuple(".!?…。！？»”’\"')]}>`*|:;~")  # how a text ends that was not cut


@dataclass(frozen=True)
class Teaching:
    """Everything tuning learns from.

    Attributes:
        harmful, benign: the mixes; benign examples bear the answers to learn as their response.
        train, validation: their token rows, harmful ones first, recovery rows and probes last.
        refused: benign examples left out because the base refuses them; ``empty`` because it says nothing.
        answered: benign examples that the base refuses, learned with what it says where it may not begin so.
    """

    harmful: Mix
    benign: Mix
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    refused: tuple[Example, ...] = ()
    answered: tuple[Example, ...] = ()
    empty: tuple[Example, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a user should know of the benign prompts."""
        notes = []
        if self.refused:
            first = self.refused[0].prompt[:60]
            notes.append(
                f"the base refuses {len(self.refused)} of the benign prompts, which were left out, first {first!r}; "
                "keep_refused in the recipe learns those refusals too"
            )
        if self.answered:
            notes.append(
                f"the base refuses {len(self.answered)} more benign prompts, which are learned with what it answers "
                "where it may not begin as it refuses (answer_refused in the recipe)"
            )
        if self.empty:
            notes.append(f"the base answers {len(self.empty)} of the benign prompts with nothing; they were left out")
        return notes


def teach(
    tokenizer: Any,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    rehearsal: Sequence[Example],
    settings: Recipe,
    ends: Sequence[int],
    answers: Answers,
) -> Teaching:
    """Mix, answer, and make rows.

    Args:
        tokenizer: the model's.
        harmful, benign: as the user gave them; responses count where given.
        rehearsal: earlier harmful prompts, to tune on besides.
        settings: the recipe.
        ends: the model's end tokens.
        answers: the base's answers to examples without a response; called with texts too, answers that begin with
            none of those texts' first tokens.

    Raises:
        DataError: no benign prompt is left that the base answers.
    """
    bad = harmful_mix(tokenizer, harmful, settings)
    good = benign_mix(tokenizer, benign, settings, hold_out(harmful, settings, 1)[0])
    pairs = _answered([*good.train, *good.held], answers)
    refused = [] if settings.keep_refused else [(e, answer) for e, answer in pairs if _refuses(e, answer)]
    otherwise = _otherwise(refused, answers) if settings.answer_refused else []
    empty = [example for example, answer in pairs if not answer.text.strip()]
    answered = {id(example) for example, _ in otherwise}
    left = [example for example, _ in refused if id(example) not in answered]
    out = {id(example) for example in [*left, *empty]}
    known = {id(example): answer for example, answer in [*pairs, *otherwise] if id(example) not in out}
    if not any(id(example) in known for example in good.train):
        raise DataError(
            f"the base answers none of the {len(good.train)} benign prompts: it refuses {len(left)} and says "
            f"nothing to {len(empty)}",
            "give benign prompts that it answers, or their responses in the file",
        )

    def rows_of(examples: Sequence[Example]) -> list[Row]:
        return [
            make_row(
                tokenizer,
                example,
                answer.text,
                False,
                ends,
                answer.whole,
                bool(example.response) or id(example) in answered,
            )
            for example in examples
            if (answer := known.get(id(example))) is not None
        ]

    learned = [*bad.train, *rehearsal]
    refusals = [refusal_row(tokenizer, example, settings, ends) for example in learned]
    recoveries = [
        row
        for example, own in zip(learned, refusals, strict=True)
        if (row := recovery_row(tokenizer, example, own, settings.recovery_tokens)) is not None
    ]
    held_refusals = [refusal_row(tokenizer, example, settings, ends) for example in bad.held]
    held_answers = rows_of(good.held)
    return Teaching(
        harmful=bad,
        benign=Mix(_with(good.train, known), _with(good.held, known), good.located),
        train=(*refusals, *rows_of(good.train), *recoveries),
        validation=(*held_refusals, *held_answers, *(probe_row(row, refusals[0]) for row in held_answers)),
        refused=tuple(left),
        answered=tuple(example for example, _ in otherwise),
        empty=tuple(empty),
    )


def _otherwise(refused: Sequence[tuple[Example, ModelAnswer]], answers: Answers) -> list[tuple[Example, ModelAnswer]]:
    """Examples that the base refuses, with its likeliest answer that does not begin as any of those refusals."""
    if not refused:
        return []
    beginnings = sorted({answer.text.split()[0] for _, answer in refused})
    again = answers([example for example, _ in refused], beginnings)
    found = zip([example for example, _ in refused], again, strict=True)
    return [(e, answer) for e, answer in found if answer.text.strip() and not _refuses(e, answer)]


def own_refusals(answers: Sequence[ModelAnswer]) -> tuple[str, ...]:
    """The sentence that most of a base's refusals begin with; none where it refuses too few of the prompts.

    Args:
        answers: the base's, to some harmful prompts.
    """
    from nest_runtime.prompts.refusals import is_refusal

    refused = [_first_sentence(answer.text) for answer in answers if is_refusal(answer.text)]
    if len(refused) < OWN_SHARE * len(answers) or not refused:
        return ()
    return (Counter(refused).most_common(1)[0][0],)


def _first_sentence(text: str) -> str:
    found = re.match(r".+?[.!?](?=\s|$)", text.strip(), flags=re.DOTALL)
    return found[0] if found else text.strip()


def refusal_row(tokenizer: Any, example: Example, settings: Recipe, ends: Sequence[int]) -> Row:
    """A harmful example's row: its own response, or a refusal of the recipe's list."""
    return make_row(tokenizer, example, refusal_for(example, settings.refusals), True, ends)


def is_whole(text: str) -> bool:
    """Whether a given response ends like a finished text; one that was cut must not teach the model to end there."""
    return text.rstrip().endswith(ENDINGS)


def _answered(examples: Sequence[Example], answers: Answers) -> list[tuple[Example, ModelAnswer]]:
    """Each example with its own response, or the base's answer."""
    missing = [example for example in examples if not example.response]
    made = iter(answers(missing) if missing else [])
    return [
        (example, ModelAnswer(example.response, is_whole(example.response)) if example.response else next(made))
        for example in examples
    ]


def _refuses(example: Example, answer: ModelAnswer) -> bool:
    from nest_runtime.prompts.refusals import is_refusal

    return not example.response and is_refusal(answer.text)


def _with(examples: Sequence[Example], known: dict[int, ModelAnswer]) -> tuple[Example, ...]:
    return tuple(replace(example, response=known[id(example)].text) for example in examples if id(example) in known)
