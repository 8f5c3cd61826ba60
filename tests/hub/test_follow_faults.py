"""Every fault at every request, where hub/test_faults.py leaves off: polls, channels, slow and false answers.

Always an error that says what and what to do, in bounded time; nothing half done; the old patch on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from nest_runtime.errors import HubError, NestError, SignatureError
from nest_runtime.hub.publish import publish_revocation
from nest_runtime.hub.repository import parse_repo
from nest_runtime.model.load import load_model
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.limits import FollowConfig
from nest_runtime.store.store import Store
from tests.hub.test_faults import PUSH_REQUESTS, fails, is_whole
from tests.hub.test_follow import Owner, forget_cache, point
from tests.support.hub import publish
from tests.support.hub_server import Fault, HubServer
from tests.support.patches import make_patch
from tests.support.serve import Running, eventually, serving
from tests.support.store import small_patch

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"
REF = parse_repo(REPO)
Keys = tuple[Path, Path]
STATUSES = (401, 403, 404, 409, 412, 429, 503)
POLL_REQUESTS = {
    "refs": ("GET", "/refs$"),
    "revocations": ("GET", "/resolve/.*/revocations.json"),
    "revocations' signature": ("GET", "/resolve/.*/revocations.sig"),
    "channel": ("GET", "/resolve/.*/channels(/|%2F)stable.json"),
    "channel's signature": ("GET", "/resolve/.*/channels(/|%2F)stable.sig"),
    "manifest": ("GET", "/resolve/.*/manifest.json"),
    "signature": ("GET", "/resolve/.*/patch.sig"),
    "patch": ("HEAD", "/resolve/.*/patch.safetensors"),
    "file": ("GET", "/_files/"),
}


@pytest.fixture
def owner(hub: HubServer, store: Store, keys: Keys, tmp_path: Path) -> Owner:
    """v1 is on; v2 is what the channel says now, and the repository has revoked something else."""
    for number in (1, 2):
        publish(small_patch(f"v{number}", seed=number), store, keys)
    point("v1", store, keys)
    found = Owner(tmp_path / "server-home", keys, timeout=1.5)
    found.polls("switched", version="v1")
    publish_revocation(small_patch("v0", seed=9), "answers recipes", REF, key=keys[0])
    point("v2", store, keys)
    return found


def refuses(owner: Owner) -> NestError:
    """A poll that fails in time, says why, and changes nothing."""
    forget_cache()
    started = time.monotonic()
    outcome = owner.follower.poll()
    assert time.monotonic() - started < 8
    assert outcome.kind in ("unreachable", "refused"), outcome
    assert outcome.error is not None
    assert outcome.error.message
    assert outcome.error.hint
    assert owner.version == "v1"
    assert [entry.version for entry in owner.store.list() if not entry.builtin] == ["v1"]
    assert owner.follower.status.error
    return outcome.error


@pytest.mark.parametrize("step", POLL_REQUESTS)
def test_a_poll_meets_every_fault(hub: HubServer, owner: Owner, step: str) -> None:
    method, path = POLL_REQUESTS[step]
    for status in STATUSES:
        fault = hub.fault("status", path, method=method, status=status)
        error = refuses(owner)
        assert fault.seen
        assert isinstance(error, HubError)
        assert str(status) in error.message or "no repository" in error.message, error
        hub.heal()
    for kind in ("drop", "cut", "slow", "wrong"):
        if kind != "drop" and method == "HEAD":
            continue  # has no body
        fault = hub.fault(kind, path, method=method, pause=0.5)
        refuses(owner)
        assert fault.seen
        hub.heal()
    forget_cache()
    owner.polls("switched", version="v2")
    assert owner.follower.status.error == ""


LISTINGS: dict[str, Callable[[dict[str, list[dict[str, str]]]], object]] = {
    "no tags": lambda rows: {**rows, "tags": []},
    "no branches": lambda rows: {**rows, "branches": []},
    "nothing": lambda rows: {},
    "a list": lambda rows: [rows],
    "tags without names": lambda rows: {**rows, "tags": [{}]},
    "v2 is missing": lambda rows: {**rows, "tags": [row for row in rows["tags"] if row["name"] != "v2"]},
}


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_poll_meets_a_truncated_listing(hub: HubServer, owner: Owner, listing: str) -> None:
    hub.fault("body", "/refs$", change=lambda body: json.dumps(LISTINGS[listing](json.loads(body))).encode())
    if listing == "no branches":  # main is asked for by name then
        forget_cache()
        owner.polls("switched", version="v2")
        return
    refuses(owner)
    hub.heal()
    owner.polls("switched", version="v2")


def test_a_poll_meets_a_tag_that_was_moved_before(hub: HubServer, owner: Owner, store: Store, keys: Keys) -> None:
    repo = hub.repo(REPO)
    right = repo.tags["v2"]
    repo.tags["v2"] = repo.tags["v1"]
    assert isinstance(refuses(owner), SignatureError)
    repo.tags["v2"] = right
    point("v2", store, keys)  # what was refused for good is looked at again with the next commit
    owner.polls("switched", version="v2")


def test_a_hub_that_hangs_costs_one_thread(hub: HubServer, owner: Owner) -> None:
    def waiting() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "nest-hub"}

    before = waiting()
    hub.fault("slow", "/refs$", pause=8)
    for words in ("took longer than", "cannot begin", "cannot begin"):
        assert words in refuses(owner).message
        assert len(waiting() - before) == 1
    hub.heal()
    assert eventually(lambda: not waiting() - before, 20)
    owner.polls("switched", version="v2")


@pytest.mark.parametrize("status", STATUSES)
def test_a_repository_that_cannot_be_made(hub: HubServer, store: Store, status: int) -> None:
    fault = hub.fault("status", "/api/repos/create", status=status)
    error = fails(lambda: publish(small_patch("v1"), store))
    assert fault.seen
    assert isinstance(error, HubError)
    assert str(status) in error.message or status == 409  # to the client a 409 is a repository that is there
    assert hub.state.repos == {}
    hub.heal()
    assert publish(small_patch("v1"), store).version == "v1"


@pytest.mark.parametrize("step", PUSH_REQUESTS)
@pytest.mark.parametrize("kind", ["slow", "drop", "cut", "body"])
def test_a_push_meets_answers_that_are_none(hub: HubServer, store: Store, step: str, kind: str) -> None:
    """For good, not once: slow, cut off, or a proxy's page instead of the Hub's answer."""
    publish(small_patch("v1"), store)
    method, path = PUSH_REQUESTS[step]
    fault = hub.fault(kind, path, method=method, pause=4, change=lambda body: b"<html>log in</html>")
    error = fails(lambda: publish(small_patch("v2", seed=2), store, timeout=3), seconds=12)
    assert fault.seen
    if error is None:  # what was done was found out in spite of its answer, or the answer is not read
        assert step in ("card", "upload", "verify", "commit", "tag")
    else:
        assert isinstance(error, HubError)
        assert "v2" not in hub.repo(REPO).tags or step == "tag"
    is_whole(hub)
    hub.heal()
    assert publish(small_patch("v2", seed=2), store).version == "v2"
    assert hub.repo(REPO).tags["v2"] in hub.repo(REPO).commits
    assert len(hub.repo(REPO).log) == 3  # nothing was published twice
    is_whole(hub)


SERVER_FAULTS = [
    *(("status", step, status) for step, status in zip(POLL_REQUESTS, (*STATUSES, 401, 503), strict=True)),
    ("drop", "refs", 0),
    ("drop", "file", 0),
    ("cut", "file", 0),
    ("wrong", "file", 0),
    ("wrong", "channel", 0),
    ("wrong", "refs", 0),
]


def test_a_server_goes_on_answering_whatever_the_hub_does(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path
) -> None:
    loaded = load_model(tiny_llama)
    patches = [make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, base_hash=loaded.hash) for n in (1, 2)]
    for patch in patches:
        publish(patch, store, keys)
    point("v1", store, keys)
    repo = hub.repo(REPO)
    before = repo.heads["main"]
    publish_revocation(small_patch("v0", seed=9), "answers recipes", REF, key=keys[0])
    point("v2", store, keys)
    news, repo.heads["main"] = repo.heads["main"], before
    follow = FollowConfig(f"hf://{REPO}@stable", every=0.2, admission_test=False)
    config = ServeConfig(model=str(tiny_llama), port=0, trust=(keys[1],), require_signature=True, follow=follow)
    with serving(config) as server:
        seen: list[tuple[int, str]] = []
        done = threading.Event()
        client = threading.Thread(target=_ask, args=(server, seen, done))
        client.start()
        try:
            last = hub.fault("status", "/_files/", status=503)  # so that a poll between two faults gets no further
            repo.heads["main"] = news
            for kind, step, status in SERVER_FAULTS:
                method, path = POLL_REQUESTS[step]
                fault = Fault(kind, path, method=method, status=status)
                hub.faults.active[:] = [fault, last]
                forget_cache()
                assert eventually(lambda fault=fault: fault.seen > 0, 30), (kind, step)  # type: ignore[misc]
                assert eventually(lambda: bool(server.http("GET", "/ready").json()["follow"]["error"]), 30)
                ready = server.http("GET", "/ready").json()
                assert (ready["status"], ready["patch"]) == ("ready", "v1"), (kind, step, ready)
            assert [served.label for served in server.server.service.table.loaded()] == ["v1"]
            hub.heal()
            assert eventually(lambda: (200, "v2") in seen, 30)
        finally:
            done.set()
            client.join(60)
        assert set(seen) == {(200, "v1"), (200, "v2")}


def _ask(server: Running, seen: list[tuple[int, str]], done: threading.Event) -> None:
    body = {"model": server.name, "messages": [{"role": "user", "content": "How do I bake bread?"}], "max_tokens": 3}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while not done.is_set():
            response = client.post("/v1/chat/completions", json=body)
            seen.append((response.status_code, response.headers.get("x-nest-patch", "")))
            time.sleep(0.02)
