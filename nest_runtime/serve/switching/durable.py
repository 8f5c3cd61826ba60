"""What of a switch outlives the process: the store's active patch, and what the trust memory has accepted.

Blocking; the table calls it from a thread, one change at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nest_runtime.patch.patch import Patch
from nest_runtime.store.store import Store
from nest_runtime.trust.activate import SwitchRequest, accept, activate, roll_back

if TYPE_CHECKING:
    from nest_runtime.store.entries import Entry
    from nest_runtime.trust.guard import Guard


class Durable:
    """Records switches for the next start.

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

    def active(self) -> Entry | None:
        """The store's active patch of this model, or None: not this server's where somebody changed the store."""
        return self._store.active(self._hash)

    def stored(self, serving: str | None) -> dict[str, Any]:
        """What the store names as active, whether switches of this server are written there, and whether both agree.

        Args:
            serving: the digest of the patch that answers here, or None for the base.
        """
        entry = self.active()
        return {
            "active": None if entry is None else entry.key,
            "digest": None if entry is None else entry.digest,
            "followed": self.follows_store,
            "agrees": serving == (None if entry is None else entry.digest),
        }

    def parted(self, serving: str | None) -> str:
        """The end of a sentence that says how store and server differ; empty if they agree."""
        stored = self.stored(serving)
        if stored["agrees"] or stored["active"] is None:
            return ""
        why = "" if self.follows_store else " (it was started with --patch, and has a history of its own)"
        return f"; the store names {stored['active']}, which this server was not switched to{why}"

    def previous(self, serving: str) -> Entry | None:
        """The store's patch that a rollback from ``serving``, a digest, returns to, or None."""
        return self._store.previous(self._hash, serving=serving)

    def write(self, what: str, new: Patch, who: str, serving: str) -> None:
        """Record that ``new`` becomes active: all of it, or nothing.

        Args:
            what: "activate" or "rollback".
            new: the patch.
            who: for the histories.
            serving: the digest of the patch that it replaces here; the store may name another meanwhile.

        Raises:
            NestError, OSError: that cannot be done; the store then names what it named before.
        """
        back = what == "rollback"
        why = f"{'rolled back' if back else 'activated'} on {self._server}"
        asked = SwitchRequest(who, why, allow_downgrade=back, serving=serving)
        active = self.active() if self.follows_store else None
        if not self.follows_store or (not back and active is not None and active.digest == new.digest):
            accept(new, self.guard, asked)
        elif back:
            roll_back(self._store, self.guard, asked, model_hash=self._hash, to=new)
        else:
            activate(self._store, new, self.guard, asked, model_hash=self._hash)
