"""Room for one more write, reserved in advance, because restoring must not fail on a full disk.

A file of the size that may be needed is written and synced before the work. Writing into it later takes no new space
(except on some file systems that copy on write), and neither does renaming it over the target.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from nest_runtime.errors import StoreError, reason_of
from nest_runtime.io import sync_folder

NAME = ".spare.tmp"  # removed by the store's gc, where a process was killed


class Spare:
    """A context in which ``write`` can replace one file even if the disk is full.

    Args:
        target: the file.
        folder: where the room is reserved; on the same file system.
        size: the most bytes that will be written.
    """

    def __init__(self, target: Path, folder: Path, size: int) -> None:
        self._target, self._path, self._size = target, folder / NAME, size

    def __enter__(self) -> Spare:
        try:
            with self._path.open("wb") as file:
                file.write(bytes(self._size))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._path.unlink(missing_ok=True)
            raise StoreError(
                f"the store cannot be written: {reason_of(error)}", "free some space; nothing was changed"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Replace the target. Raises OSError, also where more is to be written than was said."""
        if len(data) > self._size:
            raise OSError(f"{len(data)} bytes; room was taken for {self._size}")
        with self._path.open("r+b") as file:
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        if self._target.exists():
            os.chmod(self._path, self._target.stat().st_mode & 0o777)
        os.replace(self._path, self._target)
        sync_folder(self._target.parent)
