"""Files of secrets: tokens, keys and logins, a line each, for their owner's eyes.

One reader for all of them. A byte order mark and the line ends of other systems are no part of a secret; blank lines
and comments are none. Mode and content are taken from one and the same open file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nest_runtime.errors import UsageError, reason_of
from nest_runtime.io import MAX_SETTINGS, lines_of, open_file

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def secret_lines(path: Path, what: str, *, secret: bool = True) -> list[tuple[int, str]]:
    """The lines of a file that hold something, as they stand there, with their numbers.

    Args:
        path: the file.
        what: how to call it in errors, e.g. "admin token file".
        secret: refuse it where others may read it; otherwise only where they may write it.

    Raises:
        UsageError: the file cannot be read, is not text, or is open to others.
    """
    try:
        with open_file(path, MAX_SETTINGS) as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read(MAX_SETTINGS)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read: {reason_of(error)}", "check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the {what} {path} is not UTF-8: {error}", "save it as UTF-8") from error
    if os.name == "posix" and mode & (_OTHERS if secret else _OTHERS_WRITE):
        may = "written" if mode & _OTHERS_WRITE else "read"
        raise UsageError(
            f"the {what} {path} can be {may} by others (mode {mode & 0o777:o}); expected 600", f"chmod 600 {path}"
        )
    numbered = enumerate(lines_of(text), start=1)
    return [(number, line) for number, line in numbered if line.strip() and not line.lstrip().startswith("#")]
