"""The store's patches by digest: files that are written once, and checked whenever they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import DigestMismatch, StoreError
from nest_runtime.escape import short
from nest_runtime.io import atomic_write, sync_folder
from nest_runtime.store.entries import Entry, builtin_entries

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch


def object_path(root: Path, digest: str) -> Path:
    """Where a store keeps the patch of a digest."""
    algorithm, _, digits = digest.partition(":")
    return root / "objects" / algorithm / digits[:2] / f"{digits}.safetensors"


def read_object(root: Path, entry: Entry) -> Patch:
    """The patch of an entry, from the store or from the package.

    Raises:
        StoreError: its bytes are gone.
        DigestMismatch, PatchFormatError: they are others.
    """
    from nest_runtime.patch.file import read_patch

    path = object_path(root, entry.digest)
    if not path.exists():
        built_in = builtin_entries().get(entry.digest)
        if built_in is None:
            raise StoreError(
                f"the bytes of {entry.key} ({short(entry.digest)}) are gone from {path}",
                "add its file again with `nest-runtime add FILE`",
            )
        path = built_in[1]
    patch = read_patch(path)
    if patch.digest != entry.digest:
        raise DigestMismatch(
            f"{path} holds {patch.digest}; the store expects {entry.digest}",
            "the file was changed or replaced: remove it and add the patch again from its source",
        )
    return patch


def write_object(root: Path, digest: str, data: bytes) -> None:
    """Write an object, or write it again: adding a patch again repairs what a failing disk damaged. Raises OSError."""
    path = object_path(root, digest)
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data, workdir=root / "tmp")
    for folder in (path.parent.parent, path.parent.parent.parent, root):
        sync_folder(folder)
