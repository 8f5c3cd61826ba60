"""What of a switch outlives the process: the store's active patch, and what the trust memory has accepted.

Blocking; the table calls it from a thread, one change at a time.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nest_runtime.errors import NestError, StoreError
from nest_runtime.patch import Patch
from nest_runtime.registry.store import Store
from nest_runtime.serve.served import Served

if TYPE_CHECKING:
    from nest_runtime.registry.entries import Entry
    from nest_runtime.registry.trust import Verified
    from nest_runtime.registry.trust_guard import Guard

log = logging.getLogger("nest_runtime.serve.patches")


class Durable:
    """Writes switches down for the next start.

    Args:
        store: where references are looked up.
        model_name, model_hash: whose patches these are.
        follows_store: the active patch is the store's: switches are written there, so that a restart finds them.
        guard: holds the trust memory; None has none.
    """

    def __init__(
        self, store: Store, model_name: str, model_hash: str, *, follows_store: bool, guard: Guard | None
    ) -> None:
        self.follows_store = follows_store
        self.guard = guard
        self._store = store
        self._hash = model_hash
        self._server = f"the server of {model_name}"

    def previous(self) -> Entry | None:
        """The store's patch that a rollback returns to, or None."""
        return self._store.previous(self._hash)

    def write(self, what: str, new: Served, old: Served, verified: Verified | None, who: str) -> None:
        """Write down that ``new`` takes the place of ``old``.

        Args:
            what: "activate" or "rollback".
            new, old: the patches.
            verified: how ``new`` passed the guard; None where there is no guard.
            who: for the histories.

        Raises NestError or OSError where that cannot be done; the store then goes on naming ``old``.
        """
        try:
            if self.follows_store and new.patch is not None:
                (self._activate if what == "activate" else self._roll_back)(new.patch, who)
            if self.guard is not None and new.patch is not None and verified is not None:
                self.guard.accept(new.patch, verified, who=who, why=f"{what} on a server")
        except (NestError, OSError):
            self._put_back(old, who)
            raise

    def _activate(self, patch: Patch, who: str) -> None:
        active = self._store.active(self._hash)
        if active is not None and active.digest == patch.digest:
            return
        why = f"activated on {self._server}"
        self._store.add(patch, who=who, why=why)
        self._store.activate(patch.digest, model_hash=self._hash, who=who, why=why)

    def _roll_back(self, patch: Patch, who: str) -> None:
        entry = self._store.rollback(self._hash, who=who, why=f"rollback on {self._server}")
        if entry.digest != patch.digest:
            raise StoreError(
                f"the store was changed meanwhile: it went back to {entry.key}, not to {patch.name}@{patch.version}",
                "look at `nest-runtime history`, then try again",
            )

    def _put_back(self, old: Served, who: str) -> None:
        if not self.follows_store or old.patch is None:
            return
        try:
            self._activate(old.patch, who)
        except (NestError, OSError) as error:
            log.error("the store may name another patch than %s, which is on: %s", old.label, error)
