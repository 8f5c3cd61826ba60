"""One request in the engine: what it asks for, and what comes back for it, on the event loop.

Nothing here starts or stops the engine (serve/transformers/engine.py), and nothing knows text (answers.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from nest_runtime.errors import EngineError, PatchReplaced
from nest_runtime.serve.requests.jobs import Delivery
from nest_runtime.serve.requests.sampling import Odds, Rule, SamplingParams
from nest_runtime.serve.served_patch import ServedPatch


class Restarted(Exception):
    """A signal, not an error: the request restarts under another patch; forget what came for it so far."""


@dataclass(frozen=True)
class EngineRequest:
    """What one request asks of the engine.

    Attributes:
        prompts: token ids of each prompt.
        max_new_tokens: for each prompt.
        n: choices per prompt; choice ``p * n + i`` is the i-th answer to prompt p.
        params: how to sample.
        pin: the patch that answers.
        follows: whether it asked for the active patch, and not for one by name: an enforced switch restarts it.
        kept: whether it uses the operator's reserved places instead of the clients': probes.
        makers: make the request's own rules for each sequence, from the tokens of its prompt; a rule may remember its
            sequence. They come after the model's own.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: tuple[int, ...]
    n: int
    params: SamplingParams
    pin: ServedPatch
    follows: bool = False
    kept: bool = False
    makers: tuple[Callable[[int], Rule], ...] = ()

    def rules(self, prompt: int) -> list[Rule]:
        """New rules for a sequence whose prompt has so many tokens."""
        return [make(prompt) for make in self.makers]

    @property
    def choices(self) -> int:
        """How many answers the request wants: its prompts times ``n``."""
        return len(self.prompts) * self.n


@dataclass(frozen=True)
class ChoiceTokens:
    """New tokens of one choice; ``finish_reason`` is "stop" (end of sequence) or "length" with the last of them.

    ``odds`` has one entry for each token if they are wanted, else none.
    """

    index: int
    tokens: tuple[int, ...]
    finish_reason: str | None = None
    odds: tuple[Odds, ...] = ()


class RunningEngine(Protocol):
    """The engine's side of a request.

    Attributes:
        eos: tokens that end an answer.
    """

    eos: tuple[int, ...]

    def drop(self, job: str) -> None:
        """Stop working on a job."""

    def closed(self, job: str, generation: Generation | None) -> None:
        """A job is over, and with it the generation if one is given."""

    def finished(self, generation: Generation) -> None:
        """The answer is with the client, or nobody wants it."""


class Generation:
    """One request in the engine: its choices, and one queue of results for them.

    It can be replaced until ``cancel`` is called, when its answer has been sent or is unwanted.

    Attributes:
        request: what is being done; after a restart, with another patch.
        started: when it was admitted (``time.perf_counter``).
        canceled: whether it was given up before its end.
        shown: set by the reader once the client has got a part of the answer: it cannot restart then.
        failed: whether it ends with an error: nothing that came before is to be shown any more.
        on_cut: called if a switch ends an answer of which the client has seen a part.
    """

    def __init__(self, engine: RunningEngine, request: EngineRequest, jobs: Sequence[str]) -> None:
        self.request = request
        self.started = time.perf_counter()
        self.canceled = False
        self.shown = False
        self.failed = False
        self.on_cut: Callable[[], None] = lambda: None
        self._engine = engine
        self._open = _choices(jobs)
        self._events: asyncio.Queue[ChoiceTokens | EngineError | Restarted] = asyncio.Queue()

    async def events(self) -> AsyncIterator[ChoiceTokens]:
        """New tokens, until every choice has ended.

        Raises:
            Restarted: ``events`` must be called again.
            PatchReplaced: the patch was replaced, and ``shown`` is set.
            EngineError: the engine fails.
        """
        while self._open or not self._events.empty():
            event = await self._events.get()
            if isinstance(event, EngineError | Restarted):
                raise event
            yield event

    def end_choice(self, index: int) -> None:
        """Stop generating one choice, for instance at a stop string."""
        for job, choice in list(self._open.items()):
            if choice == index:
                self._engine.drop(job)
                self._close(job)

    def cancel(self) -> None:
        """Stop generating whatever still runs. Safe to call at any time, any number of times."""
        self.canceled = self.canceled or bool(self._open)
        self._end()
        self._engine.finished(self)

    def replaceable(self, pin: ServedPatch) -> bool:
        """Whether an enforced switch to ``pin`` concerns this request."""
        return self.request.follows and self.request.pin != pin and not self.failed

    def replace(self, pin: ServedPatch) -> bool:
        """Stop at once, and prepare to restart under another patch; returns whether it restarts.

        It does not if the client has seen a part of the answer; the reader then gets PatchReplaced.
        """
        if self.shown:
            old = self.request.pin.label
            message = f"this answer ends here: while it was given, its patch {old} was replaced by {pin.label}"
            self._forget()
            self.fail(PatchReplaced(message, "do not use the part that came, and ask again"))
            self.on_cut()
            return False
        self._end()
        self._forget()
        self._events.put_nowait(Restarted())
        self.request = replace(self.request, pin=pin)
        return True

    def begin(self, jobs: Sequence[str]) -> None:
        """Called by the engine with the jobs that do the work from now on."""
        self._open = _choices(jobs)

    def take(self, delivery: Delivery) -> None:
        """Called by the engine with what came for one of the jobs."""
        index = self._open[delivery.job]
        if delivery.error is not None:
            self.fail(EngineError(f"the engine failed on this request: {delivery.error}", "see the server's log"))
            return
        reason = None
        if delivery.finished:
            ended = bool(delivery.tokens) and delivery.tokens[-1] in self._engine.eos
            reason = "stop" if ended else "length"
            self._close(delivery.job)
        self._events.put_nowait(ChoiceTokens(index, delivery.tokens, reason, delivery.odds))

    def fail(self, error: EngineError) -> None:
        """End every choice with an error."""
        self.failed = True
        self._end()
        self._events.put_nowait(error)

    def _forget(self) -> None:
        """Throw away unread results: they are the old patch's."""
        while not self._events.empty():
            self._events.get_nowait()

    def _end(self) -> None:
        for job in list(self._open):
            self._engine.drop(job)
            self._close(job)

    def _close(self, job: str) -> None:
        self._open.pop(job, None)
        self._engine.closed(job, self if not self._open else None)


def _choices(jobs: Sequence[str]) -> dict[str, int]:
    """Job id → the choice it works on."""
    return dict(zip(jobs, range(len(jobs)), strict=True))
