"""The patches a runtime holds, and the names that find them. Nothing here touches a model."""

from __future__ import annotations

from nest_runtime.errors import NestError, PatchNotFound, UsageError
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime.delta import Loaded


class Table:
    """Patches by name and version, in the order in which they were added.

    A patch's key is its version (``v3``), or ``name@v3`` if two names have the same version.
    """

    def __init__(self) -> None:
        self._entries: tuple[Loaded, ...] = ()  # replaced whole: read without a lock

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._entries)

    def same(self, patch: Patch) -> Loaded | None:
        """The entry with the same content as ``patch``, if there is one.

        Raises:
            NestError: there is other content under the same name and version.
        """
        for entry in self._entries:
            if entry.patch.digest == patch.digest:
                return entry
        for entry in self._entries:
            if (entry.patch.name, entry.patch.version) == (patch.name, patch.version):
                raise NestError(
                    f"{entry.full_name} is already here with digest {entry.patch.digest}; this one has {patch.digest}",
                    "give new content a new version, or remove the old patch first",
                )
        return None

    def insert(self, loaded: Loaded) -> None:
        """Add a loaded patch."""
        self._entries = (*self._entries, loaded)

    def delete(self, loaded: Loaded) -> None:
        """Remove a loaded patch."""
        self._entries = tuple(entry for entry in self._entries if entry is not loaded)

    def key(self, loaded: Loaded) -> str:
        """The shortest name that finds an entry."""
        version = loaded.patch.version
        shared = sum(entry.patch.version == version for entry in self._entries) > 1
        return loaded.full_name if shared else version

    def find(self, reference: str) -> Loaded:
        """The entry called ``v3``, ``name@v3`` or ``sha256:<hex>``.

        Raises:
            PatchNotFound: there is none.
            UsageError: the version belongs to several names.
        """
        entries = self._entries
        found = [e for e in entries if reference in (e.full_name, e.patch.digest)]
        found = found or [e for e in entries if e.patch.version == reference]
        if not found:
            held = ", ".join(self.key(entry) for entry in entries) or "none"
            raise PatchNotFound(f"no patch {reference!r} in this runtime; it holds: {held}", "add() it first")
        if len(found) > 1:
            names = ", ".join(entry.full_name for entry in found)
            raise UsageError(f"version {reference!r} belongs to several patches: {names}", "use one of these names")
        return found[0]
