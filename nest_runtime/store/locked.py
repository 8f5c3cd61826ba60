"""JSON files that several processes read and change. One at a time changes them, and readers see a whole file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from nest_runtime.errors import StoreError, reason_of
from nest_runtime.io import atomic_write, parse_json, read_bytes

T = TypeVar("T")
LOCK_SECONDS = 30.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context that one process has at a time; ``path`` is the lock's own file, in a folder that is there.

    Raises:
        StoreError: another has held it for half a minute.
        OSError: it cannot be made.
    """
    guard = FileLock(path, timeout=LOCK_SECONDS)
    try:
        guard.acquire()
    except Timeout as error:
        raise StoreError(
            f"another process has held the lock {path} for over {LOCK_SECONDS:.0f} s",
            "wait for the other nest-runtime command to end, then try again",
        ) from error
    try:
        yield
    finally:
        guard.release()


class LockedJson(Generic[T]):
    """One such file, with a lock beside it.

    Args:
        path: the file; made, with its folder, when something is first written.
        lock: the lock's file.
        empty: what stands for a file that is not there.
        parse: makes the value of its JSON; raises ValueError, TypeError, KeyError or AttributeError for damage.
        dump: makes JSON of the value.
        forgets: what is lost with the file, for the hint where it cannot be read.
        limit: bytes that are read at most.
    """

    def __init__(
        self,
        path: Path,
        lock: Path,
        *,
        empty: Callable[[], T],
        parse: Callable[[Any], T],
        dump: Callable[[T], Any],
        forgets: str,
        limit: int,
    ) -> None:
        self.path = path
        self._lock = lock
        self._empty = empty
        self._parse = parse
        self._dump = dump
        self._forgets = forgets
        self._limit = limit

    def read(self) -> T:
        """The value now. Raises StoreError if the file is damaged or cannot be read."""
        try:
            return self._parse(parse_json(read_bytes(self.path, self._limit)))
        except FileNotFoundError:
            return self._empty()
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise StoreError(
                f"{self.path} cannot be read: {reason_of(error)}",
                f"restore it from a backup; moving it away forgets {self._forgets}",
            ) from error

    @contextmanager
    def changing(self) -> Iterator[T]:
        """A context with the value, in which no other process changes it; :meth:`write` applies a change.

        Raises:
            StoreError: the folder cannot be written, within the context too, or the lock cannot be had.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._lock):
                yield self.read()
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {reason_of(error)}", "set NEST_HOME elsewhere") from error

    def write(self, value: T) -> None:
        """Replace the file; only inside ``changing``. Raises OSError, which ``changing`` makes a StoreError."""
        data = json.dumps(self._dump(value), indent=1, sort_keys=True).encode() + b"\n"
        atomic_write(self.path, data)
