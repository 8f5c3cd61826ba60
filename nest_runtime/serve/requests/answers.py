"""From tokens to answers: choices, text, usage, and the events of a stream.

Whole answers and streams take the same path, so that a joined stream equals the whole answer, to the character.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from nest_runtime.errors import PatchReplaced
from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.requests.detokenize import AnswerText
from nest_runtime.serve.requests.generation import ChoiceTokens, Generation, Restarted
from nest_runtime.serve.requests.observe import Watch
from nest_runtime.serve.requests.odds import OddsOfChoice, TokenOdds
from nest_runtime.serve.served_patch import ServedPatch


@dataclass(frozen=True)
class Piece:
    """Some text of one choice, and why the choice ended if it did ("stop" or "length"); log probabilities if wanted."""

    index: int
    text: str
    finish_reason: str | None = None
    odds: tuple[TokenOdds, ...] = ()


@dataclass
class Usage:
    """Tokens of one request; each prompt counts once however many answers it gets."""

    prompt: int
    completion: int = 0

    def body(self) -> dict[str, int]:
        """OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Choice:
    """A finished answer."""

    index: int
    text: str
    finish_reason: str
    odds: tuple[TokenOdds, ...] = ()


@dataclass
class Answer:
    """One request in progress: its generation, its tokenizer, and what has been counted.

    Use ``whole`` or ``stream`` once, unless the answer is ``stale``. Afterwards, whatever happened, call
    ``generation.cancel()``. When either has given something, ``generation.request.pin`` is the patch that it came from.
    """

    generation: Generation
    tokenizer: Any
    stops: tuple[str, ...]
    seconds: float
    metrics: Metrics
    usage: Usage = field(init=False)
    _until: float = field(init=False)
    _pin: ServedPatch | None = field(default=None, init=False)  # whose words were given out last
    _odds: list[OddsOfChoice] = field(default_factory=list, init=False)  # one for each choice, where they are wanted

    def __post_init__(self) -> None:
        self._until = asyncio.get_running_loop().time() + self.seconds
        self._forget()

    async def whole(self) -> list[Choice]:
        """All answers, whole. Raises EngineError, or ApiError 504 after ``seconds``."""
        while True:
            texts = [""] * self.generation.request.choices
            reasons = ["stop"] * len(texts)
            odds: list[tuple[TokenOdds, ...]] = [()] * len(texts)
            try:
                async for piece in self._pieces():
                    texts[piece.index] += piece.text
                    reasons[piece.index] = piece.finish_reason or reasons[piece.index]
                    odds[piece.index] += piece.odds
            except Restarted:
                self._forget()
                continue
            self._pin = self.generation.request.pin
            return [Choice(index, text, reasons[index], odds[index]) for index, text in enumerate(texts)]

    @property
    def stale(self) -> bool:
        """Whether the patch was replaced after ``whole`` or ``stream`` last gave something, and before it was shown.

        If so, throw away what they gave, and ask again.
        """
        return self._pin != self.generation.request.pin

    async def stream(self) -> AsyncIterator[Piece]:
        """Text as it becomes certain; once ``generation.shown`` is set, what has been given out stays given out.

        Raises:
            EngineError: the engine fails, or the patch was replaced (PatchReplaced).
            ApiError: 504, after ``seconds``.
        """
        while True:
            try:
                async for piece in self._pieces():
                    self._pin = self.generation.request.pin
                    yield piece
            except Restarted:
                self._forget()
                continue
            return

    def _forget(self) -> None:
        self.usage = Usage(sum(len(prompt) for prompt in self.generation.request.prompts))

    async def _pieces(self) -> AsyncIterator[Piece]:
        request = self.generation.request
        texts = [AnswerText(self.tokenizer, self.stops) for _ in range(request.choices)]
        with_logprobs = request.params.logprobs is not None
        self._odds = [OddsOfChoice(self.tokenizer) for _ in range(request.choices)] if with_logprobs else []
        watch = Watch(self.metrics, self.generation)
        events = self.generation.events()
        try:
            while True:
                try:
                    async with asyncio.timeout_at(self._until):
                        event = await anext(events)
                except StopAsyncIteration:
                    return
                watch.tokens(len(event.tokens))
                for piece in self._read(texts[event.index], event):
                    watch.text(piece.index, piece.text, piece.finish_reason is not None)
                    yield piece
        except TimeoutError:
            raise ApiError(504, f"the answer took over {self.seconds:g} s", code="timeout") from None
        except (Restarted, PatchReplaced) as replaced:
            watch.replaced("restarted" if isinstance(replaced, Restarted) else "ended")
            raise
        finally:
            watch.finish(self.usage)

    def _read(self, text: AnswerText, event: ChoiceTokens) -> list[Piece]:
        """Token by token, so that where a stop string cuts does not depend on how tokens arrived."""
        if text.stopped:  # what came after the cut, before the engine heard of it
            return []
        shown, index, reason = "", event.index, event.finish_reason
        last = len(event.tokens) - 1 if reason == "stop" else None  # the end token, which has no odds
        for place, token in enumerate(event.tokens):
            self.usage.completion += 1
            if self._odds and place != last:
                self._odds[index].add(token, event.odds[place], text.length)
            shown += text.add(token)
            if text.stopped:
                break
        if reason is not None and not text.stopped:
            shown += text.finish()
        if text.stopped:
            self.generation.end_choice(index)
            reason = "stop"
        if not shown and not reason:
            return []
        odds = self._odds[index].give(len(shown), ended=bool(reason), cut=text.stopped) if self._odds else ()
        return [Piece(index, shown, reason, odds)]
