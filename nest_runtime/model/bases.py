"""Where models were loaded from on this machine, so that a patch finds the base it was made on.

``$NEST_HOME/bases.json`` holds a model's hash, its name, and the absolute path it was loaded from (for a Hub model the
reference, pinned to its commit). An entry is a hint and never trusted: the path is hashed again before it is used,
usually from the cache of hashes. A damaged or unwritable file never raises; then ``--model`` must be given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nest_runtime.io import nest_home, write_text

_VERSION = 1
_KEEP = 256  # models remembered; the oldest go first


def bases_file() -> Path:
    """The file that holds them."""
    return nest_home() / "bases.json"


def remember_base(model_hash: str, name: str, source: Path) -> None:
    """Record where a model was loaded from.

    Args:
        model_hash: its hash.
        name: its name, for people.
        source: its folder or file; a snapshot in the Hub's cache is recorded as ``org/name@commit``.
    """
    place = f"{name}@{source.name}" if source.parent.name == "snapshots" and "/" in name else str(source.absolute())
    known = _read()
    entry = {"name": name, "path": place}
    if known.get(model_hash) == entry:
        return
    known.pop(model_hash, None)
    kept = dict([*known.items(), (model_hash, entry)][-_KEEP:])
    try:
        write_text(bases_file(), json.dumps({"version": _VERSION, "bases": kept}, indent=1, ensure_ascii=False))
    except OSError:
        return  # a read-only or full home


def noted_base(model_hash: str) -> str | None:
    """What is recorded for a hash, whether or not it is still true."""
    return (_read().get(model_hash) or {}).get("path")


def _read() -> dict[str, dict[str, str]]:
    try:
        content: Any = json.loads(bases_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return {}
    bases = content.get("bases")
    return {key: value for key, value in bases.items() if _valid(value)} if isinstance(bases, dict) else {}


def _valid(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "path"))
