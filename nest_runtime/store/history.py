"""An append-only JSON-lines log in which every line carries the hash of the one before.

The store's history and the server's audit log use it. ``verify`` finds an edited, inserted, reordered or missing
line. It finds a missing *last* line only against a head kept elsewhere (the store keeps it in its index). Someone who
can rewrite the whole file can also rebuild the chain: this finds accidents and careless edits, it is no signature.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nest_runtime.errors import StoreError
from nest_runtime.io import canonical_json, open_file, parse_json
from nest_runtime.store.locked import locked

GENESIS = "sha256:" + "0" * 64
TAIL_BYTES = 65536


def seal(event: Mapping[str, Any], previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry for ``event`` after ``previous``: ``seq``, ``at`` (ISO 8601, UTC), the event, ``prev``, ``hash``.

    Args:
        event: JSON values; must not hold the keys seq, prev or hash. ``at`` may be given.
        previous: the last entry, or None for the first.
    """
    entry: dict[str, Any] = {
        "seq": previous["seq"] + 1 if previous else 1,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **event,
        "prev": previous["hash"] if previous else GENESIS,
    }
    entry["hash"] = entry_hash(entry)
    return entry


def entry_hash(entry: Mapping[str, Any]) -> str:
    """``sha256:<hex>`` over the entry's canonical JSON without its own hash."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    return "sha256:" + hashlib.sha256(_canonical(content)).hexdigest()


def actor() -> str:
    """``user@host``, for the ``who`` of an entry."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no passwd entry, as in some containers
        user = f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"
    return f"{user}@{socket.gethostname()}"


class ChainLog:
    """One chained log file. Appends are safe between threads and processes.

    Args:
        path: the file; it and its folder are made at the first append.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Seal ``event`` after the last line, write it, fsync, and return it.

        Raises:
            StoreError: another process holds the lock.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        guard = self.path.with_name(self.path.name + ".lock")
        with locked(guard):
            entry = seal(event, self.last())
            self.write(entry)
            return entry

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a sealed entry. The caller holds a lock. A torn last line, left by a crash, is removed first."""
        self._drop_torn_tail()
        with self.path.open("ab") as file:
            file.write(_canonical(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def last(self) -> dict[str, Any] | None:
        """The last complete entry that can be read, or None in an empty log."""
        for read in (self._tail, self._lines):  # the whole file only where its end holds no entry
            for line in reversed(read()):
                entry = _parse(line)
                if entry is not None:
                    return entry
        return None

    def read(self) -> list[dict[str, Any]]:
        """All complete entries, oldest first. Lines that are no entries are left out: ``verify`` names them."""
        return [entry for line in self._lines() if (entry := _parse(line)) is not None]

    def verify(self, head: Mapping[str, Any] | None = None) -> int:
        """Check the whole chain; returns the number of entries.

        Args:
            head: the last entry as remembered elsewhere, or None if nothing is.

        Raises:
            StoreError: the message names the first line that does not fit.
        """
        previous: dict[str, Any] | None = None
        for number, line in enumerate(self._lines(), start=1):
            entry = _parse(line)
            if entry is None:
                raise self._broken(number, "is no entry of this log")
            if entry["hash"] != entry_hash(entry):
                raise self._broken(number, f"was edited: its content does not give its hash {entry['hash'][:19]}")
            seq, prev = (previous["seq"] + 1, previous["hash"]) if previous else (1, GENESIS)
            if (entry["seq"], entry["prev"]) != (seq, prev):
                raise self._broken(number, f"has number {entry['seq']} where {seq} was expected: lines were removed")
            previous = entry
        if head is not None and (previous is None or previous["hash"] != head["hash"]):
            found = previous["seq"] if previous else 0
            raise self._broken(found + 1, f"is missing: the log ends at {found}, the index at {head['seq']}")
        return previous["seq"] if previous else 0

    def _broken(self, number: int, what: str) -> StoreError:
        return StoreError(
            f"{self.path}: line {number} {what}",
            "someone or something changed this log; compare it with a backup before trusting it",
        )

    def _tail(self) -> list[bytes]:
        """Complete lines among the last TAIL_BYTES; the first may be cut, and then does not parse."""
        try:
            with open_file(self.path) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                return file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return []

    def _lines(self) -> list[bytes]:
        try:
            with open_file(self.path) as file:
                data = file.read()
        except FileNotFoundError:
            return []
        return data.split(b"\n")[:-1]  # what follows the last newline was never completed

    def _drop_torn_tail(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) in (b"\n", b""):
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            os.fsync(file.fileno())


def _canonical(value: Mapping[str, Any]) -> bytes:
    return canonical_json(
        value, errors="backslashreplace"
    )  # half of a surrogate pair stays JSON, and is read back as it was


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("seq"), int):
        return None
    return entry if isinstance(entry.get("hash"), str) and isinstance(entry.get("prev"), str) else None
