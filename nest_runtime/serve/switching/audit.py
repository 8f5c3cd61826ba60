"""The server's audit log: every load, activation, rollback, removal and refusal, and who asked.

An append-only, hash-chained JSONL file (store/history.py). A small head file beside it has the last line's number and
hash, so that missing lines at the end are noticed as well. Before a change an ``intent`` is written to the disk;
afterwards its outcome, which names the intent. A disk that fills up in between leaves an intent without an outcome,
never a record of something that did not happen. Texts from others are escaped and cut to a length. Prompts and
answers are never in it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest_runtime.errors import StoreError, reason_of
from nest_runtime.escape import visible
from nest_runtime.io import MAX_SETTINGS, atomic_write, parse_json, read_bytes
from nest_runtime.store.history import ChainLog

MAX_TEXT = 1000  # characters of any one field

log = logging.getLogger("nest_runtime.serve.switching.audit")


class AuditLog:
    """One audit file. Appends are safe between threads; between processes the chain's own lock keeps order.

    Args:
        path: the JSONL file; made, with its folder, at the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._chain = ChainLog(self.path)
        self._head = self.path.with_name(self.path.name + ".head")
        self._guard = threading.Lock()

    @property
    def kept(self) -> bool:
        """Whether there is, or was, such a log: its file or the head beside it."""
        return self.path.exists() or self._head.exists()

    def intend(self, event: Mapping[str, Any]) -> int:
        """Record a change before it is made; returns the number that the outcome names. Raises as ``record``."""
        return int(self.record({**event, "what": "intent", "of": event["what"], "done": False})["seq"])

    def unfinished(self) -> list[dict[str, Any]]:
        """The intents that no outcome names: the process ended in between, or the disk was full."""
        entries = self._chain.read()
        named = {entry.get("intent") for entry in entries}
        return [entry for entry in entries if entry.get("what") == "intent" and entry["seq"] not in named]

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Append an event; returns the sealed entry. Raises StoreError if the disk refuses."""
        shown = {key: visible(value, MAX_TEXT) if isinstance(value, str) else value for key, value in event.items()}
        try:
            with self._guard:
                entry = self._chain.append(shown)
                head = {"seq": entry["seq"], "hash": entry["hash"]}
                atomic_write(self._head, json.dumps(head).encode() + b"\n")
                return entry
        except OSError as error:
            raise StoreError(
                f"the audit log {self.path} cannot be written: {reason_of(error)}",
                "free space or fix its permissions; nothing is changed without an audit entry",
            ) from error

    def tail(self, limit: int) -> list[dict[str, Any]]:
        """The last ``limit`` entries, oldest first."""
        return self._chain.read()[-limit:] if limit else []

    def intact(self) -> bool:
        """Whether ``verify`` finds nothing wrong."""
        try:
            self.verify()
        except StoreError as error:
            log.error("the audit log does not verify: %s", error)
            return False
        return True

    def verify(self) -> int:
        """The number of entries, if none was edited, inserted, removed or cut off.

        A process killed between the line and the head leaves a log one line ahead of its head; that is no damage.

        Raises:
            StoreError: the message names the first line that is wrong.
        """
        count = self._chain.verify()
        head = self._read_head()
        if head is None:
            return count
        entries = self._chain.read()
        if len(entries) < head["seq"]:
            missing = f"lines {len(entries) + 1} to {head['seq']} are missing"
            raise StoreError(f"{self.path}: {missing}", "the log was cut; compare it with a backup")
        if entries[head["seq"] - 1]["hash"] != head["hash"]:
            raise StoreError(
                f"{self.path}: line {head['seq']} is not the one that its head file remembers",
                "the log was replaced; compare it with a backup",
            )
        return count

    def _read_head(self) -> dict[str, Any] | None:
        try:
            head = parse_json(read_bytes(self._head, MAX_SETTINGS))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self._head} is not JSON", "compare it with a backup") from error
        if not isinstance(head, dict) or not isinstance(head.get("seq"), int) or head["seq"] < 1:
            raise StoreError(f"{self._head} holds no head of a log", "compare it with a backup")
        return head
