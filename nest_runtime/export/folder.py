"""Folders that appear whole or not at all, and only where nothing else is lost."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nest_runtime.errors import ExportError, reason_of
from nest_runtime.io import expand
from nest_runtime.patch.patch import Patch

NOTE = "nest_export.json"


@contextmanager
def new_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes ``target``'s place when the block ends, and is gone if it raises.

    Args:
        target: must not exist, or be empty; or, with ``overwrite``, an earlier export.
        overwrite: replace an earlier export: a folder with ``nest_export.json`` in it, and nothing else.

    Raises:
        ExportError: there is something else at ``target``, or it cannot be written.
    """
    target = expand(target).absolute()
    check_target(target, overwrite)
    name = f".{target.name}.{secrets.token_hex(6)}"
    work, old = target.with_name(name + ".tmp"), target.with_name(name + ".old")
    try:
        work.mkdir()
    except OSError as error:
        raise ExportError(
            f"{target.parent} cannot be written: {reason_of(error)}", "give --out in a folder of yours"
        ) from error
    try:
        yield work
        _sync(work)
        if target.exists():
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {reason_of(error)}", "make room on the disk, or export elsewhere"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ExportError if ``new_folder`` would; call it before the work."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(
            f"{target} is a file or a link; expected a folder to write", "name a folder that is not there"
        )
    if not target.parent.is_dir():
        raise ExportError(f"{target.parent} does not exist", "make the folder first, or export elsewhere")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / NOTE).is_file():
        raise ExportError(f"{target} is not empty, and no earlier export", "name a folder that is empty or not there")
    if not overwrite:
        raise ExportError(f"{target} holds an earlier export", "give --overwrite to replace it, or another --out")


def write_note(folder: Path, kind: str, patch: Patch, **more: Any) -> None:
    """Write ``nest_export.json``: which patch, for which base, in which form."""
    note = {
        "kind": kind,
        "patch": patch.label,
        "digest": patch.digest,
        "base_model": patch.base_model,
        "base_hash": patch.base_hash,
        **more,
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
