"""Which servers of this home are running: each leaves a note for commands on the same machine.

    servers/PID-PORT.json   where it listens and what it serves
    servers/PID-PORT.lock   held as long as it runs; the system releases it however the process ends

A note whose lock is free belongs to a dead server, and is removed. Nothing here sends a request to a server, and no
token is written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from nest_runtime.io import MAX_SETTINGS, atomic_write, nest_home, parse_json, read_bytes

log = logging.getLogger("nest_runtime.serve.server")


@dataclass(frozen=True)
class Note:
    """One running server.

    Attributes:
        url: where clients ask.
        admin_url: where the admin API answers; None if it is off.
        pid: its process.
        model, model_hash: what it serves.
        follows_store: it started with the store's active patch, and writes its switches there.
    """

    url: str
    admin_url: str | None
    pid: int
    model: str
    model_hash: str
    follows_store: bool


def _folder() -> Path:
    return nest_home() / "servers"


@contextmanager
def noted(note: Note) -> Iterator[None]:
    """A context in which commands on this machine find the server. Where the home cannot be written, they do not."""
    path = _folder() / f"{note.pid}-{urlsplit(note.url).port}.json"
    guard = FileLock(path.with_suffix(".lock"), timeout=5, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard.acquire()
        atomic_write(path, json.dumps(asdict(note)).encode() + b"\n")
    except (OSError, Timeout) as error:
        log.warning("commands on this machine will not see this server: %s", error)
        guard.release()
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        guard.release()
        with suppress(OSError):
            path.with_suffix(".lock").unlink(missing_ok=True)


def running(model_hash: str | None = None) -> list[Note]:
    """The servers of this home that run now, of one model if ``model_hash`` is given; oldest first."""
    found = []
    for path in sorted(_folder().glob("*.json"), key=_age):
        if _is_held(path.with_suffix(".lock")):
            with suppress(OSError, ValueError, TypeError):  # it ended just now, or another version wrote it
                found.append(Note(**parse_json(read_bytes(path, MAX_SETTINGS))))
        else:
            for left in (path, path.with_suffix(".lock")):
                with suppress(OSError):
                    left.unlink(missing_ok=True)
    return [note for note in found if model_hash in (None, note.model_hash)]


def _age(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _is_held(lock: Path) -> bool:
    """Whether a running process holds a lock file."""
    if not os.access(lock, os.R_OK | os.W_OK):
        return lock.exists()  # another user's: it cannot be tried
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False
