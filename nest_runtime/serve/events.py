"""What a server says: events as JSON lines on stdout or sentences on stderr, and its log."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from nest_runtime.escape import visible

BURST = 50  # log records of one kind
BURST_SECONDS = 10.0
Event = dict[str, Any]
Emit = Callable[[Event], None]

log = logging.getLogger("nest_runtime.serve")


def json_events(write: Emit) -> Emit:
    """Events as JSON lines, the first of which is ``ready``; loading and warnings go into the log, which is JSON too.

    Args:
        write: prints one event on stdout.
    """

    def emit(event: Event) -> None:
        """Log what is for people, and write the other events."""
        if event["event"] == "warning":
            log.warning(event["message"])
        elif event["event"] == "loading":
            log.info("loading %s", event["model"])
        else:
            write(event)

    return emit


def json_line(event: Event) -> None:
    """Print an event on stdout."""
    print(json.dumps(event), flush=True)


def sentence(event: Event) -> None:
    """Print an event on stderr, for people; not one that the log, which goes there too, has told already."""
    if event.get("logged"):
        return
    kind = event["event"]
    text = {
        "loading": lambda: f"loading {event['model']}",
        "ready": lambda: _ready_sentence(event),
        "warning": lambda: f"warning: {event['message']}",
        "stopping": lambda: f"stopping: {event['live']} sequences are finished first",
        "reloaded": lambda: "keys, tokens and the trust policy were read again",
        "followed": lambda: f"following {event['ref']}: patch {event['patch']} is on",
        "stopped": lambda: "stopped",
    }[kind]()
    print(visible(text), file=sys.stderr, flush=True)


def _ready_sentence(event: Event) -> str:
    admin = f", admin API at {event['admin_url']}" if "admin_url" in event else ""
    return f"serving {event['model']} with patch {event['patch']} at {event['url']}{admin}  (Ctrl-C ends it)"


def set_up_logging(as_json: bool) -> None:
    """The log goes to stderr, one line a record; where the program has its own handlers, those are kept."""
    ours = logging.getLogger("nest_runtime")
    if ours.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(Thinned())
    handler.addFilter(Escaped())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    for library in ("uvicorn.error", "asyncio"):
        logging.getLogger(library).addHandler(handler)


class Thinned(logging.Filter):
    """Lets so many records of one kind pass in a while, and counts the others: nobody fills a disk through the log.

    A record's kind is its ``kind`` if it has one (None: let it always pass), else the place in the code it is from.

    Args:
        burst: records of a kind in one while.
        seconds: how long a while is.
    """

    def __init__(self, burst: int = BURST, seconds: float = BURST_SECONDS) -> None:
        super().__init__()
        self._burst, self._seconds = burst, seconds
        self._lock = threading.Lock()
        self._whiles: dict[object, tuple[float, int]] = {}  # by kind: when it began, and how many records it had

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record; after a pause, notes on it how many were left out."""
        kind = getattr(record, "kind", (record.pathname, record.lineno))
        if kind is None:
            return True
        now = time.monotonic()
        with self._lock:
            began, count = self._whiles.get(kind, (now, 0))
            if now - began >= self._seconds:
                record.left_out = max(0, count - self._burst)
                began, count = now, 0
            self._whiles[kind] = (began, count + 1)
            return count < self._burst


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        left_out = getattr(record, "left_out", 0)
        return super().format(record) + (f" ({left_out} more like this one were left out)" if left_out else "")


class Escaped(logging.Filter):
    """Lets every record pass, on one line: names and errors of others neither forge a line nor steer the terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape control characters in the record's text; never drops it."""
        record.msg, record.args = visible(record.getMessage()), ()
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            record.fields = {key: visible(value) if isinstance(value, str) else value for key, value in fields.items()}
        return True


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None) or {"message": record.getMessage()}
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, **fields}
        if left_out := getattr(record, "left_out", 0):
            line["left_out"] = left_out
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
