"""Revocations: a signed, growing list of patches that must not be active anywhere any more.

    revocations.json + revocations.sig     at the root of a repository, or in any folder

Each list has a serial that only grows, and holds everything that the one before it held: a
revocation is for ever. What clients remember of lists is in state.py.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import Field, model_validator

from nest_runtime.errors import NestError, SignatureError, UsageError, reason_of
from nest_runtime.io import atomic_write, nest_home
from nest_runtime.trust.documents import (
    Digest,
    Document,
    Label,
    Serial,
    Time,
    Value,
    moment_of,
    read_file,
    sorted_unique,
    stamp,
)
from nest_runtime.trust.keys import public_key_of
from nest_runtime.trust.policy import KeyRule, Policy
from nest_runtime.trust.signing import sign_files, verify_files

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

LIST_FILE = "revocations.json"
LIST_SIGNATURE = "revocations.sig"
_LOCK_SECONDS = 30.0

# One line without control characters, or marks that turn the direction of writing: it is printed on terminals.
Reason = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u{2028}-\u{202e}\u{2066}-\u{2069}]{1,500}$")]


class Revocation(Value):
    """One patch that is revoked, why and since when (UTC)."""

    digest: Digest
    name: Label
    version: Label
    reason: Reason
    date: Time


class RevocationList(Document):
    """All revocations of one publisher.

    Attributes:
        serial: 1 for the first list, one more for each later one.
        updated: when it was made.
        revoked: sorted by digest.
    """

    kind: Literal["nest-runtime-revocations"] = "nest-runtime-revocations"
    format: Literal[1] = 1
    serial: Serial
    updated: Time
    revoked: tuple[Revocation, ...]

    @model_validator(mode="after")
    def _check(self) -> RevocationList:
        sorted_unique(self.revoked, "digest", "revoked")
        for entry in self.revoked:
            moment_of(entry.date, "date")
        return self

    def find(self, digest: str, name: str) -> Revocation | None:
        """The revocation of the patch that has this digest and this name, or None.

        A digest under another patch's name revokes nothing: whoever may speak for that name could else speak for all.
        """
        return next((entry for entry in self.revoked if (entry.digest, entry.name) == (digest, name)), None)

    def check_follows(self, earlier: RevocationList) -> None:
        """Check that this list may replace an earlier one.

        Raises:
            SignatureError: it is older, or something was taken off.
        """
        if self.serial < earlier.serial:
            raise SignatureError(
                f"the revocation list has serial {self.serial}; {earlier.serial} was already accepted",
                "an old list was served: fetch the present one, and ask the publisher",
            )
        if self.serial == earlier.serial and self != earlier:
            raise SignatureError(
                f"two different revocation lists have the serial {self.serial}", "ask the publisher which one is theirs"
            )
        lost = sorted({entry.digest for entry in earlier.revoked} - {entry.digest for entry in self.revoked})
        if lost:
            raise SignatureError(
                f"revocation list {self.serial} no longer holds {lost[0][:19]}, which list {earlier.serial} revoked",
                "a revocation is for ever: ask the publisher",
            )


def sign_list(revocations: RevocationList, key: Path, passphrase: str = "") -> tuple[bytes, bytes]:
    """The bytes of a list and of its signature. Raises as ``signing.sign_files``."""
    data = revocations.to_bytes()
    return data, sign_files({LIST_FILE: data}, key, passphrase)[0]


def verify_list(data: bytes, signature: bytes, policy: Policy, where: str = "") -> tuple[RevocationList, KeyRule]:
    """A list, and the rule of the key that signed it.

    Raises:
        SignatureError: false, by a key that is not trusted or may not revoke, or malformed.
    """
    where = where or "the revocation list"
    remedy = "fetch it again from its publisher, who restores both files as last published"
    key = verify_files({LIST_FILE: data}, signature, policy.public_keys, where, remedy=remedy)
    rule = policy.rule_of(key.id)
    if rule is None or "revocations" not in rule.may:
        raise SignatureError(
            f"{where} is signed by {key.name}, which may sign {', '.join(rule.may) if rule else 'nothing'}",
            "let that key sign revocations in the trust policy, if you trust it with them",
        )
    return RevocationList.parse(data, where), rule


def read_list(folder: Path) -> tuple[bytes, bytes]:
    """The bytes of a published list and of its signature; nothing is verified. Raises SignatureError if missing."""
    return read_file(folder / LIST_FILE, "revocation list"), read_file(folder / LIST_SIGNATURE, "signature")


def revoke(
    patch: Patch, reason: str, folder: Path, key: Path, *, passphrase: str = "", now: datetime | None = None
) -> RevocationList:
    """Add a patch to the list in a folder, sign it and write it there; returns the new list.

    Revoking again what is revoked changes nothing.

    Args:
        patch: the patch.
        reason: one line, which those who refuse the patch will read.
        folder: where the list lies, or will; made if missing.
        key: the private key; it must be the one that signed the present list.
        passphrase: of the key.
        now: the date of the revocation.

    Raises:
        UsageError: the reason or the key cannot be used.
        SignatureError: the list that is there is not this key's, or was changed.
    """
    if not reason.strip() or len(reason) > 500 or not reason.isprintable():
        raise UsageError(f"the reason is {reason!r:.60}", "give one line of at most 500 characters with --reason")
    entry = Revocation(
        digest=patch.digest, name=patch.name, version=patch.version, reason=reason.strip(), date=stamp(now)
    )
    public = public_key_of(key, passphrase)
    mine = Policy(keys=(KeyRule(name=public.name, pem=public.pem.decode(), names=("*",)),))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = nest_home() / "trust" / "publishing.lock"  # not in the folder: what lies there is published
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=_LOCK_SECONDS):
            old = _present(folder, mine)
            if old is not None and old.find(patch.digest, patch.name) is not None:
                return old
            revoked = tuple(sorted((*(old.revoked if old else ()), entry), key=lambda e: e.digest))
            new = RevocationList(serial=old.serial + 1 if old else 1, updated=stamp(now), revoked=revoked)
            write_list(folder, *sign_list(new, key, passphrase))
    except Timeout as error:
        raise NestError(
            "another process is revoking a patch on this machine", "wait for it to end, then try again"
        ) from error
    except OSError as error:
        raise NestError(f"{folder} cannot be written: {reason_of(error)}", "choose another folder") from error
    return new


def write_list(folder: Path, data: bytes, signature: bytes) -> None:
    """Write a list and its signature. Between the two renames readers see a pair that does not fit, and keep theirs."""
    atomic_write(folder / LIST_FILE, data)
    atomic_write(folder / LIST_SIGNATURE, signature)


def _present(folder: Path, mine: Policy) -> RevocationList | None:
    if not (folder / LIST_FILE).exists() and not (folder / LIST_SIGNATURE).exists():
        return None
    data, signature = read_list(folder)
    try:
        return verify_list(data, signature, mine, str(folder / LIST_FILE))[0]
    except SignatureError as error:
        raise SignatureError(
            error.message, "revoke with the key that signed this list, or restore both files as last published"
        ) from error
