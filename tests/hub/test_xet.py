"""Transfers over Xet when something is wrong: tokens, the content store, the cache. hf_xet compares no hashes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nest_runtime.errors import DigestMismatch, HubError, NestError
from nest_runtime.hub.fetch import pull
from nest_runtime.store.store import Store
from tests.support.hub import publish
from tests.support.hub_server import HubServer
from tests.support.store import small_patch

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"


@pytest.fixture
def xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with Xet transfers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.state.mode = "xet"
    cold()
    yield hub
    cold()


def cold() -> None:
    """Forget the client's files and Xet tokens."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _xet

    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    _xet.XET_CONNECTION_INFO_CACHE.clear()


def refused(call: Callable[[], object], seconds: float) -> NestError:
    started = time.monotonic()
    with pytest.raises(NestError) as caught:
        call()
    assert time.monotonic() - started < seconds
    assert caught.value.message
    assert caught.value.hint
    return caught.value


def added(store: Store) -> list[str]:
    return [entry.version for entry in store.list() if not entry.builtin]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412])
def test_a_write_token_that_is_refused(xet: HubServer, store: Store, status: int) -> None:
    publish(small_patch("v1"), store)
    fault = xet.fault("status", "/xet-write-token/", status=status)
    error = refused(lambda: publish(small_patch("v2", seed=2), store), 20)
    assert fault.seen == 1
    assert isinstance(error, HubError)
    assert f"while committing: {status}" in error.message
    assert set(xet.repo(REPO).tags) == {"v1"}
    xet.heal()
    assert publish(small_patch("v2", seed=2), store).version == "v2"


@pytest.mark.parametrize(("kind", "status"), [("status", 429), ("status", 503), ("drop", 0), ("slow", 0)])
def test_a_write_token_that_does_not_come(xet: HubServer, store: Store, kind: str, status: int) -> None:
    publish(small_patch("v1"), store)
    xet.fault(kind, "/xet-write-token/", status=status)
    error = refused(lambda: publish(small_patch("v2", seed=2), store, timeout=1.5), 10)
    assert "took longer than" in error.message  # hf_xet tries again for minutes; nobody here waits that long
    assert "may have arrived" in error.hint
    assert set(xet.repo(REPO).tags) == {"v1"}


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 503])
def test_a_read_token_that_is_refused(xet: HubServer, store: Store, tmp_path: Path, status: int) -> None:
    publish(small_patch("v1"), store)
    cold()
    other = Store(tmp_path / "other")
    fault = xet.fault("status", "/xet-read-token/", status=status)
    error = refused(lambda: pull(f"{REPO}@v1", store=other), 20)
    assert fault.seen
    assert f"while reading patch.safetensors: {status}" in error.message
    assert "published" not in error.hint
    assert added(other) == []
    xet.heal()
    assert pull(f"{REPO}@v1", store=other)[0].patch == small_patch("v1")


@pytest.mark.parametrize("kind", ["drop", "slow"])
def test_a_read_token_that_does_not_come(xet: HubServer, store: Store, tmp_path: Path, kind: str) -> None:
    publish(small_patch("v1"), store)
    cold()
    other = Store(tmp_path / "other")
    xet.fault(kind, "/xet-read-token/")
    assert isinstance(refused(lambda: pull(f"{REPO}@v1", store=other, timeout=1.5), 10), HubError)
    assert added(other) == []


def test_a_drop_that_passes_is_survived(xet: HubServer, store: Store, tmp_path: Path) -> None:
    publish(small_patch("v1"), store)
    cold()
    xet.fault("drop", "/xet-read-token/", times=1)
    assert pull(f"{REPO}@v1", store=Store(tmp_path / "other"))[0].patch == small_patch("v1")


@pytest.mark.parametrize("damage", ["flip", "cut", "header"])
def test_damage_in_the_content_store(xet: HubServer, store: Store, tmp_path: Path, damage: str) -> None:
    patch, other = small_patch("v1", seed=40 + len(damage)), Store(tmp_path / "other")
    before = set(xorbs(xet))
    publish(patch, store)
    (xorb,) = set(xorbs(xet)) - before
    whole = xorb.read_bytes()
    broken = bytearray(whole)
    if damage == "cut":
        del broken[len(broken) // 2 :]
    else:
        broken[100 if damage == "flip" else 0] ^= 1
    xorb.chmod(0o600)
    xorb.write_bytes(broken)
    cold()
    error = refused(lambda: pull(f"{REPO}@v1", store=other), 20)
    if damage == "flip":  # same size, no complaint from the client
        assert isinstance(error, DigestMismatch)
    else:
        assert "HF_HUB_DISABLE_XET" in error.hint
    assert added(other) == []
    xorb.write_bytes(whole)
    assert pull(f"{REPO}@v1", store=other)[0].patch == patch  # nothing of the damage was kept


def test_another_file_under_its_hash(xet: HubServer, store: Store, tmp_path: Path) -> None:
    """The Hub names the right SHA-256 and size, and the Xet hash of another version: wrong bytes of the right size."""
    from dataclasses import replace

    publish(small_patch("v1"), store)
    first = xet.repo(REPO).tree["patch.safetensors"]
    publish(small_patch("v2", seed=2), store)
    tree = xet.repo(REPO).tree
    second = tree["patch.safetensors"]
    assert second.size == first.size
    tree["patch.safetensors"] = replace(second, xet=first.xet)
    cold()
    other = Store(tmp_path / "other")
    with pytest.raises(DigestMismatch, match="not those that the Hub names"):
        pull(f"{REPO}@v2", store=other)
    assert added(other) == []
    tree["patch.safetensors"] = second
    assert pull(f"{REPO}@v2", store=other)[0].patch == small_patch("v2", seed=2)


def test_the_shared_cache_is_not_trusted(xet: HubServer, store: Store, tmp_path: Path) -> None:
    from huggingface_hub import constants

    publish(small_patch("v1"), store)
    cold()
    other = Store(tmp_path / "other")
    pull(f"{REPO}@v1", store=other)
    (blob,) = (path for path in Path(constants.HF_HUB_CACHE).glob("blobs/*/*") if not path.suffix)
    assert blob.name == xet.repo(REPO).tree["patch.safetensors"].xet  # Xet's hash, which is no SHA-256
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    with pytest.raises(DigestMismatch):
        pull(f"{REPO}@v1", store=other)
    assert not blob.exists()
    assert pull(f"{REPO}@v1", store=other)[0].patch == small_patch("v1")


def xorbs(hub: HubServer) -> list[Path]:
    """The files of hf_xet's content store that hold data."""
    folder: Path = hub.faults.app.xet_folder
    return [path for path in folder.rglob("xorbs/xorbs/default.*") if path.suffix != ".tagset"]
