"""``--follow`` in a running server: polls a channel, tries and activates new versions, and reports.

hub/follow.py does the following; this module connects it to the server: its table of patches, its engine for the
admission test, its audit log, metrics and readiness. Polls run in a thread. Every change of the server happens on the
event loop, one at a time, like an operator's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from nest_runtime.errors import NestError, Revoked, Stopped, StoreError
from nest_runtime.escape import short
from nest_runtime.hub.fetch import Fetched
from nest_runtime.hub.follow import Follower, FollowHost, PollOutcome
from nest_runtime.serve.engine import Engine
from nest_runtime.serve.following.admission import AdmissionTest, make_admission_test
from nest_runtime.serve.following.promises import try_claims
from nest_runtime.serve.http.api import Service
from nest_runtime.serve.limits import FollowConfig
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.switching.table import ServedPatch

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store
    from nest_runtime.trust.guard import Guard

STALE_POLLS = 5  # polls without an answer after which the server calls itself stale
T = TypeVar("T")
Event = dict[str, Any]

log = logging.getLogger("nest_runtime.serve.following.follow")


class Following(FollowHost):
    """Follows one channel for one server.

    Args:
        config: what to follow, how often, and the admission test.
        service: the server's parts.
        store: where followed patches are kept.
        audit: where refusals are written; activations are written by the table.
        guard: whom to trust.
        model_name: the model's own name, whatever it is served as: the reference model has probes of its own.
    """

    def __init__(
        self,
        config: FollowConfig,
        service: Service[Engine],
        store: Store,
        audit: AuditLog,
        guard: Guard | None,
        *,
        model_name: str,
    ) -> None:
        table = service.table
        self.on_event: Callable[[Event], None] = lambda event: None
        self._config, self._service, self._store, self._audit, self._guard = config, service, store, audit, guard
        self._admission_test: AdmissionTest | None = None
        if config.admission_test:
            limits = (config.admission_min_refused, config.admission_max_refused)
            self._admission_test = make_admission_test(model_name, config.admission_probes, *limits)
        self._follower = Follower(
            config.ref,
            base_hash=table.model_hash,
            store=store,
            host=self,
            guard=guard,
            stale_after=config.stale_after or STALE_POLLS * config.every + 60,
        )
        table.veto = self._follower.check_revoked
        self._who = f"follow {self._follower.ref}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._pool, self._notes = Pool("follow", 1), Pool("notes", 1)
        self._running = False
        self._said = ("", "")
        self._watch()

    async def first(self) -> PollOutcome:
        """Poll once before the engine runs, so that a server starts with what the channel names; untried."""
        self._loop = asyncio.get_running_loop()
        outcome = await self._pool.run(self._follower.poll)
        fatal = outcome.error is not None and self._service.table.active.key is None
        await self._report(outcome, tell=not fatal)  # the server ends with this error, and says it
        return outcome

    def start(self) -> None:
        """Keep polling, and try new versions, until ``stop``."""
        self._running = True
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop polling. A poll under way ends by itself, and changes nothing any more."""
        self._running = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def state(self) -> dict[str, Any]:
        """For ``/ready``."""
        status = self._follower.status
        withdrawn = self._service.table.withdrawn()
        return {**status.__dict__, "stale": status.stale or None, "error": status.error or None, "withdrawn": withdrawn}

    async def _run(self) -> None:
        while True:
            # Servers of a fleet do not poll at once; what is new is fetched, tried and on before the interval is over.
            await asyncio.sleep(self._config.every * random.uniform(0.7, 0.85))
            try:
                await self._report(await self._pool.run(self._follower.poll))
            except Exception:
                log.exception(
                    "a poll of %s failed in a way that was not foreseen; the next one comes", self._config.ref
                )

    def _on_loop(self, change: Coroutine[Any, Any, T]) -> T:
        """From the polling thread: do something on the event loop, and wait for it."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(change, self._loop).result()

    def active_digest(self) -> str | None:
        """The digest of the patch that new requests get."""
        active = self._service.table.active
        return active.digest if active.key is not None else None

    def active_patch(self, digest: str) -> Patch | None:
        """That patch, whether or not the store still has it."""
        patch = self._service.table.active.patch
        return patch if patch is not None and patch.digest == digest else None

    def switch(self, fetched: Fetched) -> None:
        """Activate a patch as an operator would."""
        self._on_loop(self._activate(fetched.patch.digest))

    async def _activate(self, digest: str) -> None:
        await self._service.table.activate(digest, self._who)

    def try_out(self, fetched: Fetched) -> None:
        """Let a patch answer the probes, and a few of the cases that it makes claims about."""
        if self._admission_test is not None and self._running:
            self._on_loop(self._try(fetched.patch.digest, self._admission_test))

    async def _try(self, digest: str, admission_test: AdmissionTest) -> None:
        table, engine = self._service.table, self._service.engine
        before = {served_patch.digest for served_patch in table.loaded()}
        served_patch = await table.load(digest, self._who)
        try:
            shares = await admission_test.check(engine, self._service.tokenizer, served_patch)
            asked = self._guard is not None and self._guard.policy.require_claims
            tried = await try_claims(engine, self._service.tokenizer, served_patch, required=asked)
            log.info("%s passes the admission test: %s", served_patch.label, {**shares, **tried})
        except NestError:
            if digest not in before:
                await self._unload(digest)
            raise

    async def _unload(self, digest: str) -> None:
        for _ in range(20):  # the engine may need a step to let go of it
            try:
                await self._service.table.remove(digest, self._service.engine.keys_in_use, self._who)
                return
            except StoreError as error:
                log.debug("not yet: %s", error)
                await asyncio.sleep(0.1)

    def revocations_refreshed(self) -> None:
        """Withdraw exposed patches that are revoked."""
        for served_patch in self._service.table.loaded():
            assert served_patch.patch is not None  # only patches are loaded
            try:
                self._follower.check_revoked(served_patch.patch)
            except Revoked as error:
                self._on_loop(self._withdraw(served_patch, error))
            except NestError as error:
                log.error("whether %s is revoked cannot be told: %s", served_patch.label, error)

    async def _withdraw(self, served_patch: ServedPatch, error: Revoked) -> None:
        if not self._service.table.withdraw(served_patch, error):
            return
        message = f"{served_patch.label} is exposed no more: {error.message}"
        log.error("following %s: %s", self._follower.ref, message)
        self.on_event({"event": "warning", "message": message, "logged": True})
        self._service.metrics.patch_failures.labels(type(error).__name__).inc()
        entry = {
            "what": "withdraw",
            "who": self._who,
            "version": served_patch.label,
            "digest": served_patch.digest,
            "done": True,
        }
        await self._write_down({**entry, "error": type(error).__name__, "reason": error.message})

    def leave_revoked(self, revoked: Revoked) -> None:
        """Switch to the newest good patch, or stop answering, as the policy says; never to the base."""
        table = self._service.table
        policy = self._guard.policy.on_revoked if self._guard is not None else "newest-good"
        tried = [table.active.digest]
        while policy == "newest-good" and (digest := self._newest_good(tried)) is not None:
            try:
                self._on_loop(self._activate(digest))
                return
            except NestError as error:
                log.warning("%s is no way out: %s", short(digest), error)
                tried.append(digest)
        stopped = Stopped(
            f"this server has stopped answering: {revoked.message}", "its operator has to activate a patch"
        )
        table.halted = stopped
        log.error("%s", stopped)

    def _newest_good(self, but: list[str]) -> str | None:
        """The digest of the stored patch to switch to; a revoked one is refused when it is activated."""
        table, active = self._service.table, self._service.table.active
        if active.patch is None:
            return None
        if self._guard is not None:
            found = self._guard.newest_good(table.model_hash, active.patch.name, but=but)
            return found[0].digest if found else None
        rows = [e for e in self._store.list(table.model_hash) if e.name == active.patch.name and e.digest not in but]
        older = [e for e in rows if e.serial < active.patch.serial]  # without a policy nothing newer can be judged
        return max(older, key=lambda e: e.serial).digest if older else None

    async def _report(self, outcome: PollOutcome, *, tell: bool = True) -> None:
        """Log, audit and report what is new; the same trouble is reported once."""
        status = self._follower.status
        if outcome.kind == "switched":
            active = self._service.table.active
            self.on_event({"event": "followed", "ref": status.ref, "patch": active.label, "digest": active.digest})
        said = (status.error, status.stale)
        if said == self._said:
            return
        self._said = said
        for text in filter(None, said if tell else ()):
            log.warning("following %s: %s", status.ref, text)
            self.on_event({"event": "warning", "message": f"following {status.ref}: {text}", "logged": True})
        if outcome.error is not None:
            error = outcome.error
            entry = {"what": f"follow: {outcome.kind}", "who": self._who, "ref": status.ref, "done": False}
            self._service.metrics.patch_failures.labels(type(error).__name__).inc()
            await self._write_down({**entry, "error": type(error).__name__, "reason": error.message})

    async def _write_down(self, entry: dict[str, Any]) -> None:
        try:
            await self._notes.run(self._audit.record, entry)
        except NestError as unwritten:
            log.error("%s could not be audited: %s", entry["what"], unwritten)

    def _watch(self) -> None:
        watch, follower = self._service.metrics.watch, self._follower
        watch("nest_follow_stale", "1 while what is followed may be out of date.", lambda: bool(follower.status.stale))
        watch("nest_follow_failures", "Polls that failed since the last good one.", lambda: follower.status.failures)
        withdrawn = self._service.table.withdrawn
        watch("nest_follow_withdrawn", "Exposed versions taken back, being revoked.", lambda: len(withdrawn()))
        watch("nest_follow_refusing", "1 while what is offered is refused.", lambda: bool(follower.status.error))
