"""What this machine has seen of repositories: which commit a version was at, and which patch it held.

    $NEST_HOME/store/origins.json

A version that later has other content was moved, and is refused. So is a patch of another name than the repository
was first seen with: a key may sign for several patches, and a repository holds one. Offline, a version is found in
the Hub client's cache by the commit recorded here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nest_runtime.errors import TrustError
from nest_runtime.escape import short
from nest_runtime.hub.repository import LATEST, RepoRef
from nest_runtime.store.locked import LockedJson

MAX_ORIGINS = 1 << 26  # bytes


@dataclass(frozen=True)
class Origin:
    """Where a patch was pushed to or pulled from.

    Attributes:
        place: the repository.
        version: the version asked for, or ``main``; empty in the row that holds the place's name.
        revision: the commit's sha, or a mirror's folder.
        digest: of the patch.
        at: when it was last seen there.
        name: what the patch is called; empty in rows of earlier releases.
    """

    place: str
    version: str
    revision: str
    digest: str
    at: str = ""
    name: str = ""


class Origins:
    """The file of origins; safe between processes.

    Args:
        store_root: the store's folder.
    """

    def __init__(self, store_root: Path) -> None:
        path = store_root / "origins.json"
        self._file = LockedJson(
            path,
            path.with_suffix(".lock"),
            empty=dict,
            parse=_parse,
            dump=_dump,
            forgets="which commits versions were at",
            limit=MAX_ORIGINS,
        )

    def find(self, place: str, version: str) -> Origin | None:
        """What is known of a version of a repository."""
        return self._file.read().get(f"{place}@{version}")

    def of_patch(self, digest: str) -> list[Origin]:
        """Every place that a patch was seen at."""
        return [origin for origin in self._file.read().values() if origin.digest == digest]

    def check_name(self, ref: RepoRef, name: str) -> None:
        """Refuse a patch of another name than asked for, or than the place was first seen with. Raises TrustError."""
        known = self.find(ref.place, "")
        expected = ref.name or (known.name if known is not None else "")
        if expected and name != expected:
            asked = f"expected {expected}" if ref.name else f"on this machine {ref.place} is of {expected}"
            raise TrustError(
                f"{ref} serves a patch called {name}; {asked}",
                f"its publisher, or whoever keeps the place, put another there; if that is meant, "
                f"say so: {RepoRef(ref.place, ref.revision or LATEST, name)}",
            )

    def check(self, ref: RepoRef, version: str, revision: str, digest: str) -> None:
        """Refuse a published version whose content changed.

        Args:
            ref: the repository.
            version, revision, digest: what is there now.

        Raises:
            TrustError: the version had another digest when it was seen first.
        """
        known = self.find(ref.place, version)
        if known is not None and known.digest != digest:
            raise TrustError(
                f"{ref.place} serves {short(digest)} as {version} (at {revision[:12]}); "
                f"on this machine it was {short(known.digest)} (at {known.revision[:12]})",
                "a published version never changes: its tag was moved; ask its publisher",
            )

    def record(self, place: str, version: str, revision: str, digest: str, name: str) -> None:
        """Remember a version, and that the place is of this name. Raises StoreError if the disk refuses."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._file.changing() as known:
            for key in (version, ""):
                known[f"{place}@{key}"] = Origin(place, key, revision, digest, now, name)
            self._file.write(known)


def _parse(rows: Any) -> dict[str, Origin]:
    return {key: Origin(**row) for key, row in rows.items()}


def _dump(origins: dict[str, Origin]) -> Any:
    return {key: asdict(origin) for key, origin in origins.items()}
