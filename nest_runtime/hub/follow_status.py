"""What following a channel reports: the outcome of one poll, and the overall status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nest_runtime.errors import NestError

Kind = Literal["unchanged", "switched", "refused", "unreachable", "revoked"]


@dataclass(frozen=True)
class PollOutcome:
    """What one poll came to.

    Attributes:
        kind: "unchanged": nothing to do. "switched": a new patch is on. "refused": what is offered is not wanted.
            "unreachable": it could not be had; the next poll tries again. "revoked": the patch that was on is
            revoked, and the owner was called to leave it.
        version, digest: of the patch that this is about, where one is.
        error: why, where something failed.
    """

    kind: Kind
    version: str | None = None
    digest: str | None = None
    error: NestError | None = None


@dataclass(frozen=True)
class Status:
    """How following goes, for readiness checks and metrics.

    Attributes:
        ref: what is followed.
        version, digest, expires: of the channel file last accepted.
        reached: when the source last answered, ISO 8601; None for never.
        stale: why what is on may be out of date; empty while it is fresh.
        error: what the last poll failed with; empty if it did not.
        failures: polls that failed since the last good one.
    """

    ref: str
    version: str | None = None
    digest: str | None = None
    expires: str | None = None
    reached: str | None = None
    stale: str = ""
    error: str = ""
    failures: int = 0
