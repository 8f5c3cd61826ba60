"""Following a channel: a poll that costs one request, and a switch only to a checked and tried patch.

A :class:`Follower` belongs to the code that serves a model, its :class:`FollowHost`; it needs no server. On any failure
the last good patch stays active, and the status says why. It never falls back to the bare base. The host decides how a
patch is tried and activated, and when to poll. All state is in memory, except what the trust memory and the store keep.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from nest_runtime.errors import (
    AdmissionRefused,
    BaseMismatch,
    DigestMismatch,
    Downgrade,
    Expired,
    HubError,
    NestError,
    Revoked,
    SignatureError,
    TrustError,
)
from nest_runtime.escape import short
from nest_runtime.hints import did_you_mean
from nest_runtime.hub.channels import Channel
from nest_runtime.hub.connect import connect
from nest_runtime.hub.fetch import Fetched, fetch_revision
from nest_runtime.hub.follow_status import Kind, PollOutcome, Status
from nest_runtime.hub.news import News, channels_like, read_channel, read_revocations
from nest_runtime.hub.origins import Origins
from nest_runtime.hub.repository import Refs, Remote, RepoRef, parse_repo

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store
    from nest_runtime.trust.guard import Guard

__all__ = ["DEFAULT_CHANNEL", "FollowHost", "Follower", "PollOutcome", "Status", "follow_ref"]

DEFAULT_CHANNEL = "stable"
POLL_TIMEOUT = 30.0  # seconds for one step of a poll
LOOK_BACK = 8  # versions of the repository that are tried where the one that is on is revoked


log = logging.getLogger("nest_runtime.follow")


class FollowHost(Protocol):
    """The code that serves the model. A subclass needs only ``active_digest`` and ``switch``."""

    def active_digest(self) -> str | None:
        """Return the digest of the active patch; None for the bare base."""

    def switch(self, fetched: Fetched) -> None:
        """Activate a patch. Raises NestError if it cannot; the one before stays active then."""

    def active_patch(self, digest: str) -> Patch | None:
        """Return the active patch by that digest; None takes it from the store."""
        return None

    def try_out(self, fetched: Fetched) -> None:
        """Try a patch before the switch to it. Raises AdmissionRefused if it does not do well enough."""

    def leave_revoked(self, revoked: Revoked) -> None:
        """Called if the active patch is revoked and the channel names no good one."""

    def revocations_refreshed(self) -> None:
        """Called after each refresh of the revocations; everything else that answers must pass ``check_revoked``."""


class Follower:
    """Follows one channel of one repository for one model. Only one thread at a time may poll.

    Args:
        ref: ``hf://org/repo@stable``, or a mirror's; ``stable`` if no channel is named. ``repo@name@stable`` says what
            the patch must be called; otherwise the name that the repository was first seen with counts.
        base_hash: the model that is served.
        store: gets every patch before the switch to it.
        host: the code that serves the model. It tries patches and switches to them.
        guard: whom to trust; None checks no signatures.
        stale_after: seconds without an answer from the source, or without a signed and fresh channel file there, after
            which the status is stale; None for never.
        timeout: seconds for one step of a poll.
        now: the clock.
    """

    def __init__(
        self,
        ref: str | RepoRef,
        *,
        base_hash: str,
        store: Store,
        host: FollowHost,
        guard: Guard | None = None,
        stale_after: float | None = None,
        timeout: float = POLL_TIMEOUT,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.ref = follow_ref(ref)
        self._remote: Remote = connect(self.ref, timeout=timeout)
        self._base_hash, self._store, self._host, self._guard = base_hash, store, host, guard
        self._stale_after, self._now = stale_after, now
        self._lock = threading.Lock()
        self._settled: str | None = None  # the head that was dealt with
        self._news = News()  # the last list read
        self._channel: Channel | None = None  # the last one accepted
        self._revision: str | None = None  # where its version was
        self._started = now()
        self._reached: datetime | None = None
        self._fresh: datetime | None = None  # when a channel file that counts was last there
        self._counts = False  # whether that head's channel file does
        self._standing: NestError | None = None  # what is wrong with that head; it stays until there is another
        self._passing: NestError | None = None  # what the last poll failed with
        self._failures = 0

    @property
    def status(self) -> Status:
        """How following goes now."""
        channel, error = self._channel, self._passing or self._standing
        return Status(
            ref=str(self.ref),
            version=channel.version if channel else None,
            digest=channel.digest if channel else None,
            expires=channel.expires if channel else None,
            reached=self._reached.isoformat(timespec="seconds") if self._reached else None,
            stale=self._staleness(),
            error=str(error) if error is not None else "",
            failures=self._failures,
        )

    def poll(self) -> PollOutcome:
        """Poll once, and act on the answer. Raises no NestError: the outcome holds it."""
        with self._lock:
            try:
                outcome = self._poll()
                self._passing, self._failures = None, 0
            except NestError as error:
                kind: Kind = "refused" if isinstance(error, TrustError | AdmissionRefused) else "unreachable"
                self._passing, self._failures = error, self._failures + 1
                outcome = PollOutcome(kind, error=error)
            return outcome

    def check_revoked(self, patch: Patch) -> None:
        """Whether a patch is revoked as far as is known here. Raises Revoked; SignatureError for a damaged memory."""
        if self._guard is None:
            self._news.check(patch)
            return
        from nest_runtime.trust.check import check_revoked

        check_revoked(patch.name, patch.version, patch.digest, self._guard.policy, self._guard.state)

    def _poll(self) -> PollOutcome:
        refs = self._remote.refs()
        self._reached = self._now()
        if refs.head == self._settled and self._where(refs) == self._revision:
            self._fresh = self._reached if self._counts else self._fresh
            return PollOutcome("unchanged")
        if self._channel is not None and self._revision is not None and self._where(refs) != self._revision:
            raise TrustError(
                f"{self.ref.place}: the tag {self._channel.version} was moved from {self._revision[:12]} "
                f"to {(self._where(refs) or 'nowhere')[:12]}",
                "a published version never changes: ask its publisher; the present patch stays on",
            )
        try:
            outcome = self._take_news(refs)
        except NestError as error:
            if _is_final(error):
                self._settled, self._standing = refs.head, error
            raise
        self._settled, self._standing = refs.head, outcome.error
        return outcome

    def _where(self, refs: Refs) -> str | None:
        return refs.tags.get(self._channel.version) if self._channel is not None else None

    def _take_news(self, refs: Refs) -> PollOutcome:
        self._counts = False
        revocations = read_revocations(self._remote, refs.head, self._guard)
        self._news = revocations if revocations.list is not None else self._news
        self._host.revocations_refreshed()
        revoked = self._revoked_active(revocations)
        try:
            outcome = self._follow_channel(refs, revocations)
        except NestError as error:
            if revoked is None:
                raise
            log.warning("%s offers no way out of a revoked patch: %s", self.ref, error)
            outcome = PollOutcome("unchanged", error=error)
        if revoked is not None and outcome.kind == "unchanged":
            self._stock(refs, revocations)
            self._host.leave_revoked(revoked)
            return PollOutcome("revoked", error=revoked)
        return outcome

    def _stock(self, refs: Refs, revocations: News) -> None:
        """Bring the newest version that passes into the store: the owner may have to turn to it."""
        for version in sorted(refs.tags, key=_natural, reverse=True)[:LOOK_BACK]:
            try:
                fetched = fetch_revision(
                    self._remote, self.ref, refs.tags[version], store=self._store, guard=self._guard
                )
                revocations.check(fetched.patch)
                if fetched.patch.base_hash == self._base_hash:
                    self._store.add(fetched.patch, why=f"a way out of a revoked patch, from {self.ref.place}")
                    return
            except NestError as error:
                log.info("%s@%s is no way out: %s", self.ref.place, version, error)

    def _follow_channel(self, refs: Refs, revocations: News) -> PollOutcome:
        assert self.ref.revision is not None  # follow_ref puts one there
        channel = read_channel(self._remote, refs.head, self.ref.revision, self._guard)
        if channel is None:
            near = did_you_mean(self.ref.revision, channels_like(self._remote, refs.head, self.ref.revision))
            raise HubError(
                f"{self.ref.place} has no channel {self.ref.revision!r}", f"{near}its publisher sets it: `channel set`"
            )
        self._check_channel(channel, revocations)
        revision = refs.tags.get(channel.version)
        if revision is None:
            raise HubError(f"{self.ref} names {channel.version}, which is not there", "its publisher has to push it")
        origins = Origins(self._store.root)
        if channel.digest == self._host.active_digest():
            origins.record(self.ref.place, channel.version, revision, channel.digest, channel.name)
            self._accept(channel, revision)
            return PollOutcome("unchanged", channel.version, channel.digest)
        fetched = fetch_revision(self._remote, self.ref, revision, store=self._store, guard=self._guard)
        channel.check_patch(fetched.patch)
        revocations.check(fetched.patch)
        self._store.add(fetched.patch, why=f"followed from {self.ref} at {revision[:12]}")
        origins.record(self.ref.place, channel.version, revision, channel.digest, channel.name)
        self._host.try_out(fetched)
        self._host.switch(fetched)
        self._accept(channel, revision)
        return PollOutcome("switched", channel.version, channel.digest)

    def _check_channel(self, channel: Channel, revocations: News) -> None:
        """Whether to go by a channel file that was read. Raises TrustError."""
        Origins(self._store.root).check_name(self.ref, channel.name)
        if channel.base_hash != self._base_hash:
            raise BaseMismatch(
                f"{self.ref} names a patch for model {short(channel.base_hash)}; this one is {short(self._base_hash)}",
                "follow a repository of patches for this model",
            )
        last = self._channel
        if last is not None and channel.issued < last.issued:
            raise SignatureError(
                f"{self.ref} serves a file issued at {channel.issued}; one of {last.issued} was already seen",
                "an old file was served: ask the publisher, or use another mirror",
            )
        channel.check_fresh(self._now(), revocations=revocations.serial(channel.name))
        self._fresh, self._counts = self._reached, True
        gone = last is not None and revocations.find(last.digest, last.name) is not None
        if self._guard is None and last is not None and channel.serial < last.serial and not gone:
            raise Downgrade(
                f"{self.ref} names {channel.version} with serial {channel.serial}; {last.version} has {last.serial}",
                "revoke the newer version if going back is meant",
            )

    def _revoked_active(self, revocations: News) -> Revoked | None:
        """The error for the patch that is on, if it is revoked."""
        digest = self._host.active_digest()
        if digest is None:
            return None
        try:
            self.check_revoked(self._host.active_patch(digest) or self._store.get(digest))
        except Revoked as error:
            return error
        except NestError as error:  # what nobody holds can only be called as what is followed is
            name = self.ref.name or (self._channel.name if self._channel is not None else "")
            entry = revocations.find(digest, name)
            log.debug("the active patch is not in the store: %s", error)
            return None if entry is None else Revoked(f"{entry.name}@{entry.version} was revoked: {entry.reason}")
        return None

    def _accept(self, channel: Channel, revision: str) -> None:
        self._channel, self._revision = channel, revision

    def _staleness(self) -> str:
        now = self._now()
        if self._channel is not None and self._channel.expired(now):
            return f"channel {self._channel.channel} expired at {self._channel.expires}"
        for last, what in ((self._reached, "not answered"), (self._fresh, "had no channel file that counts")):
            since = last or self._started
            if self._stale_after is not None and now - since > timedelta(seconds=self._stale_after):
                return f"{self.ref.place} has {what} since {since.isoformat(timespec='seconds')}"
        return ""


def follow_ref(ref: str | RepoRef) -> RepoRef:
    """A reference with the channel to follow; ``stable`` if none is named. Raises UsageError."""
    ref = parse_repo(ref) if isinstance(ref, str) else ref
    return ref if ref.revision is not None else RepoRef(ref.place, DEFAULT_CHANNEL, ref.name)


def _natural(version: str) -> tuple[tuple[int, str], ...]:
    """Orders versions as people do: v10 after v9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", version))


def _is_final(error: NestError) -> bool:
    """Whether asking again for the same commit can only give the same answer.

    Damaged bytes may come whole the next time, and a clock that is wrong may be set.
    """
    if isinstance(error, DigestMismatch | Expired):
        return False
    return isinstance(error, TrustError | AdmissionRefused)
