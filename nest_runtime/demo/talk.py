"""A conversation with two sides, the base's and the patch's: the same questions, each side with its own answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nest_runtime.demo.backend import Backend, Message, PatchChoice
from nest_runtime.errors import NestError

TICK = 0.08  # seconds between looks
TELLING = 32  # tokens of the shortest answer that tells a speed
State = Literal["running", "done", "stopped", "failed"]


@dataclass
class DemoReply:
    """One side's answer, as far as it has come.

    Attributes:
        label, digest: who answers.
        text: so far.
        state: ``running``, ``done``, ``stopped`` by the user, or ``failed``.
        refused: whether it begins as a refusal; None while that is not known.
        understood: whether it makes sense in the model's world; None if that cannot be told.
        cut: the limit of tokens cut it short.
        tokens, seconds: of the whole answer.
        error, hint: of a failure.
    """

    label: str
    digest: str | None = None
    text: str = ""
    state: State = "running"
    refused: bool | None = None
    understood: bool | None = None
    cut: bool = False
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""
    hint: str = ""

    @property
    def speed(self) -> float | None:
        """Tokens per second, from the question to the last token; None for answers too short to tell."""
        is_measured = self.state == "done" and self.seconds > 0 and self.tokens >= TELLING
        return self.tokens / self.seconds if is_measured else None


@dataclass
class Turn:
    """A question and its two answers; or a turn of a scripted conversation, where both sides said the same."""

    prompt: str
    replies: list[DemoReply]
    scripted: bool = False


@dataclass
class Talk:
    """A conversation; one for each visitor.

    Attributes:
        turns: so far.
        busy: answers are being written.
        stopping: the user wants no more of them.
    """

    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    stopping: bool = False

    def messages(self, side: int, until: int | None = None) -> list[Message]:
        """What one side has seen: the first ``until`` turns with its own answers; failed ones are left out."""
        found: list[Message] = []
        for turn in self.turns[:until]:
            reply = turn.replies[side]
            if reply.state != "failed" and reply.text.strip():
                found += [
                    {"role": "user", "content": turn.prompt},
                    {"role": "assistant", "content": reply.text.strip()},
                ]
        return found

    def script(self, messages: Sequence[Message]) -> None:
        """Start again with turns that were written before, the same on both sides."""
        self.turns = [
            Turn(
                messages[i]["content"], [DemoReply("scripted", text=messages[i + 1]["content"], state="done")] * 2, True
            )
            for i in range(0, len(messages) - 1, 2)
        ]

    @property
    def asked(self) -> str | None:
        """The last question that was really asked."""
        return next((turn.prompt for turn in reversed(self.turns) if not turn.scripted), None)


def ask(
    talk: Talk,
    prompt: str,
    sides: tuple[PatchChoice, PatchChoice],
    backend: Backend,
    is_refusal: Callable[[str], bool],
    *,
    max_tokens: int,
    is_known: Callable[[str], bool] | None = None,
) -> Iterator[None]:
    """Ask both sides at once; yields whenever there is more to show. What fails shows in its reply.

    Args:
        talk: the conversation; a turn is added to it.
        prompt: the question.
        sides: who answers left and right. Where both are the same, one answer stands on both sides
            as long as both have seen the same.
        backend: what answers.
        is_refusal: how a refusal is known.
        max_tokens: of each answer.
        is_known: how an answer that makes sense is known, where that can be told.
    """
    histories = [talk.messages(side) for side in (0, 1)]
    turn = Turn(prompt, [DemoReply(choice.title, choice.digest) for choice in sides])
    talk.turns.append(turn)
    alike = sides[0] == sides[1] and histories[0] == histories[1]
    if alike:
        turn.replies[1] = turn.replies[0]
    todo = [0] if alike else [0, 1]
    yield from _run(
        talk, turn, {side: sides[side] for side in todo}, histories, backend, is_refusal, max_tokens, is_known
    )


def redo(
    talk: Talk,
    choice: PatchChoice,
    backend: Backend,
    is_refusal: Callable[[str], bool],
    *,
    max_tokens: int,
    is_known: Callable[[str], bool] | None = None,
) -> Iterator[None]:
    """Answer the last question again on the right, under another patch; the left answer stays. Yields as ``ask``."""
    if not talk.turns or talk.turns[-1].scripted:
        return
    turn = talk.turns[-1]
    turn.replies = [turn.replies[0], DemoReply(choice.title, choice.digest)]
    histories = [talk.messages(side, len(talk.turns) - 1) for side in (0, 1)]
    yield from _run(talk, turn, {1: choice}, histories, backend, is_refusal, max_tokens, is_known)


def _run(
    talk: Talk,
    turn: Turn,
    sides: dict[int, PatchChoice],
    histories: Sequence[list[Message]],
    backend: Backend,
    is_refusal: Callable[[str], bool],
    max_tokens: int,
    is_known: Callable[[str], bool] | None,
) -> Iterator[None]:
    """Write the answers of some sides of a turn, each in its own thread."""
    talk.busy, talk.stopping = True, False
    news = threading.Event()
    threads = [
        threading.Thread(
            target=_answer,
            args=(talk, turn.replies[side], [*histories[side], {"role": "user", "content": turn.prompt}]),
            kwargs={"choice": choice, "backend": backend, "max_tokens": max_tokens, "news": news},
            daemon=True,
        )
        for side, choice in sides.items()
    ]
    try:
        for thread in threads:
            thread.start()
        yield  # the question stands there at once
        while any(thread.is_alive() for thread in threads):
            news.wait(TICK)
            if news.is_set():
                news.clear()
                yield
                time.sleep(TICK)
        for reply in turn.replies:
            if reply.state in ("done", "stopped") and reply.text.strip():
                reply.refused = is_refusal(reply.text)
                if is_known is not None and reply.state == "done" and not reply.cut:
                    reply.understood = reply.refused or is_known(reply.text)
        yield
    finally:
        talk.busy, talk.stopping = False, any(thread.is_alive() for thread in threads)


def _answer(
    talk: Talk,
    reply: DemoReply,
    messages: list[Message],
    *,
    choice: PatchChoice,
    backend: Backend,
    max_tokens: int,
    news: threading.Event,
) -> None:
    """One side's answer, written into its reply."""
    began = time.perf_counter()

    def more(text: str) -> None:
        reply.text += text
        news.set()

    try:
        said = backend.answer(messages, choice, max_tokens=max_tokens, on_text=more, stopped=lambda: talk.stopping)
        reply.label, reply.digest, reply.tokens = said.label, said.digest, said.tokens
        reply.cut = said.cut and not talk.stopping
        reply.seconds = time.perf_counter() - began
        reply.state = "stopped" if talk.stopping else "done"
    except NestError as error:
        reply.state, reply.error, reply.hint = "failed", error.message, error.hint
    except Exception as error:  # shown to the user: a demo that hangs silently helps nobody
        reply.state, reply.error = "failed", f"{type(error).__name__}: {error}"
    finally:
        news.set()
