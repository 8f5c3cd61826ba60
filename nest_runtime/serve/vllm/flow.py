"""Requests in flight, and the pause in admissions while weights change.

A request enters with the patch that is active then, and is counted until its answer is over. A switch in place waits
for all of them (drain), or restarts them under the new patch (enforce). Needs no vLLM.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from nest_runtime.errors import Draining, EngineError, QueueFull
from nest_runtime.serve.served_patch import ServedPatch, SwapPolicy


class Attempt:
    """One request in flight under one patch.

    Attributes:
        pin: the patch that answers.
        follows: whether it asked for the active patch, and not for one by name.
        shown: set once the client has got a part of the answer: it cannot restart then.
        replaced: set when a switch replaced its patch.
    """

    def __init__(self, pin: ServedPatch, follows: bool) -> None:
        self.pin = pin
        self.follows = follows
        self.shown = False
        self.replaced = False
        self._task: asyncio.Task[None] | None = None

    async def run(self, future: Awaitable[None]) -> bool:
        """Do the work; returns False if it was replaced before its end."""
        self._task = asyncio.ensure_future(future)
        try:
            await asyncio.wait({self._task})
        finally:
            self._task.cancel()
        if self.replaced:
            await asyncio.gather(self._task, return_exceptions=True)
            return False
        self._task.result()
        return True

    def replace(self) -> None:
        """Stop at once; ``run`` returns False."""
        self.replaced = True
        if self._task is not None:
            self._task.cancel()


class Flow:
    """All requests in flight.

    Args:
        capacity: how many there may be; more get QueueFull.
        running: how many the engine works on at once, for the guess of how long the others wait.
    """

    def __init__(self, capacity: int, running: int) -> None:
        self.capacity = capacity
        self.draining = False
        self._running = running
        self._open = asyncio.Event()
        self._open.set()
        self._door = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting = 0
        self._attempts: set[Attempt] = set()
        self._recent: deque[float] = deque(maxlen=32)  # seconds of the last requests

    @property
    def live(self) -> int:
        """Requests running, or waiting for admission."""
        return len(self._attempts) + self._waiting

    @property
    def attempts(self) -> list[Attempt]:
        """The requests that run now."""
        return list(self._attempts)

    def in_flight(self) -> Counter[str]:
        """Requests running, by the label of the patch that answers them."""
        return Counter(attempt.pin.label for attempt in self.attempts)  # from any thread

    def keys_in_use(self) -> set[str | None]:
        """Keys of the patches that answer requests."""
        return {attempt.pin.key for attempt in self._attempts}

    @asynccontextmanager
    async def enter(
        self, pin: Callable[[], ServedPatch], follows: bool, *, again: bool = False
    ) -> AsyncIterator[Attempt]:
        """A context for one attempt; entering waits while admissions are paused.

        Args:
            pin: returns the patch; called on admission, with nothing awaited between it and the entry.
            follows: see :class:`Attempt`.
            again: it was admitted before, and a switch replaced its patch: it need not queue for a place.

        Raises:
            Draining, QueueFull: it is not let in.
            ApiError: as ``pin``.
        """
        if self.live >= self.capacity and not again:
            raise self._full()
        self._waiting += 1
        try:
            while not self._open.is_set():
                await self._open.wait()
        finally:
            self._waiting -= 1
        if self.draining and not again:
            raise Draining("the server is shutting down", "send the request to another server, or again later")
        attempt, started = Attempt(pin(), follows), time.perf_counter()
        self._attempts.add(attempt)
        self._idle.clear()
        try:
            yield attempt
        finally:
            self._attempts.discard(attempt)
            self._recent.append(time.perf_counter() - started)
            if not self._attempts:
                self._idle.set()

    def replace(self, pin: ServedPatch) -> int:
        """End every attempt that follows the active patch and has another than ``pin``; returns how many."""
        found = [a for a in self._attempts if a.follows and a.pin != pin and not a.replaced]
        for attempt in found:
            attempt.replace()
        return len(found)

    @asynccontextmanager
    async def shut(self, pin: ServedPatch, policy: SwapPolicy, seconds: float) -> AsyncIterator[int]:
        """A context in which no request is in flight and none enters; yields how many were replaced for it.

        One at a time: a second one waits for the first to end.

        Args:
            pin: the patch that comes.
            policy: ``drain`` waits for those in flight, ``enforce`` replaces them.
            seconds: how long to wait for them.

        Raises:
            EngineError: some still run after that; they continue, and nothing is changed.
        """
        async with self._door, self._closed(pin, policy, seconds) as replaced:
            yield replaced

    @asynccontextmanager
    async def _closed(self, pin: ServedPatch, policy: SwapPolicy, seconds: float) -> AsyncIterator[int]:
        self._open.clear()
        try:
            replaced = self.replace(pin) if policy == "enforce" else 0
            try:
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
            except TimeoutError:
                raise EngineError(
                    f"{len(self._attempts)} requests still run after {seconds:g} s; the patch was not switched",
                    "try again, or with the policy enforce, which begins them again under the new patch",
                ) from None
            yield replaced
        finally:
            self._open.set()

    async def drained(self, seconds: float) -> None:
        """Take no more requests, and wait for those in flight."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return

    def _full(self) -> QueueFull:
        mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
        after = max(1, min(60, math.ceil(mean * max(1, self.live - self._running) / self._running)))
        return QueueFull(
            f"{self.live} requests are running or waiting; this server holds {self.capacity}",
            f"try again in {after} s",
            retry_after=after,
        )
