"""Signatures kept in the store beside its patches (store/signatures.py says where), to be checked again.

Keeping a signature checks that it is about that patch. Whether its key made it is checked when it is used, by the
policy of that moment. So an unverified signature replaces nothing: it is kept beside the others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import StoreError, reason_of
from nest_runtime.io import atomic_write
from nest_runtime.patch.write import to_bytes
from nest_runtime.store.signatures import signature_folder
from nest_runtime.trust.documents import read_file
from nest_runtime.trust.material import Material, check_manifest
from nest_runtime.trust.signing import Bundle, check_resources, read_bundle

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.trust.policy import Policy

MAX_BESIDE = 16  # unverified signatures kept of one patch beside the first of each key


def keep_signature(store_root: Path, patch: Patch, material: Material, *, verified: bool = False) -> None:
    """Keep a patch's manifest and signature. A verified one takes the place of its key's; another stands beside it.

    Raises:
        SignatureError: they are malformed, or about another patch.
        StoreError: the store cannot be written.
    """
    bundle = check_material(patch, material)
    folder = signature_folder(store_root, patch.digest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "manifest.json", material.manifest)
        _put(folder, bundle.key_id.partition(":")[2], material.signature, verified)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {reason_of(error)}", "set NEST_HOME elsewhere") from error


def check_material(patch: Patch, material: Material) -> Bundle:
    """Whether a manifest and signature are about a patch; nothing is verified. Raises SignatureError if not."""
    data, where = to_bytes(patch), material.source or f"the signature of {patch.label}"
    check_manifest(material.manifest, patch, data, f"the manifest of {where}")
    bundle = read_bundle(material.signature, where)
    check_resources(bundle, material.signed_files(data), where)
    return bundle


def kept_signatures(store_root: Path, patch: Patch, policy: Policy) -> list[Material]:
    """The signatures to judge a stored patch by; those that name a key which the policy trusts with it come first.

    Nothing is verified here: one that passes is enough, and check_trust says which does. Raises SignatureError if a
    file cannot be read.
    """
    folder = signature_folder(store_root, patch.digest)
    paths = sorted(folder.glob("*.sig"), key=lambda path: (path.name.count("."), path.name))
    if not paths:
        return []
    trusted = [rule.key.id.partition(":")[2] for rule in policy.keys if rule.allows("patches", patch.name)]
    manifest = read_file(folder / "manifest.json", "manifest")
    ranked = sorted(paths, key=lambda path: path.name.partition(".")[0] not in trusted)
    return [Material(manifest, read_file(path, "signature"), str(path)) for path in ranked]


def _put(folder: Path, key: str, signature: bytes, verified: bool) -> None:
    """Write one signature under its key, or beside what is there. Raises OSError."""
    own = folder / f"{key}.sig"
    beside = folder / f"{key}.{hashlib.sha256(signature).hexdigest()[:16]}.sig"
    if verified or not own.exists():
        atomic_write(own, signature)
        beside.unlink(missing_ok=True)
    elif own.read_bytes() != signature:
        atomic_write(beside, signature)
        others = sorted(folder.glob("*.*.sig"), key=lambda path: path.stat().st_mtime_ns)
        for oldest in others[:-MAX_BESIDE]:
            oldest.unlink(missing_ok=True)
