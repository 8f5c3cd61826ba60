"""The folder where nest-runtime keeps its store and caches, and paths that begin with ``~``."""

from __future__ import annotations

import os
from pathlib import Path

from nest_runtime.errors import UsageError


def nest_home() -> Path:
    """``$NEST_HOME`` where set and not empty, else ``~/.cache/nest-runtime``; not created here.

    Raises UsageError where this user has no home folder, as in some containers.
    """
    named = os.environ.get("NEST_HOME", "")
    return expand(named) if named else expand("~/.cache/nest-runtime")


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` and ``~user`` replaced. Raises UsageError where there is no such user, or no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        who = "this user" if str(path).startswith(("~/", "~\\")) or str(path) == "~" else str(path).split("/")[0]
        raise UsageError(
            f"the home folder of {who} cannot be found", "set NEST_HOME, or write the whole path"
        ) from error
