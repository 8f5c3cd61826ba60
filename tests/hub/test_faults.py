"""What can go wrong at every request of a push and of a pull: a clear error, a bounded wait, nothing half done."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nest_runtime.errors import DigestMismatch, HubError, NestError
from nest_runtime.hub.fetch import fetch, pull
from nest_runtime.store.store import Store
from nest_runtime.trust.documents import MAX_DOCUMENT
from tests.support.hub import guard_of, publish
from tests.support.hub_server import Blob, HubServer
from tests.support.store import small_patch

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"
Keys = tuple[Path, Path]
PUSH_REQUESTS = {
    "refs": ("GET", "/refs$"),
    "card": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/_lfs/"),
    "verify": ("POST", "/_lfs/verify"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
}
PULL_REQUESTS = {
    "refs": ("GET", "/refs$"),
    "head": ("HEAD", "/resolve/.*/patch.safetensors"),
    "file": ("GET", "/_files/"),
    "manifest": ("GET", "/resolve/.*/manifest.json"),
    "signature": ("GET", "/resolve/.*/patch.sig"),
}
STATUSES = (401, 403, 404, 409, 412, 429, 503)
WORDS = {401: "token", 403: "may not", 404: "not found", 409: "somebody else", 412: "somebody else", 429: "limits"}


def fails(call: object, seconds: float = 20.0) -> NestError | None:
    """The error of a call, or None where it succeeded after all; either within some seconds."""
    started, caught = time.monotonic(), None
    try:
        call()  # type: ignore[operator]
    except NestError as error:
        caught = error
    assert time.monotonic() - started < seconds
    assert caught is None or (caught.message and caught.hint)
    return caught


def is_whole(hub: HubServer) -> None:
    """Every tag names a commit with that version; main is a commit with everything, tagged or not yet."""
    repo = hub.repo(REPO)
    for tag, sha in repo.tags.items():
        content = repo.commits[sha]["patch.safetensors"].content
        assert content is not None
        assert f'\\"version\\":\\"{tag}\\"'.encode() in content
    assert set(repo.tree) >= {"patch.safetensors", "README.md"}


@pytest.mark.parametrize("step", PUSH_REQUESTS)
def test_push_meets_a_status_that_stays(hub: HubServer, store: Store, step: str) -> None:
    publish(small_patch("v1"), store)
    method, path = PUSH_REQUESTS[step]
    for status in STATUSES:
        hub.heal()
        hub.state.objects.clear()  # what is there already is not uploaded again
        fault = hub.fault("status", path, method=method, status=status)
        error = fails(lambda: publish(small_patch("v2", seed=2), store))
        assert 0 < fault.seen <= 40
        assert isinstance(error, HubError)
        assert str(status) in str(error)
        assert "alice/safety" in str(error)
        assert "v2" not in hub.repo(REPO).tags
        is_whole(hub)
    hub.heal()
    assert publish(small_patch("v2", seed=2), store).version == "v2"
    assert set(hub.repo(REPO).tags) == {"v1", "v2"}
    is_whole(hub)


@pytest.mark.parametrize("step", ["refs", "card", "preupload", "batch", "upload", "verify", "commit", "tag"])
@pytest.mark.parametrize("kind", ["status", "drop", "drop-late"])
def test_push_survives_a_fault_that_passes(hub: HubServer, store: Store, step: str, kind: str) -> None:
    publish(small_patch("v1"), store)
    method, path = PUSH_REQUESTS[step]
    hub.fault(kind, path, method=method, status=503, times=1)
    pushed = publish(small_patch("v2", seed=2), store)
    assert hub.repo(REPO).tags["v2"] == pushed.revision == hub.repo(REPO).heads["main"]
    assert len(hub.repo(REPO).log) == 3  # the first, v1 and v2: what was done unnoticed is not done again
    is_whole(hub)


@pytest.mark.parametrize("step", PULL_REQUESTS)
def test_pull_meets_a_status_that_stays(hub: HubServer, store: Store, keys: Keys, tmp_path: Path, step: str) -> None:
    publish(small_patch("v1"), store, keys)
    other = Store(tmp_path / "other")
    method, path = PULL_REQUESTS[step]
    for status in STATUSES:
        hub.heal()
        fault = hub.fault("status", path, method=method, status=status)
        error = fails(lambda: pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys)))
        assert fault.seen
        assert isinstance(error, HubError)
        assert str(status) in str(error) or "no repository" in str(error)
        assert [e for e in other.list() if not e.builtin] == []
    hub.heal()
    pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys))


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_says_what_to_do(hub: HubServer, store: Store, status: int) -> None:
    publish(small_patch("v1"), store)
    hub.fault("status", "/refs$", status=status, headers={"Retry-After": "0"} if status == 429 else {})
    error = fails(lambda: pull(f"{REPO}@v1", store=store))
    assert error is not None
    assert WORDS.get(status, "out of order") in str(error)


@pytest.mark.parametrize("step", PULL_REQUESTS)
@pytest.mark.parametrize("kind", ["drop", "cut", "status"])
def test_pull_survives_a_fault_that_passes(
    hub: HubServer, store: Store, keys: Keys, tmp_path: Path, step: str, kind: str
) -> None:
    publish(small_patch("v1"), store, keys)
    method, path = PULL_REQUESTS[step]
    hub.fault(kind, path, method=method, status=503, times=1)
    other = Store(tmp_path / "other")
    assert pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys))[0].patch == small_patch("v1")


@pytest.mark.parametrize("step", ["refs", "file", "manifest", "signature"])
def test_slow_bytes_are_not_waited_for(hub: HubServer, store: Store, keys: Keys, tmp_path: Path, step: str) -> None:
    publish(small_patch("v1"), store, keys)
    method, path = PULL_REQUESTS[step]
    hub.fault("slow", path, method=method, pause=0.2)
    other = Store(tmp_path / "other")
    error = fails(lambda: pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys), timeout=0.8), seconds=5)
    assert error is not None
    assert "took longer than 1 s" in str(error)
    assert [e for e in other.list() if not e.builtin] == []
    hub.heal()
    assert pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys))[0].patch == small_patch("v1")


@pytest.mark.parametrize("step", ["file", "manifest", "signature"])
def test_wrong_bytes_of_the_right_size(hub: HubServer, store: Store, keys: Keys, tmp_path: Path, step: str) -> None:
    publish(small_patch("v1"), store, keys)
    method, path = PULL_REQUESTS[step]
    hub.fault("wrong", path, method=method)
    other = Store(tmp_path / "other")
    for guard in (guard_of(other, keys), None):
        with pytest.raises(DigestMismatch, match="not those that the Hub names"):
            pull(f"{REPO}@v1", store=other, guard=guard)
    assert [e for e in other.list() if not e.builtin] == []
    hub.heal()
    assert pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys))[0].patch == small_patch("v1")


def test_truncated_listings(hub: HubServer, store: Store) -> None:
    publish(small_patch("v1"), store)

    def without_tags(body: bytes) -> bytes:
        return json.dumps({**json.loads(body), "tags": []}).encode()

    hub.fault("body", "/refs$", change=lambda body: body[:-20])
    with pytest.raises(HubError, match="cannot be read"):
        fetch(f"{REPO}@v1", store=store)
    hub.heal()
    hub.fault("body", "/refs$", change=without_tags)
    with pytest.raises(HubError, match="no revision 'v1'"):
        fetch(f"{REPO}@v1", store=store)
    hub.heal()
    hub.fault("body", "/refs$", change=without_tags, times=1)
    with pytest.raises(HubError, match=r"already has a tag v1|somebody else"):
        publish(small_patch("v1", seed=8), store, allow_downgrade=True)
    assert hub.repo(REPO).tags["v1"] == hub.repo(REPO).log[1][0]


def test_retry_after_is_honored_and_bounded(hub: HubServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    publish(small_patch("v1"), store)
    hub.fault("status", "/refs$", status=429, headers={"Retry-After": "7"}, times=1)
    assert fetch(f"{REPO}@v1", store=store).patch.version == "v1"
    assert slept == [7.0]
    hub.fault("status", "/refs$", status=503, headers={"Retry-After": "86400"})
    with pytest.raises(HubError, match="503"):
        fetch(f"{REPO}@v1", store=store)
    assert slept == [7.0]


def test_a_hub_that_is_down(hub: HubServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = fails(lambda: fetch(f"{REPO}@v1", store=store), seconds=8)
    assert isinstance(error, HubError)
    assert "network" in error.hint


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_what_is_larger_than_its_manifest_is_not_fetched(
    hub: HubServer, store: Store, keys: Keys, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", mode != "xet")
    hub.state.mode = mode
    publish(small_patch("v1"), store, keys)
    tree = hub.repo(REPO).tree
    blob = tree["patch.safetensors"]
    tree["patch.safetensors"] = replace(blob, size=blob.size + 1)
    if mode == "lfs":
        hub.state.objects[blob.lfs] += b"x"
    other = Store(tmp_path / "other")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cold"))
    hub.forget_requests()
    error = fails(lambda: pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys)))
    assert error is not None
    assert f"more than the {blob.size} bytes" in error.message
    assert sum("/_files/" in line for line in hub.requests) <= 1  # asked for once, and not read to its end
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "colder"))
    tree["manifest.json"] = Blob.inline(b" " * (MAX_DOCUMENT + 1))
    error = fails(lambda: pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys)))
    assert error is not None
    assert "manifest.json has more than" in error.message
    assert [e for e in other.list() if not e.builtin] == []
