"""The patches of a server: which one is active, which ones clients may name, and every change of that.

A change happens completely or leaves the server as it was: a patch is read, verified and added to the runtime
(loading.py) before one assignment makes it active. Every attempt goes into the audit log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import NestError, PatchNotFound, StoreError
from nest_runtime.escape import short
from nest_runtime.patch.patch import Patch
from nest_runtime.serve.engine import EngineControl, PatchHolder
from nest_runtime.serve.pools import Pool, at_home
from nest_runtime.serve.served_patch import BASE, NO_DIGEST, ServedPatch, SwapPolicy, Switch
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.switching.changes import ChangeLog
from nest_runtime.serve.switching.durable import Durable
from nest_runtime.serve.switching.loading import Arrival, Loader, label_for
from nest_runtime.store.store import Store

if TYPE_CHECKING:
    from nest_runtime.trust.check import Verified
    from nest_runtime.trust.guard import Guard

__all__ = ["PatchTable", "ServedPatch", "Switch"]

SWITCH_THREADS = 4


class PatchTable:
    """The server's patches. They are loaded side by side and switched one at a time, in threads if that is slow.

    Args:
        runtime: holds the loaded patches.
        model_name: the model's name for clients.
        model_hash: its base hash.
        store: where references are looked up.
        audit: where changes are written.
        guard: decides which patches are trusted, at every load and every activation; None trusts them all.
        follows_store: the active patch is the store's: activations are written there too, so that a restart finds them.
        policy: what happens to requests in flight at a switch that does not say it.
    """

    def __init__(
        self,
        runtime: PatchHolder,
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
        self.base = ServedPatch(None, BASE, NO_DIGEST)
        self.active = self.base
        self.home: asyncio.AbstractEventLoop | None = None  # where changes are made, wherever they are asked for
        self.policy = policy
        self.halted: NestError | None = None  # why nothing is answered at all: the active patch was revoked
        self.on_switch: Callable[[Switch], None] = lambda switch: None
        self.on_refusal: Callable[[str, NestError], None] = lambda what, error: None
        self.loader = Loader(runtime, store, model_hash, lambda digest: digest in self._loaded)
        self.loader.guard = guard
        self._pool = Pool("switch", SWITCH_THREADS)
        self._changes = ChangeLog(audit, self._pool, self._refused)
        self._durable = Durable(store, model_name, model_hash, follows_store=follows_store, guard=guard)
        self._verified: dict[str, Verified] = {}  # by digest, as of the last check
        self._loaded: dict[str, ServedPatch] = {}  # by digest
        self._exposed: dict[str, ServedPatch] = {}  # by what follows the @
        self._withdrawn: dict[str, NestError] = {}  # by the same: why clients get it no more
        self._before: list[
            tuple[str, str]
        ] = []  # digest and label of what a rollback returns to; no digest for the base
        self._rollbacks = 0
        self._lock = asyncio.Lock()  # held while a switch is written down and made; nothing is fetched or verified then

    @property
    def guard(self) -> Guard | None:
        """Decides which patches are trusted, at every load and every activation; None trusts them all."""
        return self._durable.guard

    @guard.setter
    def guard(self, guard: Guard | None) -> None:
        """Replace the guard, for loads and activations."""
        self._durable.guard = self.loader.guard = guard

    @property
    def engine_control(self) -> EngineControl:
        """The engine that computes on the model."""
        return self.loader.engine_control

    @engine_control.setter
    def engine_control(self, control: EngineControl) -> None:
        """Name the engine that computes on the model."""
        self.loader.engine_control = control

    @property
    def veto(self) -> Callable[[Patch], None]:
        """Raises for a patch that must not answer any more."""
        return self.loader.veto

    @veto.setter
    def veto(self, veto: Callable[[Patch], None]) -> None:
        """Replace the check of what must not answer."""
        self.loader.veto = veto

    def named(self, model: str) -> ServedPatch | None:
        """The patch behind a client's ``model``, or None if there is no such name for clients.

        Raises:
            NestError: nothing is answered at the moment (``halted``), or the patch was withdrawn; the error says why.
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

    def loaded(self) -> list[ServedPatch]:
        """Every patch that is loaded, in the order of loading."""
        return list(self._loaded.values())

    def is_exposed(self, served_patch: ServedPatch) -> bool:
        """Whether clients may name this patch."""
        return served_patch in self._exposed.values()

    def expose(self, served_patch: ServedPatch) -> None:
        """Let clients name a loaded patch, or the base."""
        self._exposed[served_patch.label] = served_patch

    def withdraw(self, served_patch: ServedPatch, why: NestError) -> bool:
        """Take a name from clients for good; requests for it get the reason. Returns whether they had it.

        Earlier requests run to their end.
        """
        if self._exposed.pop(served_patch.label, None) is None:
            return False
        self._withdrawn[served_patch.label] = why
        return True

    def withdrawn(self) -> list[str]:
        """The labels that were exposed and are no more."""
        return list(self._withdrawn)

    @at_home
    async def load(self, ref: str, who: str) -> ServedPatch:
        """Read, verify and add a patch, without activating it. Raises NestError; the server is then as it was."""
        async with (
            self._changes.audited("load", who, ref=ref) as event,
            self._brought(ref, older=True) as arrival,
            self._lock,
        ):
            served_patch = self._placed(arrival)
            await self._record(event, served_patch)
            self._loaded[served_patch.digest] = served_patch
            return served_patch

    @at_home
    async def activate(self, ref: str, who: str, policy: SwapPolicy | None = None) -> Switch:
        """Make a patch the active one, loading it first if needed; it answers requests admitted from now on.

        Raises:
            NestError: it cannot be activated. The old patch is then still active, and nothing more is loaded than
                before.
            StoreError: somebody rolled back meanwhile.
        """
        policy = policy or self.policy
        async with self._changes.audited("activate", who, ref=ref, policy=policy) as event:
            started, rollbacks = time.perf_counter(), self._rollbacks
            async with self._brought(ref, older=False) as arrival, self._lock:
                if self._rollbacks != rollbacks:
                    raise StoreError(
                        f"while {ref} was being loaded, the server was rolled back to {self.active.label}",
                        "activate it again if that is still meant",
                    )
                served_patch = self._placed(arrival)
                await self._record(event, served_patch)
                return await self._switch("activate", served_patch, started, who, policy)

    @at_home
    async def rollback(self, who: str, policy: SwapPolicy | None = None) -> Switch:
        """Return to the patch that was active before, which is loaded again if it was unloaded since.

        Raises:
            StoreError: there is none, or it is neither loaded nor in the store any more.
        """
        policy = policy or self.policy
        async with self._changes.audited("rollback", who, policy=policy) as event:
            started = time.perf_counter()
            while True:
                target = await self._earlier()
                try:
                    async with self._brought(target, older=True) as arrival, self._lock:
                        if await self._earlier() != target:
                            continue  # somebody else switched meanwhile
                        served_patch = self._placed(arrival)
                        await self._record(event, served_patch)
                        switch = await self._switch("rollback", served_patch, started, who, policy)
                        self._rollbacks += 1
                        return switch
                except PatchNotFound as error:
                    label = next((label for digest, label in self._before[::-1] if digest == target), short(target))
                    raise StoreError(
                        f"{label}, which answered before, was unloaded since, and the store does not have it",
                        "load it again from its file, and activate it",
                    ) from error

    @at_home
    async def remove(self, version: str, in_use: Callable[[], Collection[str | None]], who: str) -> ServedPatch:
        """Unload a patch. Raises PatchNotFound, or StoreError if it is active, exposed or still answering.

        Args:
            version: its label or digest.
            in_use: gives the runtime keys that the engine still computes under.
            who: for the audit log.
        """
        async with self._changes.audited("remove", who, ref=version) as event:
            async with self._lock:
                served_patch = self._find(version)
                self._check_idle(served_patch, in_use())
                await self._record(event, served_patch)
                del self._loaded[served_patch.digest]
            try:
                await self.loader.release(served_patch.digest, in_use)
            except NestError:
                self._loaded.setdefault(served_patch.digest, served_patch)
                raise
            return served_patch

    async def recheck(self) -> list[str]:
        """Which loaded patches would not be loaded under the new trust policy; nothing is taken off."""
        found = []
        for served_patch in self.loaded():
            assert served_patch.patch is not None  # only patches are loaded
            try:
                await self.loader.check(served_patch.patch, None, older=True)
            except NestError as error:
                self.on_refusal("recheck", error)
                found.append(f"{served_patch.label}, which is loaded, is not trusted any more: {error}")
        return found

    @asynccontextmanager
    async def _brought(self, ref: str, *, older: bool) -> AsyncIterator[Arrival]:
        """A context in which what a reference means is on the model; entered and left without holding the lock."""
        known = await self.loader.meant(ref, self.loaded())
        async with self.loader.bring(ref, known, older=older) as arrival:
            if arrival.verified is not None:
                self._verified[arrival.patch.digest] = arrival.verified
            yield arrival

    def _placed(self, arrival: Arrival) -> ServedPatch:
        """An arrival as it is, or will be, loaded. Raises StoreError if no label is left for it."""
        patch = arrival.patch
        if patch.digest in self._loaded:
            return self._loaded[patch.digest]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return ServedPatch(patch.digest, label_for(arrival, self.loaded()), patch.digest, patch, now)

    def _check_idle(self, served_patch: ServedPatch, in_use: Collection[str | None]) -> None:
        if served_patch == self.active:
            raise StoreError(f"{served_patch.label} is active", "activate another patch first")
        if self.is_exposed(served_patch):
            raise StoreError(f"{served_patch.label} is exposed to clients", "start the server without --expose for it")
        if self.loader.wanted(served_patch.digest):
            raise StoreError(f"{served_patch.label} is being loaded or switched to", "try again when that is done")
        if served_patch.key in in_use:
            raise StoreError(f"{served_patch.label} still answers requests", "try again when they are done")

    async def _switch(
        self, what: str, served_patch: ServedPatch, started: float, who: str, policy: SwapPolicy
    ) -> Switch:
        previous = self.active
        if served_patch.patch is not None:
            await self._pool.run(self._durable.write, what, served_patch.patch, who, previous.digest)
        if what == "rollback":
            self._before = self._before[:-1]
        elif previous != served_patch:
            self._before.append((previous.digest if previous.key is not None else "", previous.label))
        self._loaded.setdefault(served_patch.digest, served_patch)
        self.active, self.halted = served_patch, None
        replaced = self.engine_control.enforce(served_patch) if policy == "enforce" else 0
        switch = Switch(what, served_patch, previous, time.perf_counter() - started, policy, replaced)
        self.on_switch(switch)
        return switch

    async def _earlier(self) -> str:
        """The digest of the patch that a rollback returns to; the store's, where the server follows it."""
        if self._durable.follows_store and self.active.key is not None:
            entry = await self._pool.run(self._durable.previous, self.active.digest)
            if entry is not None:
                return entry.digest
        elif self._before and self._before[-1][0]:
            return self._before[-1][0]
        first = f"{self.active.label} is the first patch that answers here: nothing to roll back to, for a server"
        first += " does not go back to the bare base"
        parted = await self._pool.run(self._durable.parted, self.active.key)
        raise StoreError(first + parted, "activate a patch by name instead")

    async def stored(self) -> dict[str, Any]:
        """What the store says is active, and whether this server agrees; see Durable.stored."""
        return await self._pool.run(self._durable.stored, self.active.key)

    def _find(self, version: str) -> ServedPatch:
        for served_patch in self._loaded.values():
            if version in (served_patch.label, served_patch.digest):
                return served_patch
        loaded = ", ".join(served_patch.label for served_patch in self._loaded.values()) or "none"
        raise PatchNotFound(f"no patch {version!r} is loaded; loaded: {loaded}", "see GET /v1/patches")

    def _refused(self, what: str, error: NestError) -> None:
        self.on_refusal(what, error)  # as it is set now

    async def _record(self, event: dict[str, Any], served_patch: ServedPatch) -> None:
        """Record a change before it is made: nothing is changed without an audit entry."""
        event |= {"version": served_patch.label, "digest": served_patch.digest}
        if event["what"] in ("activate", "rollback"):
            event["previous"] = self.active.label
        if served_patch.digest in self._verified:
            event["signed_by"] = self._verified[served_patch.digest].signed_by
        await self._changes.intend(event)
