"""What a server says: events as JSON lines on stdout or sentences on stderr, and its log."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from nest_runtime.escape import visible

Event = dict[str, Any]
Emit = Callable[[Event], None]

log = logging.getLogger("nest_runtime.serve")


def json_events(write: Emit) -> Emit:
    """Events as JSON lines, the first of which is ``ready``; loading and warnings go into the log, which is JSON too.

    Args:
        write: prints one event on stdout.
    """

    def emit(event: Event) -> None:
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
    """Print an event on stderr, for people."""
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
    handler.setFormatter(_JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(Escaped())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").addHandler(handler)


class Escaped(logging.Filter):
    """Lets every record pass, on one line: names and errors of others neither forge a line nor steer the terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
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
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
