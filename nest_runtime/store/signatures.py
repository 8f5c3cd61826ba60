"""Signatures kept beside the store's patches, so that they can be checked again at every activation.

    store/signatures/sha256/ab/abcd…/manifest.json      one manifest per patch, which follows from the patch
    store/signatures/sha256/ab/abcd…/<key id>.sig       one signature per key
    store/signatures/sha256/ab/abcd…/<key id>.<hash>.sig   others that name the key, as they came

This module knows where they are, whether there are any, and how to delete them. trust/kept.py writes and reads them.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from nest_runtime.store.entries import Entry, builtin_entries

FOLDER = "signatures"


def signature_folder(store_root: Path, digest: str) -> Path:
    """The folder for the signatures of a patch."""
    algorithm, _, digits = digest.partition(":")
    return store_root / FOLDER / algorithm / digits[:2] / digits


def is_signed(store_root: Path, entry: Entry) -> bool:
    """Whether a patch carries a signature, in the store or where the package keeps it; says nothing of whose."""
    if any(signature_folder(store_root, entry.digest).glob("*.sig")):
        return True
    built_in = builtin_entries().get(entry.digest) if entry.builtin else None
    return built_in is not None and built_in[1].with_suffix(".sig").exists()


def drop_signatures(store_root: Path, digests: Collection[str]) -> None:
    """Delete the signatures of patches that are gone."""
    for digest in digests:
        folder = signature_folder(store_root, digest)
        if folder.is_dir():
            shutil.rmtree(folder)
