"""Patch references: from ``v3``, ``name@v3``, a path, ``sha256:…`` or ``hf://…`` to a verified Patch.

A bare word never means a file: ``v3`` is a version in the store even where a file ``v3`` exists.
A path has a folder in it or ends with ``.safetensors``. Whether the patch fits a model is checked
by the runtime, whether it is signed by the trust policy; neither happens here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import PatchNotFound
from nest_runtime.io import expand
from nest_runtime.store.entries import PATCH_SUFFIX, is_path, is_repository

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store

_PATCH = "patch.safetensors"  # a repository's newest version


def load_patch(ref: str | Path, *, model_hash: str | None = None, store: Store | None = None) -> Patch:
    """Find, read and verify a patch.

    Args:
        ref: a version of the store or of the package (``v3``), ``name@v3``, a path to a
            ``.safetensors`` file, ``sha256:<hex>`` (8 digits or more), ``hf://org/repo[@tag]`` (hub/fetch.py), or a
            folder or URL that was pushed to, ``./mirror[@tag]``.
        model_hash: the model at hand; a version is looked up among its patches only.
        store: where to look; the store of ``$NEST_HOME`` by default.

    Raises:
        PatchNotFound: there is no such patch; the message names the closest.
        UsageError: several patches are called so.
        PatchFormatError, DigestMismatch: the file breaks the format, or its content its digest.
        HubError: the Hub could not be reached, or has no such file.
        TrustError: what the Hub serves is damaged, moved or revoked.
    """
    text = str(ref)
    if is_repository(ref) or (is_path(ref) and (expand(text) / _PATCH).is_file()):
        from nest_runtime.hub.fetch import load

        return load(text, store)
    if is_path(ref):
        return _from_file(expand(text))
    if store is None:
        from nest_runtime.store.store import Store

        store = Store()
    try:
        return store.get(text, model_hash=model_hash)
    except PatchNotFound as error:
        if not Path(text).is_file():
            raise
        ends = Path(text).suffix or "nothing"
        raise PatchNotFound(
            f"{text} ends with {ends}; expected a patch's file, {PATCH_SUFFIX}",
            "name the patch's file; `nest-runtime list` shows stored patches",
        ) from error


def _from_file(path: Path) -> Patch:
    from nest_runtime.hints import closest
    from nest_runtime.patch.file import read_patch

    if path.is_dir():
        raise PatchNotFound(f"{path} is a folder; expected a patch file", "name the .safetensors file in it")
    if not path.exists():
        beside = (
            closest(path.name, (p.name for p in sorted(path.parent.glob(f"*{PATCH_SUFFIX}"))))
            if path.parent.is_dir()
            else []
        )
        hint = (
            f"beside it: {', '.join(beside)}" if beside else "check the path; `nest-runtime list` shows stored patches"
        )
        raise PatchNotFound(f"there is no patch file {path}", hint)
    return read_patch(path)
