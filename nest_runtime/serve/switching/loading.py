"""Brings patches to the model: fetched, verified, checked against its rows and added, without holding anybody up.

A patch that is brought and then not kept is taken off again, so that a failed load leaves nothing behind. The table
decides which patches are kept, and under which label (table.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from nest_runtime.errors import NestError, PatchNotFound, StoreError, UsageError
from nest_runtime.escape import short
from nest_runtime.patch.patch import Patch
from nest_runtime.resolve import load_patch
from nest_runtime.serve.engine import EngineControl, NoEngine, PatchHolder
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.served_patch import BASE, ServedPatch
from nest_runtime.store.entries import check_names, entry_of, is_path, is_repository
from nest_runtime.store.store import Entry, Store

if TYPE_CHECKING:
    from nest_runtime.trust.check import Verified
    from nest_runtime.trust.guard import Guard

THREADS = 4  # that wait for repositories, and as many for disks


@dataclass(frozen=True)
class Arrival:
    """A patch that is trusted and on the model, as long as it is needed.

    Attributes:
        patch: the patch.
        verified: how it passed the guard; None if there is no guard.
        others: the store's other patches for this model.
    """

    patch: Patch
    verified: Verified | None
    others: tuple[Entry, ...]


class Loader:
    """Loads for one table.

    Args:
        runtime: gets the patches.
        store: where references are looked up.
        model_hash: the model's.
        kept: whether a patch, by digest, is to stay on the model.

    Attributes:
        guard: decides which patches are trusted; None trusts them all.
        veto: raises for a patch that must not answer any more.
        tryout: raises for a patch that cannot be computed with, once it is on the model.
        condemned: why a patch, by digest, is taken no more: it broke while it answered.
        engine_control: holds the engine's steps back while the model changes.
    """

    def __init__(self, runtime: PatchHolder, store: Store, model_hash: str, kept: Callable[[str], bool]) -> None:
        self.guard: Guard | None = None
        self.veto: Callable[[Patch], None] = lambda patch: None
        self.tryout: Callable[[Patch], None] = lambda patch: None
        self.condemned: dict[str, NestError] = {}
        self.engine_control: EngineControl = NoEngine()
        self._runtime = runtime
        self._store = store
        self._hash = model_hash
        self._kept = kept
        self._fetching, self._reading = Pool("fetch", THREADS), Pool("load", THREADS)
        self._judging = Pool("judge", THREADS)  # of what is loaded: no file of a stranger's is read
        self._wanted: Counter[str] = Counter()  # by digest: loads under way
        self._here: set[str] = set()  # digests of what is on the model
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by digest

    @asynccontextmanager
    async def bring(self, ref: str, known: ServedPatch | None, *, older: bool) -> AsyncIterator[Arrival]:
        """A context in which the patch of a reference is on the model; it is taken off again unless it is kept then.

        Args:
            ref: the reference.
            known: the loaded patch that it means, if it does.
            older: it may be behind one that was accepted before.

        Raises:
            NestError: there is no such patch, or it is not trusted, or is not for this model.
        """
        if known is not None and known.patch is not None:
            patch, where = known.patch, None
        else:
            pool = self._fetching if is_repository(ref) else self._reading
            patch, where = await pool.run(load_patch, ref, model_hash=self._hash, store=self._store), ref
        verified = await self.check(patch, where, older=older)
        others = () if known is not None else await self._judging.run(self._others, patch)
        self._wanted[patch.digest] += 1
        try:
            async with self._turn(patch.digest):
                if patch.digest not in self._here:
                    await self._reading.run(self._add, patch)
                    self._here.add(patch.digest)
            yield Arrival(patch, verified, others)
        finally:
            self._wanted[patch.digest] -= 1
            await self.release(patch.digest, lambda: ())

    async def release(self, digest: str, in_use: Callable[[], Collection[str | None]]) -> None:
        """Take a patch off the model, unless it is kept or is being loaded. Raises StoreError if it answers.

        Args:
            digest: the patch.
            in_use: gives the runtime keys that the engine still computes under.
        """
        async with self._turn(digest):
            if digest in self._here and not self._kept(digest) and not self._wanted[digest]:
                await self._reading.run(self._drop, digest, in_use)
                self._here.discard(digest)

    def wanted(self, digest: str) -> bool:
        """Whether a load of this patch is under way."""
        return self._wanted[digest] > 0

    async def check(self, patch: Patch, ref: str | None, *, older: bool) -> Verified | None:
        """Whether a patch may answer; how it passed the guard. Raises TrustError."""
        pool = self._judging if ref is None or not is_path(ref) else self._reading
        return await pool.run(self._judge, patch, ref, older)

    async def meant(self, ref: str, loaded: Sequence[ServedPatch]) -> ServedPatch | None:
        """The loaded patch that a reference means, or None. Raises StoreError if it may mean another as well."""
        found = next((row for row in loaded if ref in (row.label, row.digest, _full_name(row))), None)
        if found is None or ref == found.digest:
            return found
        stored = await self._judging.run(self._stored, ref)
        if stored not in (None, found.digest):
            raise StoreError(
                f"{ref} is ambiguous: {_full_name(found)} ({short(found.digest)}) is loaded, and the store has another",
                "name it by name@version, or by its digest; GET /v1/patches and `nest-runtime list` show them",
            )
        return found

    def _stored(self, ref: str) -> str | None:
        """The digest that the store has under a reference, or None; words where it has several."""
        try:
            return self._store.find(ref, model_hash=self._hash).digest
        except PatchNotFound:
            return None
        except UsageError:
            return "several"

    def _others(self, patch: Patch) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._store.list(self._hash) if entry.digest != patch.digest)

    def _judge(self, patch: Patch, ref: str | None, older: bool) -> Verified | None:
        if patch.digest in self.condemned:
            raise self.condemned[patch.digest]
        self.veto(patch)
        return None if self.guard is None else self.guard.check(patch, ref, allow_downgrade=older)

    def _add(self, patch: Patch) -> None:
        with self.engine_control.hold():  # steps go on while the patch is checked against the model
            self._runtime.add(patch, pause=self.engine_control.pause)
            try:
                self.tryout(patch)
            except NestError:
                with self.engine_control.pause():
                    self._runtime.remove(patch.digest)
                raise

    def _drop(self, digest: str, in_use: Callable[[], Collection[str | None]]) -> None:
        with self.engine_control.pause():
            if digest in in_use():
                raise StoreError(f"{short(digest)} still answers requests", "try again when they are done")
            self.engine_control.unfold()
            self._runtime.remove(digest)

    def _turn(self, digest: str) -> asyncio.Lock:
        return self._turns.setdefault(digest, asyncio.Lock())


def label_for(arrival: Arrival, loaded: Sequence[ServedPatch]) -> str:
    """A patch's label from now on: its version, or ``name@version`` if the version alone could mean another patch.

    Raises:
        StoreError: the full name could mean another as well, or cannot be typed.
    """
    patch, full = arrival.patch, arrival.patch.label
    check_names(entry_of(patch, 0))
    others = {entry.digest: {entry.version, entry.key} for entry in arrival.others}
    others |= {other.digest: {other.label, other.patch.version, _full_name(other)} for other in loaded if other.patch}
    others.pop(patch.digest, None)
    rival = next((digest for digest, names in others.items() if full in names), None)
    if rival is not None:
        raise StoreError(
            f"{full} is already {short(rival)} for this model; this patch is {short(patch.digest)}",
            "a version never changes: give the new patch another version, or remove the other one",
        )
    taken = {name for names in others.values() for name in names} | {BASE}
    return full if patch.version in taken else patch.version


def _full_name(served_patch: ServedPatch) -> str:
    patch = served_patch.patch
    return served_patch.label if patch is None else patch.label
