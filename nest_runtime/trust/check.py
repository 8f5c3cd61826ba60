"""Trust in a patch: signing it, and the one check that every patch passes before it is active.

``check_trust`` asks, in this order:

- Is the signature true, and over exactly this patch and its manifest?
- May that key sign patches of this name?
- Is the serial at least the policy's minimum?
- Does the patch carry claims, if the policy asks for them?
- Is it revoked?
- Is it older than one already accepted here?

It changes nothing: ``remember`` records what was accepted once the patch is active. It does not ask whether the patch
fits a model (runtime/), nor whether it does any good (evaluate/).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import (
    ClaimsRefused,
    Downgrade,
    NestError,
    PatchFormatError,
    Revoked,
    SignatureError,
    reason_of,
)
from nest_runtime.io import expand
from nest_runtime.store.entries import builtin_entries
from nest_runtime.trust.keys import PublicKey
from nest_runtime.trust.material import (
    Manifest,
    Material,
    check_manifest,
    manifest_of,
    material_paths,
    patch_path,
    patch_size,
    read_material,
    read_patch_file,
    write_material,
)
from nest_runtime.trust.policy import KeyRule, Policy
from nest_runtime.trust.signing import sign_files, verify_files
from nest_runtime.trust.state import Accepted, TrustState, downgrade, is_lower

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

__all__ = [
    "Material",
    "Policy",
    "Signed",
    "TrustState",
    "Verified",
    "check_revoked",
    "check_trust",
    "open_patch",
    "remember",
    "sign_bytes",
    "sign_patch",
    "verify_patch",
]


@dataclass(frozen=True)
class Verified:
    """A patch that passed ``check_trust``.

    Attributes:
        signed_by: id of the key, ``sha256:<hex>``; None for an unsigned patch that the policy lets pass.
        key: what the policy calls that key; empty if there is none.
        name, version, serial, digest, base_hash: of the patch.
        before: the higher version accepted earlier, where going back was permitted.
        revoked: digests known to be revoked; they no longer stand in the way of lower serials.
    """

    signed_by: str | None
    key: str
    name: str
    version: str
    serial: int
    digest: str
    base_hash: str
    before: Accepted | None = None
    revoked: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """For ``--json``: signed_by, key, name, version, serial, digest, base_hash, ok."""
        fields = ("signed_by", "key", "name", "version", "serial", "digest", "base_hash")
        return {**{field: getattr(self, field) for field in fields}, "ok": True}


@dataclass(frozen=True)
class Signed:
    """What signing gives: the key's public half, the manifest, and the material to keep beside the patch."""

    key: PublicKey
    manifest: Manifest
    material: Material


def sign_bytes(data: bytes, key: Path, passphrase: str = "", where: str = "patch") -> Signed:
    """Sign the content of a patch file.

    Raises:
        PatchFormatError, DigestMismatch: it is no valid patch, or not written as nest-runtime writes it.
        UsageError: the key cannot be used.
    """
    from nest_runtime.patch.file import from_bytes
    from nest_runtime.patch.write import to_bytes

    patch = from_bytes(data, where)
    if to_bytes(patch) != data:
        raise PatchFormatError(
            f"{where} is valid, but not laid out as nest-runtime writes patches",
            "write it anew first: nest_runtime.load_patch(path).save(path)",
        )
    manifest = manifest_of(patch, data)
    unsigned = Material(manifest.to_bytes(), b"")
    signature, public = sign_files(unsigned.signed_files(data), key, passphrase)
    return Signed(public, manifest, Material(unsigned.manifest, signature))


def sign_patch(path: str | Path, key: str | Path, passphrase: str = "") -> tuple[Signed, Path, Path]:
    """Sign a patch file, or a repository's folder; returns also the paths of the manifest and the signature beside it.

    Raises:
        PatchNotFound: there is no such patch.
        NestError: the files cannot be written; or as ``sign_bytes``.
    """
    file = patch_path(expand(path))
    signed = sign_bytes(read_patch_file(file), expand(key), passphrase, str(file))
    try:
        return signed, *write_material(file, signed.material)
    except OSError as error:
        raise NestError(
            f"{material_paths(file)[1]} cannot be written: {reason_of(error)}", "sign a copy elsewhere"
        ) from error


def verify_patch(path: str | Path, policy: Policy, state: TrustState | None = None) -> Verified:
    """Check a patch file, or a repository's folder, with what lies beside it.

    Args:
        path: the file or folder.
        policy: whom to trust.
        state: what this machine remembers; None leaves revocations and downgrades out.

    Raises:
        PatchNotFound: there is no such patch.
        PatchFormatError, DigestMismatch: it is damaged.
        TrustError: as ``check_trust``.
    """
    file = patch_path(expand(path))
    size, material = patch_size(file), read_material(file)
    if material is None:  # both before a file of any size is read
        _unsigned(policy, str(file))
    elif size > material.announced:
        raise SignatureError(
            f"{file} has {size} bytes; its manifest says {material.announced}",
            "fetch patch, manifest and signature again from one place",
        )
    return open_patch(read_patch_file(file), material, policy, state, where=str(file))[1]


def open_patch(
    data: bytes,
    material: Material | None,
    policy: Policy,
    state: TrustState | None = None,
    *,
    where: str = "patch",
    allow_downgrade: bool = False,
) -> tuple[Patch, Verified]:
    """Turn the bytes of a patch file, as downloaded, into a patch that may be used.

    The signature is checked before the bytes are parsed, so that untrusted bytes never reach the parser. Arguments and
    errors as ``check_trust``, and those of ``patch.file.from_bytes``.
    """
    from nest_runtime.patch.file import from_bytes

    if material is None:
        _unsigned(policy, where)
    else:
        verify_files(material.signed_files(data), material.signature, policy.public_keys, _name(material, where))
    patch = from_bytes(data, where)
    return patch, _check(patch, data, material, policy, state, allow_downgrade, proven=True)


def check_trust(
    patch: Patch,
    material: Material | None,
    policy: Policy,
    state: TrustState | None = None,
    *,
    allow_downgrade: bool = False,
) -> Verified:
    """Check whether a patch may be active here. Every activation and every server start goes through this function.

    Args:
        patch: as read, from anywhere.
        material: its manifest and signature; None if it has none.
        policy: whom to trust with what.
        state: what this machine remembers; None leaves revocations and downgrades out.
        allow_downgrade: let a lower serial pass, on someone's explicit word. The policy's minimum still holds.

    Returns:
        What was verified.

    Raises:
        SignatureError: missing though required, false, over another patch, or by a key that may not sign this name.
        Downgrade: below the policy's minimum, or below what was accepted here.
        ClaimsRefused: it carries no claims, and the policy asks for them.
        Revoked: its publisher has revoked it.
        NestError: model-signing is not installed.
    """
    from nest_runtime.patch.write import to_bytes

    return _check(patch, to_bytes(patch), material, policy, state, allow_downgrade)


def check_revoked(name: str, version: str, digest: str, policy: Policy, state: TrustState) -> frozenset[str]:
    """Refuse a patch that is revoked by a key that the policy lets speak about its name.

    Args:
        name, version, digest: the patch.
        policy: whose keys may revoke what.
        state: the lists that this machine has accepted.

    Returns:
        The name's revoked digests.

    Raises:
        Revoked: it is.
        SignatureError: a list that this machine accepted is gone or damaged.
    """
    known = [(entry, rule) for entry, rule in state.revocations(policy) if entry.name == name]
    for entry, rule in known:
        if entry.digest == digest:
            raise Revoked(
                f"{name}@{version} was revoked on {entry.date[:10]} by {rule.name}: {entry.reason}",
                "use another version",
            )
    return frozenset(entry.digest for entry, _ in known)


def remember(verified: Verified, state: TrustState, *, who: str = "", why: str = "") -> None:
    """Remember a signed patch that is in force now. An unsigned one proves nothing, and moves no memory.

    Raises:
        Downgrade: another process has accepted a higher serial meanwhile, StoreError.
    """
    if verified.signed_by is None:
        return
    state.accept(
        verified.base_hash,
        verified.name,
        Accepted(verified.serial, verified.digest),
        allow_downgrade=verified.before is not None,
        revoked=verified.revoked,
        who=who,
        why=why,
    )


def _check(
    patch: Patch,
    data: bytes,
    material: Material | None,
    policy: Policy,
    state: TrustState | None,
    allow_downgrade: bool,
    *,
    proven: bool = False,
) -> Verified:
    label = patch.label
    rule = _signer(patch, data, material, policy, label, proven)
    minimum = policy.floor(patch.name)
    if patch.serial < minimum:
        raise Downgrade(
            f"{label} has serial {patch.serial}; the trust policy asks for {minimum} or more",
            "use a newer version, or change minimum_serial in the policy",
        )
    if policy.require_claims and patch.claims is None:
        raise ClaimsRefused(
            f"{label} carries no claims; the trust policy asks for them",
            "make them with `nest-runtime claim`, and sign the file that it writes",
        )
    before, revoked = None, frozenset[str]()
    if state is not None:
        revoked = check_revoked(patch.name, patch.version, patch.digest, policy, state)
        before = _check_serial(patch, state, revoked, label, allow_downgrade)
    return Verified(
        signed_by=rule.key.id if rule else None,
        key=rule.name if rule else "",
        name=patch.name,
        version=patch.version,
        serial=patch.serial,
        digest=patch.digest,
        base_hash=patch.base_hash,
        before=before,
        revoked=revoked,
    )


def _signer(
    patch: Patch, data: bytes, material: Material | None, policy: Policy, label: str, proven: bool
) -> KeyRule | None:
    """The rule of the key that signed this patch, or None for one that may be unsigned."""
    if material is None:
        _unsigned(policy, label, builtin=patch.digest in builtin_entries())
        return None
    where = _name(material, label)
    check_manifest(material.manifest, patch, data, f"the manifest of {where}")
    if not proven:
        verify_files(material.signed_files(data), material.signature, policy.public_keys, where)
    rule = policy.rule_of(material.key_id)
    if rule is None or not rule.allows("patches", patch.name):
        allowed = f"{', '.join(rule.names)} ({', '.join(rule.may)})" if rule else "nothing"
        raise SignatureError(
            f"{label} is signed by {rule.name if rule else 'a stranger'}, which may sign {allowed}",
            "allow that name in the trust policy, if you trust that key with it",
        )
    return rule


def _unsigned(policy: Policy, label: str, *, builtin: bool = False) -> None:
    """Raise SignatureError if the policy wants a signature."""
    if policy.require_signature:
        trusted = ", ".join(rule.name for rule in policy.keys)
        hint = "sign it with `nest-runtime sign`, or get it with its .manifest.json and .sig"
        if builtin:  # a key of ours in the package would be one more to trust, and vouch for nothing that pip does not
            hint = f"patches of the package bear no signature: sign it with a key of yours, `nest-runtime sign {label}`"
        raise SignatureError(f"{label} is not signed; a signature by {trusted} is required", hint)


def _check_serial(
    patch: Patch, state: TrustState, revoked: frozenset[str], label: str, allow_downgrade: bool
) -> Accepted | None:
    """The higher version that permission was given to go behind, or None. Raises Downgrade without permission."""
    highest, version = state.highest(patch.base_hash, patch.name, revoked), Accepted(patch.serial, patch.digest)
    if highest is None or not is_lower(version, highest):
        return None
    if not allow_downgrade:
        raise downgrade(label, version, highest)
    return highest


def _name(material: Material, label: str) -> str:
    return material.source or f"the signature of {label}"
