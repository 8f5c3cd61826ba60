"""What of a switch outlives the process: the store's active patch, and what the trust memory has accepted.

Blocking; the table calls it from a thread, one change at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nest_runtime.patch import Patch
from nest_runtime.registry.activation import Asked, accept, activate, roll_back
from nest_runtime.registry.store import Store

if TYPE_CHECKING:
    from nest_runtime.registry.entries import Entry
    from nest_runtime.registry.trust_guard import Guard


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

    def write(self, what: str, new: Patch, who: str) -> None:
        """Write down that ``new`` is put in force: all of it, or nothing.

        Args:
            what: "activate" or "rollback".
            new: the patch.
            who: for the histories.

        Raises NestError or OSError where that cannot be done; the store then names what it named before.
        """
        back = what == "rollback"
        asked = Asked(who, f"{'rolled back' if back else 'activated'} on {self._server}", allow_downgrade=back)
        active = self._store.active(self._hash) if self.follows_store else None
        if not self.follows_store or (not back and active is not None and active.digest == new.digest):
            accept(new, self.guard, asked)
        elif back:
            roll_back(self._store, self.guard, asked, model_hash=self._hash, to=new)
        else:
            activate(self._store, new, self.guard, asked, model_hash=self._hash)
