"""Remembers hashes of checkpoint folders by the identity of their files.

Identity is path, size, modification and change times in nanoseconds, and inode of every weight
file. A damaged or unwritable cache costs a hash and is never an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nest_runtime.io import nest_home, write_text

_VERSION = 1
_KEEP = 256  # folders remembered; the oldest go first
_SETTLED_NS = 2_000_000_000  # a file touched more recently may change again within one clock tick


class HashCache:
    """The cache's entry for one set of files; their identity is taken when the object is made."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [path.resolve() for path in files]
        self.key = self._key()

    @property
    def path(self) -> Path:
        """The cache's file."""
        return nest_home() / "cache" / "model-hashes.json"

    def get(self) -> dict[str, Any] | None:
        """The remembered result, or None."""
        entry = self._load().get(self.key)
        return entry if _valid(entry) else None

    def put(self, result: dict[str, Any]) -> None:
        """Remember a result, unless the files changed while they were hashed or a moment before."""
        newest = max(max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in self.files)
        if self._key() != self.key or time.time_ns() - newest < _SETTLED_NS:
            return
        entries = {key: value for key, value in self._load().items() if _valid(value)}
        entries.pop(self.key, None)
        entries = dict([*entries.items(), (self.key, result)][-_KEEP:])
        try:
            write_text(self.path, json.dumps({"version": _VERSION, "entries": entries}, indent=1))
        except OSError:
            return  # a read-only or full home: the next call hashes again

    def _key(self) -> str:
        stats = [(str(path), path.stat()) for path in self.files]
        facts = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for name, s in stats]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            return {}
        entries = content.get("entries")
        return entries if isinstance(entries, dict) else {}


def _valid(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("hash"), str)
        and re.fullmatch(r"sha256:[0-9a-f]{64}", entry["hash"]) is not None
        and all(type(entry.get(key)) is int for key in ("tensors", "bytes"))
    )
