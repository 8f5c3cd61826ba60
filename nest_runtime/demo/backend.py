"""What answers in the demo, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nest_runtime.store.entries import Entry

Message = dict[str, str]
OnText = Callable[[str], None]
OnAnswers = Callable[[list[int], list[str]], None]

BASE = "base"
TOY = "a toy that knows one small made-up world, and nothing of ours"  # the reference model


@dataclass(frozen=True)
class PatchChoice:
    """One thing that can answer.

    Attributes:
        label: ``base``, ``v3``, or ``name@v3`` where versions collide.
        digest: of the patch; None for the base.
        shown: what it is called beside an answer, where that is not its label.
    """

    label: str
    digest: str | None = None
    shown: str = field(default="", compare=False)

    @property
    def title(self) -> str:
        """What it is called beside an answer."""
        return self.shown or self.label


@dataclass(frozen=True)
class DemoAnswer:
    """The patch that answered, as the answering side names it, the answer's tokens, and whether it was cut short."""

    label: str
    digest: str | None
    tokens: int
    cut: bool = False


class Backend(Protocol):
    """A model with patches.

    Attributes:
        name: the model's.
        about: what the model is, in a few words: its size, and whether it is a toy; empty if that is not known.
        place: where it runs, for people.
        model_hash: the model's hash, where it is known.
        can_switch: ``activate`` and ``rollback`` can be asked for.
    """

    name: str
    about: str
    place: str
    model_hash: str | None
    can_switch: bool

    def choices(self) -> list[PatchChoice]:
        """What can answer, the base first where it may be asked."""

    def preferred(self) -> PatchChoice | None:
        """The patch to show first, or None if there is none."""

    def answer(
        self,
        messages: Sequence[Message],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_text: OnText,
        stopped: Callable[[], bool],
    ) -> DemoAnswer:
        """Answer a conversation; blocks until the answer is whole. Called from several threads.

        Args:
            messages: the conversation, ending with the user's turn.
            choice: what answers.
            max_tokens: the longest answer.
            on_text: called with pieces of the answer as they come.
            stopped: asked between pieces whether to stop.

        Raises:
            NestError: it cannot answer.
        """

    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_answers: OnAnswers,
    ) -> None:
        """Answer many conversations under one patch; blocks until all are answered.

        Args:
            conversations: each ending with the user's turn.
            choice: who is to answer.
            max_tokens: of each answer.
            on_answers: called with positions and answers as they come; what it raises ends the work.

        Raises:
            NestError: it cannot answer.
        """

    def active(self) -> str | None:
        """Digest of the patch that is active for everybody, if there is one and it may be known."""

    def activate(self, entry: Entry) -> str:
        """Make a stored patch the active one; returns a sentence about it. Raises NestError."""

    def rollback(self) -> str:
        """Go back to the patch that was active before; returns a sentence about it. Raises NestError."""


def size_in_words(parameters: int) -> str:
    """``2.2 million parameters``."""
    for unit, value in (("billion", 1e9), ("million", 1e6)):
        if parameters >= value:
            return f"{parameters / value:.3g} {unit} parameters"
    return f"{parameters:,} parameters"


def find(choices: Sequence[PatchChoice], label: str | None) -> PatchChoice | None:
    """The choice of a label, or None."""
    return next((choice for choice in choices if choice.label == label), None)
