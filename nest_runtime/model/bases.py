"""Where the models are that were loaded or trained on here, so that a patch finds the base it was made on.

``$NEST_HOME/bases.json`` holds a model's hash, its name, and the absolute path it was loaded from (of a Hub model the
reference, pinned to its commit). What stands there is a hint and never believed: the path is hashed again, from the
cache of hashes as a rule, before it is used. A damaged or unwritable file costs a ``--model`` and is never an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nest_runtime.io import nest_home, write_text

_VERSION = 1
_KEEP = 256  # models remembered; the oldest go first


def bases_file() -> Path:
    """Where they are written down."""
    return nest_home() / "bases.json"


def remember_base(model_hash: str, name: str, source: Path) -> None:
    """Write down where a model was loaded from.

    Args:
        model_hash: of it.
        name: of it, for people.
        source: its folder or file; a snapshot in the Hub's cache is remembered as ``org/name@commit``.
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
    """What is written down for a hash, whether or not it is still true."""
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
