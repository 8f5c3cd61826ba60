"""Channels: a small signed file that says which version ``stable`` or ``canary`` is, and until when.

    channels/stable.json + channels/stable.sig     in a repository

If a follower sees no fresh file within its limit, somebody withholds it, or the publisher has gone. The follower
reports that, and keeps its patch. Fetching and following are elsewhere.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from nest_runtime.errors import Expired, NestError, SignatureError, UsageError, reason_of
from nest_runtime.hub.demands import Demands, check_met
from nest_runtime.io import atomic_write, canonical_json
from nest_runtime.trust.documents import Digest, Document, Label, Serial, Time, moment_of, read_file, stamp
from nest_runtime.trust.policy import Policy
from nest_runtime.trust.signing import sign_files, verify_files

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

CHANNELS = "channels"
CLOCK_SKEW = timedelta(minutes=5)


class Channel(Document):
    """The patch that a channel names.

    Attributes:
        channel: ``stable``, ``canary``, ….
        name, version, serial, digest, base_hash: of the patch.
        issued, expires: from when until when the publisher stands by it.
        revocations: serial of the revocation list at that time; a source that serves an older one withholds it.
        claims: what is demanded of the patches named here; None for nothing. A file with demands is of format 2, and
            no other is: who knows nothing of them refuses it, instead of passing them over.
    """

    kind: Literal["nest-runtime-channel"] = "nest-runtime-channel"
    format: Literal[1, 2] = 1
    channel: Label
    name: Label
    version: Label
    serial: Serial
    digest: Digest
    base_hash: Digest
    issued: Time
    expires: Time
    revocations: Serial = 0
    claims: Demands | None = None

    @model_validator(mode="after")
    def _check(self) -> Channel:
        if moment_of(self.issued, "issued") >= moment_of(self.expires, "expires"):
            raise ValueError(f"expires is {self.expires}, not after issued, {self.issued}")
        if self.format != (1 if self.claims is None else 2):
            raise ValueError(f"format is {self.format}; expected 2 with claims, and 1 without")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON, as every document; without ``claims`` if there are none."""
        value = self.model_dump(mode="json", exclude=set() if self.claims is not None else {"claims"})
        return canonical_json(value) + b"\n"

    def expired(self, now: datetime | None = None) -> bool:
        """Whether its date is past."""
        return (now or datetime.now(UTC)) >= moment_of(self.expires, "expires")

    def check_fresh(self, now: datetime | None = None, *, revocations: int = 0) -> None:
        """Check whether this file counts now.

        Args:
            now: the time.
            revocations: serial of the revocation list that the same source serves; 0 for none.

        Raises:
            Expired: its date is past, or it comes from the future: one of the two clocks is wrong.
            SignatureError: the source withholds a newer revocation list.
        """
        now = now or datetime.now(UTC)
        if self.expired(now):
            raise Expired(
                f"channel {self.channel} of {self.name} expired at {self.expires}; it is {stamp(now)}",
                "its publisher must sign it anew, or this source is out of date; the present patch stays on",
            )
        if moment_of(self.issued, "issued") > now + CLOCK_SKEW:
            raise Expired(
                f"channel {self.channel} of {self.name} was issued at {self.issued}; it is {stamp(now)}",
                "set the clock of this machine, or of the publisher's",
            )
        if revocations < self.revocations:
            raise SignatureError(
                f"channel {self.channel} was signed after revocation list {self.revocations}; "
                f"its source serves list {revocations}",
                "the source withholds revocations: fetch from another mirror, and ask the publisher",
            )

    def check_patch(self, patch: Patch) -> None:
        """Whether a patch is the one named, and carries the claims that are demanded.

        Raises:
            SignatureError: another patch; the message names the first field that differs.
            ClaimsRefused: its claims are not what is demanded.
        """
        for field in ("name", "version", "serial", "digest", "base_hash"):
            wanted, found = getattr(self, field), getattr(patch, field)
            if wanted != found:
                raise SignatureError(
                    f"channel {self.channel} names a patch with {field} {wanted}; this one has {found}",
                    "the source serves another patch under that version: ask the publisher",
                )
        if self.claims is not None:
            check_met(patch, self.claims, f"channel {self.channel}")


def channel_for(
    patch: Patch,
    channel: str,
    valid: timedelta,
    *,
    revocations: int = 0,
    claims: Demands | None = None,
    now: datetime | None = None,
) -> Channel:
    """The unsigned content of a channel file that points to a patch from now on.

    Args:
        patch: the patch.
        channel: its name.
        valid: how long servers may go by it.
        revocations: the serial of the newest list, which servers must have seen.
        claims: what the channel demands.
        now: when it is issued; the present moment by default.

    Raises:
        UsageError: the name or the time makes no sense.
    """
    now = now or datetime.now(UTC)
    fields = {key: getattr(patch, key) for key in ("name", "version", "serial", "digest", "base_hash")}
    try:
        return Channel(
            format=1 if claims is None else 2,
            channel=channel,
            **fields,
            issued=stamp(now),
            expires=stamp(now + valid),
            revocations=revocations,
            claims=claims,
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"no channel {channel!r:.60} can be valid for {valid}", "use a short name and at least a second"
        ) from error


def sign_channel(channel: Channel, key: Path, passphrase: str = "") -> tuple[bytes, bytes]:
    """The bytes of a channel file and of its signature. Raises as ``signing.sign_files``."""
    data = channel.to_bytes()
    return data, sign_files({f"{channel.channel}.json": data}, key, passphrase)[0]


def verify_channel(data: bytes, signature: bytes, policy: Policy, channel: str) -> Channel:
    """The channel file that was asked for, whoever served it. Its date is not looked at: see ``check_fresh``.

    Raises:
        SignatureError: false, by a key that is not trusted with it, malformed, or another channel's.
    """
    _check_name(channel)
    where = f"the file of channel {channel}"
    remedy = "fetch it again from its publisher, or set it again with `nest-runtime channel set`"
    key = verify_files({f"{channel}.json": data}, signature, policy.public_keys, where, remedy=remedy)
    found = Channel.parse(data, where)
    if found.channel != channel:
        raise SignatureError(f"{where} is that of {found.channel}", "ask the publisher to sign it again")
    rule = policy.rule_of(key.id)
    if rule is None or not rule.allows("channels", found.name):
        raise SignatureError(
            f"{where} is signed by {key.name}, which may not sign channels of {found.name}",
            "allow it in the trust policy, if you trust that key with it",
        )
    return found


def channel_paths(root: Path, channel: str) -> tuple[Path, Path]:
    """Where a repository keeps a channel's file and its signature. Raises UsageError for what is no channel's name."""
    _check_name(channel)
    return root / CHANNELS / f"{channel}.json", root / CHANNELS / f"{channel}.sig"


def write_channel(root: Path, channel: Channel, key: Path, passphrase: str = "") -> tuple[Path, Path]:
    """Sign a channel file and write it into a repository's folder; returns the two paths. Raises NestError."""
    data, signature = sign_channel(channel, key, passphrase)
    path, signature_path = channel_paths(root, channel.channel)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
        atomic_write(signature_path, signature)
    except OSError as error:
        raise NestError(f"{path} cannot be written: {reason_of(error)}", "choose another folder") from error
    return path, signature_path


def read_channel(root: Path, channel: str) -> tuple[bytes, bytes]:
    """The bytes of a channel's file and signature in a repository's folder; nothing is verified."""
    path, signature = channel_paths(root, channel)
    return read_file(path, f"channel {channel}"), read_file(signature, "signature")


def _check_name(channel: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", channel):
        raise UsageError(f"{channel!r:.60} is no channel's name", "use letters, digits, '.', '_', '+' and '-'")
