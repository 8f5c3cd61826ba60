"""A switch of patches over servers that share nothing: it reaches every one of them, or none answers.

There is one :class:`Switchboard` for a fleet, and one :class:`Member` beside each server. Members poll the board for
its current order, and execute it: ``prepare`` a patch, ``hold`` (answer nobody, end what runs), ``switch``, ``open``.
A switch holds all members before the first one changes, and opens them when the last has changed. So no client sees
two patches at once. A member that cannot reach the board closes by itself before the board gives it up. Needs neither
vLLM nor Ray; ray_app.py connects it to Ray Serve.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nest_runtime.errors import EngineError, NestError

Kind = Literal["open", "prepare", "hold", "switch"]
POLL_SECONDS = 0.5  # a question to the board is answered after this long at the latest
LEASE_SECONDS = 10.0  # a member answers clients for so long after its last question
DEAD_SECONDS = 20.0  # after which the board gives it up; more than the lease, so that it is closed by then
STEP_SECONDS = 300.0  # for one step of a switch on all members


@dataclass(frozen=True)
class Order:
    """What every member is to do now.

    Attributes:
        number: grows from one order to the next.
        kind: see the module.
        ref: the patch, for ``prepare`` and ``open``.
        digest: what it must be, for ``switch`` and ``open``; empty if nobody knows yet.
    """

    number: int
    kind: Kind
    ref: str = ""
    digest: str = ""


@dataclass(frozen=True)
class MemberOutcome:
    """What became of an order on one member.

    Attributes:
        number: the order's.
        digest: of the patch that was prepared, or is on.
        error: why it failed; empty if it did not.
    """

    number: int
    digest: str = ""
    error: str = ""


@dataclass
class _Seen:
    """What the board knows of a member."""

    at: float
    outcome: MemberOutcome = field(default_factory=lambda: MemberOutcome(0))


class Switchboard:
    """Gives orders to all members, one after another; lives on one event loop.

    Args:
        members: how many make up the fleet; without them nothing is switched.
        ref: the patch that members start with.
        clock: seconds.
    """

    def __init__(self, members: int, ref: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.expected = members
        self.halted = ""  # why nobody answers
        self._clock = clock
        self._numbers = itertools.count(1)
        self._seen: dict[str, _Seen] = {}
        self._news = asyncio.Condition()
        self._lock = asyncio.Lock()
        self._ref, self._digest = ref, ""
        self._order = Order(next(self._numbers), "open", ref)

    async def poll(self, member: str, outcome: MemberOutcome) -> Order:
        """Called by a member with its outcome. Returns the current order, at once if it is new to the member."""
        async with self._news:
            self._seen[member] = _Seen(self._clock(), outcome)
            self._news.notify_all()
            if self._order.number == outcome.number:
                try:
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._news.wait_for(lambda: self._order.number != outcome.number)
                except TimeoutError:
                    pass
            return self._order

    async def leave(self, member: str) -> None:
        """Called by a member on its way out."""
        self._seen.pop(member, None)

    async def activate(self, ref: str) -> dict[str, Any]:
        """Switch the whole fleet; returns what it was switched to, and the seconds that nobody was answered.

        Raises:
            EngineError: a member could not; all are on the old patch then, or none answers.
        """
        async with self._lock:
            self._drop_dead()
            if len(self._seen) < self.expected:
                raise EngineError(f"{len(self._seen)} of {self.expected} members are there", "wait for the others")
            on = {outcome.digest for outcome in self._outcomes().values()}
            if not self._digest and len(on) == 1:
                self._digest = on.pop()
            old = (self._ref, self._digest)
            prepared = await self._everyone("prepare", ref)
            digests = {outcome.digest for outcome in prepared.values()}
            if failed := _errors(prepared) or (f"it is {len(digests)} patches" if len(digests) != 1 else ""):
                await self._give("open", *old)
                raise EngineError(f"{ref} cannot be prepared everywhere: {failed}", "nothing was switched")
            digest, held_at = digests.pop(), self._clock()
            held = await self._everyone("hold")
            if failed := _errors(held):
                await self._give("open", *old)
                raise EngineError(f"not all members came to rest: {failed}", "nothing was switched; try again")
            switched = await self._everyone("switch", ref, digest)
            if failed := _errors(switched, digest):
                await self._go_back(old, failed)
            self._ref, self._digest, self.halted = ref, digest, ""
            opened = await self._everyone("open", ref, digest)
            return {"digest": digest, "members": len(opened), "held_seconds": round(self._clock() - held_at, 3)}

    def state(self) -> dict[str, Any]:
        """For people and probes: who is there, what is on, whether clients are answered."""
        self._drop_dead()
        members = {name: seen.outcome.error or seen.outcome.digest for name, seen in sorted(self._seen.items())}
        done = [seen.outcome.number == self._order.number for seen in self._seen.values()]
        ready = self._order.kind in ("open", "prepare") and len(done) >= self.expected and not _errors(self._outcomes())
        return {
            "ready": ready and (all(done) or self._order.kind == "prepare"),
            "ref": self._ref,
            "digest": self._digest,
            "order": self._order.kind,
            "halted": self.halted,
            "members": members,
        }

    async def _go_back(self, old: tuple[str, str], failed: str) -> None:
        back = await self._everyone("switch", *old)
        if still := _errors(back, old[1]):
            self.halted = f"a switch failed ({failed}), and so did going back ({still}): nobody answers"
            raise EngineError(self.halted, "activate a patch that all members can take, or restart them")
        await self._give("open", *old)
        raise EngineError(f"not all members could switch: {failed}", "all are back on the old patch")

    async def _give(self, kind: Kind, ref: str = "", digest: str = "") -> Order:
        async with self._news:
            self._order = Order(next(self._numbers), kind, ref, digest)
            self._news.notify_all()
            return self._order

    async def _everyone(self, kind: Kind, ref: str = "", digest: str = "") -> Mapping[str, MemberOutcome]:
        """Give an order, and wait until every member has done it; those that died meanwhile are no members any more."""
        order, until = await self._give(kind, ref, digest), self._clock() + STEP_SECONDS
        while True:
            self._drop_dead()
            waiting = [name for name, seen in self._seen.items() if seen.outcome.number != order.number]
            if not waiting and self._seen:
                return self._outcomes()
            if not self._seen or self._clock() > until:
                late = {
                    name: MemberOutcome(order.number, error=f"no outcome in {STEP_SECONDS:g} s") for name in waiting
                }
                return {
                    **self._outcomes(),
                    **late,
                    **({} if self._seen else {"fleet": MemberOutcome(0, error="all gone")}),
                }
            async with self._news:
                try:
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._news.wait()
                except TimeoutError:
                    pass

    def _outcomes(self) -> dict[str, MemberOutcome]:
        return {name: seen.outcome for name, seen in self._seen.items()}

    def _drop_dead(self) -> None:
        now = self._clock()
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen.at <= DEAD_SECONDS}


def _errors(outcomes: Mapping[str, MemberOutcome], digest: str | None = None) -> str:
    """What went wrong where; empty if nothing did, and every member is on ``digest`` if one is given."""
    found = [f"{name}: {outcome.error}" for name, outcome in sorted(outcomes.items()) if outcome.error]
    if digest is not None:
        found += [
            f"{name}: is on {o.digest or 'nothing'}"
            for name, o in sorted(outcomes.items())
            if not o.error and o.digest != digest
        ]
    return "; ".join(found)


class MemberServer(Protocol):
    """The server beside a member."""

    async def prepare(self, ref: str) -> str:
        """Load and verify a patch; returns its digest. Raises NestError."""

    async def switch(self, ref: str) -> str:
        """Make it the active one; returns the digest that is active then. Raises NestError."""


class Member:
    """One server of the fleet: does the orders, and knows whether clients may be answered.

    Args:
        name: unique in the fleet.
        backend: the server.
        poll: the board's ``poll``, wherever it is.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        backend: MemberServer,
        poll: Callable[[str, MemberOutcome], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._backend = backend
        self._poll = poll
        self._clock = clock
        self._open = False
        self._heard = -LEASE_SECONDS
        self._outcome = MemberOutcome(0)
        self._digest = ""  # what is on
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether clients may be answered: by order, and no longer than the lease after the board's last answer."""
        return self._open and self._clock() - self._heard <= LEASE_SECONDS

    async def __aenter__(self) -> Member:
        """One request; raises EngineError if clients may not be answered now."""
        if not self.ready:
            raise EngineError("this server waits for the others of its fleet", "try again in a moment")
        self._in_flight += 1
        self._idle.clear()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    async def run(self) -> None:
        """Poll and execute orders for ever; a board that cannot be reached is asked again."""
        doing: asyncio.Task[MemberOutcome] | None = None
        order = Order(0, "hold")
        while True:
            asked = self._clock()
            try:
                outcome: Order = await self._poll(self.name, self._outcome)
            except Exception:  # of whatever carries the question: the lease decides how long that goes well
                await asyncio.sleep(POLL_SECONDS)
                continue
            self._heard = asked
            if doing is not None and doing.done():
                self._outcome, doing = doing.result(), None
            if outcome.number != order.number and doing is None:
                order = outcome
                doing = asyncio.create_task(self._do(order))
            if doing is not None:
                await asyncio.wait({doing}, timeout=POLL_SECONDS)

    async def _do(self, order: Order) -> MemberOutcome:
        if order.kind in ("hold", "switch"):
            self._open = False
        try:
            return MemberOutcome(order.number, await self._done(order))
        except NestError as error:
            return MemberOutcome(order.number, self._digest, error.message)
        except Exception as error:  # of the connection to the server: to the board it is all one
            return MemberOutcome(order.number, self._digest, f"{type(error).__name__}: {error}")

    async def _done(self, order: Order) -> str:
        if order.kind == "prepare":
            return await self._backend.prepare(order.ref)
        if order.kind == "hold":
            async with asyncio.timeout(STEP_SECONDS / 2):
                await self._idle.wait()
            return self._digest
        if not self._digest or order.digest not in ("", self._digest):
            self._open = False
            self._digest = await self._backend.switch(order.digest if order.kind == "switch" else order.ref)
        if order.digest not in ("", self._digest):
            raise EngineError(f"{order.ref} is {self._digest} here, and {order.digest} elsewhere", "pin it by digest")
        self._open = order.kind == "open"
        return self._digest
