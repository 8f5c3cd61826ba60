"""The patches a server holds: which one is active, which ones clients may name, and every change of that.

A change either happens wholly or leaves the server as it was: a patch is read, verified and added to
the runtime before one assignment makes it active. Every attempt goes into the audit log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import NestError, PatchNotFound, StoreError
from nest_runtime.patch import Patch
from nest_runtime.registry.store import Store
from nest_runtime.resolve import load_patch
from nest_runtime.serve.audit import AuditLog
from nest_runtime.serve.durable import Durable
from nest_runtime.serve.served import BASE, NO_DIGEST, Served, SwapPolicy, Switch
from nest_runtime.serve.steps import Holder, NoSteps, Steps

if TYPE_CHECKING:
    from nest_runtime.registry.trust import Verified
    from nest_runtime.registry.trust_guard import Guard

__all__ = ["PatchTable", "Served", "Switch"]

log = logging.getLogger("nest_runtime.serve.patches")


class PatchTable:
    """The server's patches. Changes are made one at a time, off the event loop where they are slow.

    Args:
        runtime: holds the loaded patches.
        model_name: what clients call the model.
        model_hash: its base hash.
        store: where references are looked up.
        audit: where changes are written.
        guard: decides which patches are trusted, at every load and every activation; None trusts them all.
        follows_store: the active patch is the store's: activations are written there too, so that a restart finds them.
        policy: what becomes of requests in flight at a switch that does not say it.
    """

    def __init__(
        self,
        runtime: Holder,
        model_name: str,
        model_hash: str,
        store: Store,
        audit: AuditLog,
        *,
        guard: Guard | None = None,
        follows_store: bool = False,
        policy: SwapPolicy = "drain",
    ) -> None:
        self.model_name = model_name
        self.model_hash = model_hash
        self.base = Served(None, BASE, NO_DIGEST)
        self.active = self.base
        self.steps: Steps = NoSteps()
        self.policy = policy
        self.halted: NestError | None = None  # why nothing is answered at all: the active patch was revoked
        self.on_switch: Callable[[Switch], None] = lambda switch: None
        self.on_refusal: Callable[[str, NestError], None] = lambda what, error: None
        self.veto: Callable[[Patch], None] = lambda patch: None  # raises for a patch that must not answer any more
        self._runtime = runtime
        self._store = store
        self._audit = audit
        self._durable = Durable(store, model_name, model_hash, follows_store=follows_store, guard=guard)
        self._verified: dict[str, Verified] = {}  # by digest, as of the last check
        self._loaded: dict[str, Served] = {}  # by digest
        self._exposed: dict[str, Served] = {}  # by what follows the @
        self._withdrawn: dict[str, NestError] = {}  # by the same: why clients get it no more
        self._before: list[Served] = []  # activations that a rollback returns to
        self._lock = asyncio.Lock()

    @property
    def guard(self) -> Guard | None:
        """Decides which patches are trusted, at every load and every activation; None trusts them all."""
        return self._durable.guard

    @guard.setter
    def guard(self, guard: Guard | None) -> None:
        self._durable.guard = guard

    def named(self, model: str) -> Served | None:
        """The patch that a client's ``model`` stands for, or None where there is no such name for clients.

        Raises what ``halted`` holds while nothing is to be answered, and why a patch was withdrawn.
        """
        if self.halted is not None:
            raise self.halted
        if model == self.model_name:
            return self.active
        name, at, suffix = model.partition(f"{self.model_name}@")
        if not at or name:
            return None
        if suffix in self._withdrawn:
            raise self._withdrawn[suffix]
        return self._exposed.get(suffix)

    def names(self) -> list[str]:
        """The model names that clients may use."""
        return [self.model_name, *(f"{self.model_name}@{suffix}" for suffix in self._exposed)]

    def loaded(self) -> list[Served]:
        """Every patch that is loaded, in the order of loading."""
        return list(self._loaded.values())

    def is_exposed(self, served: Served) -> bool:
        """Whether clients may name this patch."""
        return served in self._exposed.values()

    def expose(self, served: Served) -> None:
        """Let clients name a loaded patch, or the base."""
        self._exposed[served.label] = served

    def withdraw(self, served: Served, why: NestError) -> bool:
        """Take a name from clients for good: who asks for it is told why. Gives whether they had it.

        Requests that it was given to before run to their end.
        """
        if self._exposed.pop(served.label, None) is None:
            return False
        self._withdrawn[served.label] = why
        return True

    def withdrawn(self) -> list[str]:
        """What was exposed and is no more, by label."""
        return list(self._withdrawn)

    async def load(self, ref: str, who: str) -> Served:
        """Read, verify and add a patch, without activating it. Raises NestError; the server is then as it was."""
        async with self._change("load", who, ref=ref) as event:
            served = await self._load(ref)
            await self._record(event, served)
            return served

    async def activate(self, ref: str, who: str, policy: SwapPolicy | None = None) -> Switch:
        """Make a patch the active one, loading it first where needed; requests admitted from now on get it.

        Raises NestError; the old patch is then still on.
        """
        policy = policy or self.policy
        async with self._change("activate", who, ref=ref, policy=policy) as event:
            started = time.perf_counter()
            served = await self._load(ref, older=False)
            await self._record(event, served)
            return await self._switch("activate", served, started, who, policy)

    async def rollback(self, who: str, policy: SwapPolicy | None = None) -> Switch:
        """Return to the patch that was active before. Raises StoreError where there is none."""
        policy = policy or self.policy
        async with self._change("rollback", who, policy=policy) as event:
            started = time.perf_counter()
            served = await self._earlier()
            await self._record(event, served)
            return await self._switch("rollback", served, started, who, policy)

    async def remove(self, version: str, in_use: Callable[[], Collection[str | None]], who: str) -> Served:
        """Unload a patch. Raises PatchNotFound, or StoreError where it is active, exposed or still answering.

        Args:
            version: its label or digest.
            in_use: gives the runtime keys that the engine still computes under.
            who: for the audit log.
        """
        async with self._change("remove", who, ref=version) as event:
            served = self._find(version)
            if served == self.active:
                raise StoreError(f"{served.label} is active", "activate another patch first")
            if self.is_exposed(served):
                raise StoreError(f"{served.label} is exposed to clients", "start the server without --expose for it")
            await self._record(event, served)
            await asyncio.to_thread(self._drop, served, in_use)
            del self._loaded[served.digest]
            self._before = [before for before in self._before if before != served]
            return served

    async def recheck(self) -> list[str]:
        """What of the loaded patches would not be loaded now that the trust policy is another; nothing is taken off."""
        async with self._lock:
            found = []
            for served in self._loaded.values():
                try:
                    await self._check(served.patch, None, True)
                except NestError as error:
                    self.on_refusal("recheck", error)
                    found.append(f"{served.label}, which is loaded, is not trusted any more: {error}")
            return found

    async def _load(self, ref: str, *, older: bool = True) -> Served:
        """The patch that a reference means, trusted and loaded; ``older``: it may be behind one accepted before."""
        for served in self._loaded.values():
            if ref in (served.label, served.digest):
                await self._check(served.patch, None, older)
                return served
        patch = await asyncio.to_thread(load_patch, ref, model_hash=self.model_hash, store=self._store)
        await self._check(patch, ref, older)
        if patch.digest not in self._loaded:
            await asyncio.to_thread(self._add, patch)
            taken = {served.label for served in self._loaded.values()} | {BASE}
            label = f"{patch.name}@{patch.version}" if patch.version in taken else patch.version
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._loaded[patch.digest] = Served(patch.digest, label, patch.digest, patch, now)
        return self._loaded[patch.digest]

    async def _check(self, patch: Patch | None, ref: str | None, older: bool) -> None:
        if patch is not None:
            await asyncio.to_thread(self.veto, patch)
        if self.guard is not None and patch is not None:
            check = self.guard.check
            self._verified[patch.digest] = await asyncio.to_thread(check, patch, ref, allow_downgrade=older)

    def _add(self, patch: Patch) -> None:
        with self.steps.hold():  # steps go on while the patch is checked against the model
            self._runtime.add(patch, pause=self.steps.pause)

    def _drop(self, served: Served, in_use: Callable[[], Collection[str | None]]) -> None:
        with self.steps.pause():
            if served.key in in_use():
                raise StoreError(f"{served.label} still answers requests", "try again when they are done")
            self.steps.unfold()
            self._runtime.remove(served.digest)

    async def _switch(self, what: str, served: Served, started: float, who: str, policy: SwapPolicy) -> Switch:
        previous = self.active
        if served.patch is not None:
            await asyncio.to_thread(self._durable.write, what, served.patch, who)
        if what == "rollback":
            self._before = self._before[:-1]
        elif previous != served:
            self._before.append(previous)
        self.active, self.halted = served, None
        replaced = self.steps.enforce(served) if policy == "enforce" else 0
        switch = Switch(what, served, previous, time.perf_counter() - started, policy, replaced)
        self.on_switch(switch)
        return switch

    async def _earlier(self) -> Served:
        """The patch that a rollback returns to, loaded; the store's, where the server follows it. Changes nothing."""
        nothing = StoreError(
            f"{self.active.label} is the first patch of this server: nothing to roll back to",
            "activate a patch by name instead",
        )
        if self._durable.follows_store:
            entry = await asyncio.to_thread(self._durable.previous)
            if entry is None:
                raise nothing
            return await self._load(entry.digest)
        if not self._before or self._before[-1].key is None:
            raise nothing
        await self._check(self._before[-1].patch, None, True)
        return self._before[-1]

    def _find(self, version: str) -> Served:
        for served in self._loaded.values():
            if version in (served.label, served.digest):
                return served
        loaded = ", ".join(served.label for served in self._loaded.values()) or "none"
        raise PatchNotFound(f"no patch {version!r} is loaded; loaded: {loaded}", "see GET /v1/patches")

    @asynccontextmanager
    async def _change(self, what: str, who: str, **details: str) -> AsyncIterator[dict[str, Any]]:
        """One change at a time; a refused one is written to the audit log, and goes on to the caller."""
        async with self._lock:
            event: dict[str, Any] = {"what": what, "who": who, **details}
            try:
                yield event
            except NestError as error:
                await self._refused(event, error)
                raise
            except OSError as error:
                full = StoreError(f"the disk refuses: {error}", "nothing was changed: free space or fix permissions")
                await self._refused(event, full)
                raise full from error
            except Exception as error:  # nothing that was foreseen, and written down all the same
                await self._refused(event, NestError(f"{type(error).__name__}: {error}"))
                raise
            else:
                await self._done(event)

    async def _refused(self, event: dict[str, Any], error: NestError) -> None:
        refusal = {**event, "done": False, "error": type(error).__name__, "reason": error.message}
        self.on_refusal(event["what"], error)
        try:
            await asyncio.to_thread(self._audit.record, refusal)
        except StoreError as unwritten:
            log.error("a refused %s could not be audited: %s", event["what"], unwritten)

    async def _done(self, event: dict[str, Any]) -> None:
        """Write down that a change was made. Where the disk refuses, its intent stands there, and the log says more."""
        try:
            await asyncio.to_thread(self._audit.record, {**event, "done": True})
        except StoreError as unwritten:
            log.error("a %s was made, and its outcome could not be audited: %s", event["what"], unwritten)

    async def _record(self, event: dict[str, Any], served: Served) -> None:
        """Write down what is about to be done: nothing is changed without an audit entry.

        What comes of it is an entry of its own, which names this one under ``intent``.
        """
        event |= {"version": served.label, "digest": served.digest}
        if event["what"] in ("activate", "rollback"):
            event["previous"] = self.active.label
        if served.digest in self._verified:
            event["signed_by"] = self._verified[served.digest].signed_by
        event["intent"] = await asyncio.to_thread(self._audit.intend, event)
