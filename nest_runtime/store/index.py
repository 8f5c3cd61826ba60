"""The store's index: one JSON file that says which patches have which names, and which are active.

A value with a byte form; reading and replacing the file, and everything that is decided, is store.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nest_runtime.errors import StoreError, UsageError, reason_of
from nest_runtime.escape import short
from nest_runtime.io import parse_json
from nest_runtime.store import history
from nest_runtime.store.entries import Entry, entry_from_json

INDEX_FORMAT = 1


@dataclass
class Index:
    """What index.json holds.

    Attributes:
        patches: the stored entries, in the order of adding.
        active: model hash → its activations, oldest first; the last one is in force.
        head: the last history entry.
        pending: the head may not stand in the history file yet.
    """

    patches: list[Entry] = field(default_factory=list)
    active: dict[str, list[Entry]] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    pending: bool = False

    def copy(self) -> Index:
        """A copy that can be changed independently."""
        active = {model: [*stack] for model, stack in self.active.items()}
        return Index([*self.patches], active, self.head, self.pending)

    def to_bytes(self) -> bytes:
        """The file's content."""
        rows = {
            "format": INDEX_FORMAT,
            "patches": [entry.to_json() for entry in self.patches],
            "active": {model: [entry.to_json() for entry in stack] for model, stack in self.active.items()},
            "head": self.head,
            "pending": self.pending,
        }
        return json.dumps(rows, indent=1, sort_keys=True).encode() + b"\n"

    def active_entry(self, base_hash: str) -> Entry | None:
        """The entry of the patch that is active for a model."""
        stack = self.active.get(base_hash)
        return stack[-1] if stack else None

    def is_active(self, entry: Entry) -> bool:
        """Whether an entry is the active one of its model."""
        active = self.active_entry(entry.base_hash)
        return active is not None and active.digest == entry.digest

    def before(self, base_hash: str, serving: str | None = None) -> list[Entry]:
        """The activations that a rollback leaves: those before the one in force, oldest first.

        Args:
            base_hash: the model's.
            serving: what a server answers with, by digest, where it may have parted from this store. What was activated
                here after it was never on there, and goes with it; what was rolled back here stays so.
        """
        stack = self.active.get(base_hash, [])
        digest = stack[-1].digest if stack and serving is None else serving
        places = [place for place, entry in enumerate(stack) if entry.digest == digest]
        return stack[: places[-1]] if places else [*stack]

    def only_model(self) -> str:
        """The one model that has an active patch. Raises StoreError for none, UsageError for several."""
        models = sorted(model for model, stack in self.active.items() if stack)
        if not models:
            raise StoreError("no patch is active for any model: nothing to roll back to", "activate a patch first")
        if len(models) > 1:
            names = ", ".join(self.active[model][-1].base_model or short(model) for model in models)
            raise UsageError(f"patches are active for several models: {names}", "say which with --model")
        return models[0]


def undone(now: Index, before: Index, last: dict[str, Any] | None, event: dict[str, Any]) -> Index | None:
    """The index that puts names and active patches back as they were; None if they are so.

    Args:
        now: as on the disk; what was changed may have ended in the middle of a write.
        before: as it was.
        last: the last entry that the history file holds.
        event: the entry that says so, where the history says what is undone.
    """
    if now == before:
        return None
    if last is None or (before.head is not None and last["hash"] == before.head["hash"]):
        return before
    what = {key: last.get(key) for key in ("name", "version", "digest", "base_hash")}
    return replace(before, head=history.seal({**event, **what}, last), pending=True)


def read_index(path: Path) -> Index:
    """The index of a file; an empty one if there is none.

    Raises:
        StoreError: the file is damaged or of another format.
    """
    try:
        rows = parse_json(path.read_bytes())
    except FileNotFoundError:
        return Index()
    except ValueError as error:
        raise StoreError(f"{path} is not JSON: {error}", "restore it from a backup, or move it away") from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {reason_of(error)}", "fix its permissions, or set NEST_HOME"
        ) from error
    if not isinstance(rows, dict) or rows.get("format") != INDEX_FORMAT:
        found = rows.get("format") if isinstance(rows, dict) else type(rows).__name__
        raise StoreError(
            f"{path} has format {found!r}; expected {INDEX_FORMAT}", "update nest-runtime, or move it away"
        )
    try:
        return Index(
            patches=[entry_from_json(row) for row in rows["patches"]],
            active={model: [entry_from_json(row) for row in stack] for model, stack in rows["active"].items()},
            head=rows["head"],
            pending=bool(rows["pending"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: {error}", "restore it from a backup, or move it away") from error
