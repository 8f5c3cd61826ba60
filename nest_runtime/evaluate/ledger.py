"""An append-only JSONL of finished work by key, so that an interrupted run continues where it stopped.

Each line is written whole and flushed. A last line that was cut off by an interrupt is dropped; damage
anywhere else is an error, since a silent gap would change figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nest_runtime.errors import EvaluationError


class Ledger:
    """What is done, by key; kept in a file where a path is given, in memory otherwise."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._load(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row kept under ``key``, or None."""
        return self._rows.get(key)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: dict[str, dict[str, Any]]) -> None:
        """Keep rows under their keys, on disk before this returns."""
        self._rows.update(rows)
        if self._path is None or not rows:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for key, row in rows.items():
                file.write(json.dumps({"key": key, **row}, ensure_ascii=True) + "\n")

    def _load(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._rows[row.pop("key")] = row
            except (ValueError, KeyError, AttributeError) as error:
                raise EvaluationError(
                    f"{path}:{number}: not a line of a work file: {line[:60]!r}", "delete the file to begin anew"
                ) from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
