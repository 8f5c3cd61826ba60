"""What training teaches: refusals to the harmful examples of a mix, the base's or given answers to the benign ones.

Every row is made with the example that it comes from. The base's answers come from the caller (run.py keeps them).
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
from nest_runtime.train.batches import Row, make_row, probe_row, recovery_row, refusal_for, rival_row
from nest_runtime.train.mix import Mix, benign_mix, harmful_mix, hold_out
from nest_runtime.train.recipe import Recipe

ASKED = 24  # harmful prompts that show how a base refuses
OWN_SHARE = 0.2  # of them that it must refuse for its words to be taken
Answers = Callable[..., list[ModelAnswer]]  # (examples, beginnings that no answer may have)
ENDINGS = tuple(".!?…。！？»”’\"')]}>`*|:;~")  # how a text ends that was not cut


@dataclass(frozen=True)
class Lesson:
    """A benign example, and the answer that it teaches.

    Attributes:
        example: as it is asked; its response where it brings one.
        held: whether it is for validation.
        answer: its own response, or the base's answer.
        otherwise: the base refuses it, and this is what it says where it may not begin so.
    """

    example: Example
    held: bool
    answer: ModelAnswer
    otherwise: bool = False

    @property
    def is_refused(self) -> bool:
        """Whether the answer is a refusal of the base's own."""
        from nest_runtime.prompts.refusals import is_refusal

        return not self.example.response and is_refusal(self.answer.text)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn."""
        return not self.answer.text.strip()

    def row(self, tokenizer: Any, ends: Sequence[int]) -> Row:
        """Its token row."""
        given = bool(self.example.response) or self.otherwise
        return make_row(tokenizer, self.example, self.answer.text, False, ends, self.answer.whole, given)


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
    lessons = _lessons(good, answers)
    if settings.answer_refused and not settings.keep_refused:
        lessons = _answered_otherwise(lessons, answers)
    refused = [] if settings.keep_refused else [lesson for lesson in lessons if lesson.is_refused]
    empty = [lesson for lesson in lessons if lesson.is_empty]
    kept = [lesson for lesson in lessons if not lesson.is_empty and (settings.keep_refused or not lesson.is_refused)]
    trained, held = ([lesson for lesson in kept if lesson.held == part] for part in (False, True))
    if not trained:
        raise DataError(
            f"the base answers none of the {len(good.train)} benign prompts: it refuses {len(refused)} and says "
            f"nothing to {len(empty)}",
            "give benign prompts that it answers, or their responses in the file",
        )

    learned = [*bad.train, *rehearsal]
    refusals = [refusal_row(tokenizer, example, settings, ends) for example in learned]
    recoveries = [
        row
        for example, own in zip(learned, refusals, strict=True)
        if (row := recovery_row(tokenizer, example, own, settings.recovery_tokens)) is not None
    ]
    held_refusals = [refusal_row(tokenizer, example, settings, ends) for example in bad.held]
    held_answers = [lesson.row(tokenizer, ends) for lesson in held]
    return Teaching(
        harmful=bad,
        benign=Mix(_taught(trained), _taught(held), good.located),
        train=(*refusals, *(lesson.row(tokenizer, ends) for lesson in trained), *recoveries),
        validation=(*held_refusals, *held_answers, *(probe_row(row, refusals[0]) for row in held_answers)),
        refused=tuple(lesson.example for lesson in refused),
        answered=tuple(lesson.example for lesson in lessons if lesson.otherwise),
        empty=tuple(lesson.example for lesson in empty),
    )


def _lessons(benign: Mix, answers: Answers) -> list[Lesson]:
    """Each benign example with its own response, or the base's answer; those to train on first."""
    asked = [*((example, False) for example in benign.train), *((example, True) for example in benign.held)]
    missing = [example for example, _ in asked if not example.response]
    made = iter(answers(missing) if missing else [])
    return [
        Lesson(example, held, ModelAnswer(text, is_whole(text)) if (text := example.response) else next(made))
        for example, held in asked
    ]


def _answered_otherwise(lessons: Sequence[Lesson], answers: Answers) -> list[Lesson]:
    """The lessons, those that the base refuses with its likeliest answer that begins as none of those refusals.

    Where that is a refusal too, or nothing, the lesson stays as it was.
    """
    refused = [lesson for lesson in lessons if lesson.is_refused]
    if not refused:
        return list(lessons)
    beginnings = sorted({lesson.answer.text.split()[0] for lesson in refused})
    again = iter(answers([lesson.example for lesson in refused], beginnings))
    found = [replace(lesson, answer=next(again), otherwise=True) if lesson.is_refused else lesson for lesson in lessons]
    return [old if new.is_refused or new.is_empty else new for old, new in zip(lessons, found, strict=True)]


def _taught(lessons: Sequence[Lesson]) -> tuple[Example, ...]:
    return tuple(replace(lesson.example, response=lesson.answer.text) for lesson in lessons)


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
    """A harmful example's row: its own response, or a refusal of the recipe's list; with its rival for a margin.

    Args:
        tokenizer: the model's.
        example: the prompt.
        settings: ``refusals`` and ``margin_weight`` count.
        ends: token ids that end an answer.
    """
    row = make_row(tokenizer, example, refusal_for(example, settings.refusals), True, ends)
    return rival_row(tokenizer, example, row) if settings.margin_weight else row


def is_whole(text: str) -> bool:
    """Whether a given response ends like a finished text; one that was cut must not teach the model to end there."""
    return text.rstrip().endswith(ENDINGS)
