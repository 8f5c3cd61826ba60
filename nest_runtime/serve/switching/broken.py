"""What happens to a patch that gave values that are not finite while it answered: it is taken off, and counted."""

from __future__ import annotations

import asyncio
import logging

from nest_runtime.errors import NestError, PatchNotFinite, Stopped
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.requests.jobs import Blame
from nest_runtime.serve.switching.table import PatchTable

WHO = "the engine"

log = logging.getLogger("nest_runtime.serve.engine")


class Broken:
    """Called by the engine for requests that failed alone; everything here runs on the event loop.

    This process never loads or activates a broken patch again. If the patch is exposed, it is withdrawn. If it is
    active, the patch before it is activated at once, as an enforced switch. If there is none, or if the trust policy
    says ``on_revoked = "stop"``, nothing is answered any more, and never by the bare base.

    Args:
        table: the patches.
        metrics: where it is counted.
    """

    def __init__(self, table: PatchTable, metrics: Metrics) -> None:
        self._table, self._metrics = table, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def blamed(self, blame: Blame) -> None:
        """One request failed a pass all by itself."""
        blamed = [served_patch for served_patch in self._table.loaded() if served_patch.key == blame.patch]
        served_patch = blamed[0] if blamed else self._table.base
        self._metrics.failed.labels("exception" if blame.finite else "not finite", served_patch.label).inc()
        if blame.finite or served_patch.key is None or served_patch.digest in self._table.loader.condemned:
            return
        why = PatchNotFinite(
            f"{served_patch.label} gave values that are not finite while it answered", "train it again"
        )
        self._table.loader.condemned[served_patch.digest] = why
        log.error("%s; it is taken off", why.message)
        task = asyncio.create_task(self._take_off(served_patch.digest, why))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_off(self, digest: str, why: PatchNotFinite) -> None:
        table = self._table
        self._metrics.patch_failures.labels(type(why).__name__).inc()
        for served_patch in table.loaded():
            if served_patch.digest == digest:
                table.withdraw(served_patch, why)
        if table.active.digest != digest:
            return
        reason = why.message
        if table.guard is None or table.guard.policy.on_revoked != "stop":
            try:
                await table.rollback(WHO, "enforce")
                return
            except NestError as error:
                reason = f"{reason}; and there is no way back: {error.message}"
        table.halted = Stopped(
            f"this server has stopped answering: {reason}", "its operator has to activate another patch"
        )
        log.error("%s", table.halted)
