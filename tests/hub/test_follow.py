"""Following a channel: cheap polls, switches to what was checked, and the old patch on whatever goes wrong."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

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
from nest_runtime.hub.fetch import Fetched
from nest_runtime.hub.follow import Follower, FollowHost, follow_ref
from nest_runtime.hub.publish import publish_revocation, set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.store.store import Store
from nest_runtime.trust.guard import Guard
from nest_runtime.trust.keys import generate_keys
from tests.support.hub import guard_of, publish
from tests.support.hub_server import HubServer
from tests.support.store import BASE_A, BASE_B, small_patch

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"
REF = parse_repo(REPO)
Keys = tuple[Path, Path]


class Owner(FollowHost):
    """What a server is to a follower: it holds one patch, and may refuse."""

    def __init__(
        self, home: Path, keys: Keys | None, ref: str = f"{REPO}@stable", base: str = BASE_A, timeout: float = 5
    ) -> None:
        self.store = Store(home)
        self.guard: Guard | None = guard_of(self.store, keys) if keys else None
        self.on: str | None = None
        self.version = ""
        self.left: list[Revoked] = []
        self.refuse: NestError | None = None
        self.clock = timedelta()
        self.follower = Follower(
            ref,
            base_hash=base,
            store=self.store,
            host=self,
            guard=self.guard,
            stale_after=300,
            timeout=timeout,
            now=lambda: datetime.now(UTC) + self.clock,
        )

    def active_digest(self) -> str | None:
        return self.on

    def leave_revoked(self, revoked: Revoked) -> None:
        self.left.append(revoked)

    def try_out(self, fetched: Fetched) -> None:
        if self.refuse is not None:
            raise self.refuse

    def switch(self, fetched: Fetched) -> None:
        if self.guard is not None:
            self.guard.accept(fetched.patch, self.guard.check(fetched.patch))
        self.on, self.version = fetched.patch.digest, fetched.patch.version

    def polls(self, kind: str, error: type[NestError] | None = None, version: str | None = None) -> None:
        """One poll has this outcome, and the patch that is on afterwards has this version."""
        before = self.version
        outcome = self.follower.poll()
        assert (outcome.kind, type(outcome.error)) == (kind, type(None) if error is None else error), outcome
        assert self.version == (version if version is not None else before)


@pytest.fixture
def owner(hub: HubServer, store: Store, keys: Keys, tmp_path: Path) -> Owner:
    """An owner with v1 on, and v2 published."""
    publish(small_patch("v1"), store, keys)
    publish(small_patch("v2", seed=2), store, keys)
    point("v1", store, keys)
    found = Owner(tmp_path / "server-home", keys)
    found.polls("switched", version="v1")
    return found


def point(version: str, store: Store, keys: Keys, **options: timedelta) -> None:
    set_channel(REF, "stable", version, store=store, key=keys[0], **options)


def test_a_poll_with_nothing_new_is_one_request(hub: HubServer, owner: Owner) -> None:
    owner.polls("unchanged")
    hub.forget_requests()
    started = time.thread_time()
    cpu = time.process_time()
    for _ in range(10):
        owner.polls("unchanged")
    assert hub.requests == [f"GET /api/models/{REPO}/refs"] * 10
    assert time.thread_time() - started < 0.5  # the ten of them
    assert time.process_time() - cpu < 0.5  # with the server's work, and the client's in its thread


def test_the_channel_moves_and_the_patch_with_it(owner: Owner, store: Store, keys: Keys) -> None:
    point("v2", store, keys)
    owner.polls("switched", version="v2")
    owner.polls("unchanged")
    assert owner.follower.status.version == "v2"
    assert owner.follower.status.error == ""
    assert owner.store.get("v2", model_hash=BASE_A).digest == owner.on  # for a start without the Hub


def test_a_downgrade_needs_a_revocation(owner: Owner, store: Store, keys: Keys) -> None:
    point("v2", store, keys)
    owner.polls("switched", version="v2")
    point("v1", store, keys)
    owner.polls("refused", Downgrade)
    owner.polls("unchanged")  # the same commit is not looked at again, but the trouble is remembered
    assert "serial 1" in owner.follower.status.error
    publish_revocation(small_patch("v2", seed=2), "refuses recipes", REF, key=keys[0])
    owner.polls("switched", version="v1")
    assert owner.follower.status.error == ""
    assert owner.left == []


def test_a_revoked_patch_is_left(owner: Owner, keys: Keys) -> None:
    publish_revocation(small_patch("v1"), "answers recipes", REF, key=keys[0])
    outcome = owner.follower.poll()
    assert outcome.kind == "revoked"
    assert [error.message for error in owner.left] == [outcome.error.message]  # type: ignore[union-attr]
    assert "answers recipes" in owner.left[0].message
    owner.polls("unchanged")
    assert len(owner.left) == 1


def test_forged_wrong_and_foreign_patches_are_refused(
    hub: HubServer, owner: Owner, store: Store, keys: Keys, tmp_path: Path
) -> None:
    stranger = generate_keys(tmp_path / "stranger")[:2]
    publish(small_patch("v3", seed=3), store, stranger)
    point("v3", store, keys)
    owner.polls("refused", SignatureError)  # the channel is good, the patch is not
    set_channel(REF, "stable", "v2", store=store, key=stranger[0])
    owner.polls("refused", SignatureError)  # and the other way round
    point("v2", store, keys)
    forget_cache()
    hub.fault("wrong", "/_files/")
    owner.polls("refused", DigestMismatch)
    owner.polls("refused", DigestMismatch)
    hub.heal()
    owner.polls("switched", version="v2")  # damage passes: it was tried again without news
    publish(small_patch("v9", base=BASE_B), store, keys, place="alice/other-base")
    elsewhere = Owner(tmp_path / "b", keys, "alice/other-base@stable")
    set_channel(parse_repo("alice/other-base"), "stable", "v9", store=store, key=keys[0])
    elsewhere.polls("refused", BaseMismatch)


@pytest.mark.parametrize("step", ["/refs$", "/resolve/.*/channels", "/resolve/.*/patch.sig", "/_files/"])
def test_faults_leave_the_old_patch_on(hub: HubServer, owner: Owner, store: Store, keys: Keys, step: str) -> None:
    point("v2", store, keys)
    for kind, status in (("status", 401), ("status", 403), ("status", 404), ("status", 503), ("drop", 0)):
        forget_cache()
        hub.fault(kind, step, status=status)
        owner.polls("unreachable", _hub_error(owner))
        hub.heal()
    assert owner.follower.status.failures == 10
    owner.polls("switched", version="v2")
    assert owner.follower.status.failures == 0


def forget_cache() -> None:
    """Publisher and follower share this process's cache; make the follower's cold."""
    from huggingface_hub import constants

    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def _hub_error(owner: Owner) -> type[NestError]:
    """The type of the last poll's error: a HubError, or its kind for a missing repository."""
    outcome = owner.follower.poll()
    assert isinstance(outcome.error, HubError)
    return type(outcome.error)


def test_a_moved_tag_is_noticed(hub: HubServer, owner: Owner) -> None:
    hub.repo(REPO).tags["v1"] = hub.repo(REPO).tags["v2"]
    owner.polls("refused", TrustError)
    assert "was moved" in owner.follower.status.error


def test_an_admission_test_has_a_say(owner: Owner, store: Store, keys: Keys) -> None:
    owner.refuse = AdmissionRefused("it refuses everything", "train it again")
    point("v2", store, keys)
    owner.polls("refused", AdmissionRefused)
    owner.polls("unchanged")
    owner.refuse = None
    point("v2", store, keys)  # another look needs a reason: a new commit
    owner.polls("switched", version="v2")


def test_expiry_and_silence_make_it_stale(hub: HubServer, owner: Owner, store: Store, keys: Keys) -> None:
    point("v1", store, keys, valid=timedelta(hours=1))
    owner.polls("unchanged")
    assert owner.follower.status.stale == ""
    owner.clock = timedelta(hours=2)
    owner.polls("unchanged")
    assert "expired" in owner.follower.status.stale
    point("v2", store, keys, valid=timedelta(hours=1))
    owner.polls("refused", Expired)
    owner.clock = timedelta()
    owner.polls("switched", version="v2")  # no Expired from a wrong clock is for ever
    hub.fault("status", "/refs$", status=503)
    owner.polls("unreachable", HubError)
    assert owner.follower.status.stale == ""
    owner.clock = timedelta(minutes=6)
    assert "has not answered" in owner.follower.status.stale


def test_a_source_that_answers_with_no_good_channel_file_is_stale(
    hub: HubServer, owner: Owner, store: Store, keys: Keys, tmp_path: Path
) -> None:
    stranger = generate_keys(tmp_path / "stranger")[:2]
    set_channel(REF, "stable", "v2", store=store, key=stranger[0])
    owner.polls("refused", SignatureError)
    for minutes in (3, 6):
        owner.clock = timedelta(minutes=minutes)
        owner.polls("unchanged")
    assert "no channel file that counts" in owner.follower.status.stale
    point("v1", store, keys)
    owner.clock = timedelta()
    owner.polls("unchanged")
    assert owner.follower.status.stale == ""
    owner.refuse = AdmissionRefused("it refuses everything", "train it again")
    point("v2", store, keys)
    owner.polls("refused", AdmissionRefused)
    owner.clock = timedelta(minutes=4)
    owner.polls("unchanged")
    owner.clock = timedelta(minutes=8)
    assert owner.follower.status.stale == ""  # the file is good, whatever the patch is worth


def test_an_old_channel_file_is_refused(hub: HubServer, owner: Owner, store: Store, keys: Keys) -> None:
    repo = hub.repo(REPO)
    old = {path: blob for path, blob in repo.tree.items() if path.startswith("channels/")}
    time.sleep(1.1)  # files are dated to the second
    point("v2", store, keys)
    owner.polls("switched", version="v2")
    repo.commit({**repo.tree, **old}, "replay")
    owner.polls("refused", SignatureError)


def test_without_any_policy(hub: HubServer, store: Store, tmp_path: Path, keys: Keys) -> None:
    publish(small_patch("v1"), store)
    publish(small_patch("v2", seed=2), store)
    set_channel(REF, "stable", "v2", store=store)
    owner = Owner(tmp_path / "server-home", None)
    owner.polls("switched", version="v2")
    set_channel(REF, "stable", "v1", store=store)
    owner.polls("refused", Downgrade)
    publish_revocation(small_patch("v2", seed=2), "bad", REF, key=keys[0])
    owner.polls("switched", version="v1")


def test_a_mirror_is_followed_alike(store: Store, keys: Keys, tmp_path: Path) -> None:
    place = str(tmp_path / "mirror")
    owner = Owner(tmp_path / "server-home", keys, place)
    owner.polls("unreachable", _hub_error(owner))
    publish(small_patch("v1"), store, keys, place=place)
    set_channel(parse_repo(place), "stable", "v1", store=store, key=keys[0])
    owner.polls("switched", version="v1")
    owner.polls("unchanged")
    assert json.loads((tmp_path / "mirror/channels/stable.json").read_text())["version"] == "v1"


def test_the_channel_is_stable_unless_named() -> None:
    assert follow_ref("hf://org/repo").revision == "stable"
    assert follow_ref("org/repo@canary").revision == "canary"
