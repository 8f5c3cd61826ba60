"""The audit of changes: what is intended is written down before it is made, and then what came of it.

Every attempt has its outcome, refusals too. What the changes are, table.py knows.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from nest_runtime.errors import NestError, StoreError, reason_of
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.switching.audit import AuditLog

log = logging.getLogger("nest_runtime.serve.switching.table")


class ChangeLog:
    """Writes the changes of a server's patches into the audit log.

    Args:
        audit: the log.
        pool: the threads that write.
        on_refusal: called with what was tried and why it was refused.
    """

    def __init__(self, audit: AuditLog, pool: Pool, on_refusal: Callable[[str, NestError], None]) -> None:
        self._audit, self._pool, self._on_refusal = audit, pool, on_refusal

    @asynccontextmanager
    async def audited(self, what: str, who: str, **details: str) -> AsyncIterator[dict[str, Any]]:
        """A context for one change: its outcome is audited, and a refusal is raised to the caller."""
        event: dict[str, Any] = {"what": what, "who": who, **details}
        try:
            yield event
        except NestError as error:
            await self._refused(event, error)
            raise
        except OSError as error:
            full = StoreError(
                f"the disk refuses: {reason_of(error)}", "nothing was changed: free space or fix permissions"
            )
            await self._refused(event, full)
            raise full from error
        except Exception as error:  # nothing that was foreseen, and written down all the same
            await self._refused(event, NestError(f"{type(error).__name__}: {error}"))
            raise
        else:
            await self._done(event)

    async def _refused(self, event: dict[str, Any], error: NestError) -> None:
        refusal = {**event, "done": False, "error": type(error).__name__, "reason": error.message}
        self._on_refusal(event["what"], error)
        try:
            await self._pool.run(self._audit.record, refusal)
        except StoreError as unwritten:
            log.error("a refused %s could not be audited: %s", event["what"], unwritten)

    async def _done(self, event: dict[str, Any]) -> None:
        """Record that a change was made. If the disk fails, its intent is there, and the log says more."""
        try:
            await self._pool.run(self._audit.record, {**event, "done": True})
        except StoreError as unwritten:
            log.error("a %s was made, and its outcome could not be audited: %s", event["what"], unwritten)

    async def intend(self, event: dict[str, Any]) -> None:
        """Record a change before it is made; its outcome is a separate entry, which names this one under ``intent``.

        Raises:
            StoreError: the disk refuses: the change must not be made.
        """
        event["intent"] = await self._pool.run(self._audit.intend, event)
