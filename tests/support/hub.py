"""Fixtures for tests against the local hub: a server per test module, a fresh client cache, no long sleeps."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nest_runtime.hub.publish import Pushed, push
from nest_runtime.hub.repository import parse_repo
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.write import to_bytes
from nest_runtime.store.store import Store
from nest_runtime.trust.check import sign_bytes
from nest_runtime.trust.guard import Guard, guard_for
from nest_runtime.trust.keys import generate_keys
from nest_runtime.trust.material import Material
from tests.support.hub_server import HubServer

WAIT = 0.02  # of what the client would sleep between its tries


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    os.environ.setdefault("HF_XET_CACHE", str(tmp_path_factory.mktemp("xet-cache")))  # its logs, too
    with HubServer(tmp_path_factory.mktemp("xet")) as running:
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub, empty and healthy, and this process set up as alice's."""
    from huggingface_hub import constants

    server.heal()
    server.forget_requests()
    server.state.repos.clear()
    server.state.objects.clear()
    server.state.mode = "lfs"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    quick_tries(monkeypatch)
    yield server
    server.heal()
    for thread in threading.enumerate():  # requests given up on are still under way: they would act on the next test
        if thread.name == "nest-hub":
            thread.join(30)


def quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client and our retries wait 2 % of what they would between tries."""
    quick = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds * WAIT), time=time.time, monotonic=time.monotonic)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "tenacity.nap"):
        monkeypatch.setattr(f"{module}.time", quick)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "nest-home")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public half."""
    private, public, _ = generate_keys(tmp_path_factory.mktemp("keys"))
    return private, public


def guard_of(store: Store, keys: tuple[Path, Path]) -> Guard:
    guard = guard_for(store, [keys[1]], require_signature=True)
    assert guard is not None
    return guard


def signature(patch: Patch, keys: tuple[Path, Path]) -> Material:
    return sign_bytes(to_bytes(patch), keys[0]).material


def publish(
    patch: Patch, store: Store, keys: tuple[Path, Path] | None = None, place: str = "alice/safety", **options: object
) -> Pushed:
    material = signature(patch, keys) if keys else None
    return push(patch, parse_repo(place), store=store, material=material, **options)  # type: ignore[arg-type]
