"""Switching waits for nothing that loads, and what fails to load leaves nothing: silent Hubs, FIFOs, disks, labels."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.patch.patch import Patch
from nest_runtime.serve import ServeConfig
from nest_runtime.store.store import Store
from nest_runtime.trust.keys import generate_keys
from tests.support.hub import quick_tries
from tests.support.serve import Running, process, serving

pytest_plugins = ["tests.support.fixtures_serve"]


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


def loaded(server: Running) -> list[str]:
    return [row["label"] for row in server.admin("GET", "/v1/patches").json()["patches"]]


def activate(server: Running, ref: str, **more: Any) -> tuple[int, dict[str, Any]]:
    response = server.admin("POST", "/v1/patches/activate", json={"patch": ref, **more})
    return response.status_code, response.json()


def on_model(server: Running) -> int:
    """How many patches the model's runtime holds."""
    runtime: Any = server.server.service.table.loader._runtime
    return len(runtime.patches)


class SilentHub:
    """A Hub that takes connections and never answers, until ``speak`` closes them."""

    def __init__(self) -> None:
        self.port = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.port.getsockname()[1]}"
        self.asked = threading.Event()
        self._taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                self._taken.append(self.port.accept()[0])
            except OSError:
                return
            self.asked.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self.port.shutdown(socket.SHUT_RDWR)
        self.port.close()
        for connection in self._taken:
            connection.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SilentHub]:
    from huggingface_hub import constants

    hub = SilentHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    quick_tries(monkeypatch)
    yield hub
    hub.close()


def test_loads_from_a_silent_hub_hold_up_no_rollback(server: Running, files: dict[str, str], silent: SilentHub) -> None:
    assert activate(server, files["v2"])[0] == 200
    with ThreadPoolExecutor(8) as pool:
        try:
            loads = [pool.submit(activate, server, f"hf://org/repo-{number}@v9") for number in range(8)]
            assert silent.asked.wait(20)
            began = time.monotonic()
            rolled = server.admin("POST", "/v1/patches/rollback", json={"policy": "enforce"})
            assert (rolled.status_code, rolled.json()["active"]) == (200, "v1")
            assert activate(server, "v2")[0] == 200
            assert activate(server, files["v3"])[0] == 200
            assert time.monotonic() - began < 45
            assert not any(load.done() for load in loads)
        finally:
            silent.close()
        assert {load.result()[0] for load in loads} == {502}
    assert server.http("GET", "/ready").json()["patch"] == "v3"
    assert loaded(server) == ["v1", "v2", "v3"]


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Every read of a patch whose reference has ``name`` in it waits: events that it began, and that lets it go on."""
    from nest_runtime.resolve import load_patch

    began, release = threading.Event(), threading.Event()

    def slowly(ref: str, **more: Any) -> Patch:
        if name in str(ref):
            began.set()
            assert release.wait(60)
        return load_patch(ref, **more)

    monkeypatch.setattr("nest_runtime.serve.switching.loading.load_patch", slowly)
    try:
        yield began, release
    finally:
        release.set()


def test_a_rollback_is_not_undone_by_an_activation_that_was_asked_for_before_it(
    server: Running, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert activate(server, files["v2"])[0] == 200
    with held(monkeypatch, "v3") as (began, release), ThreadPoolExecutor(1) as pool:
        late = pool.submit(activate, server, files["v3"])
        assert began.wait(20)
        assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
        release.set()
        status, body = late.result()
    assert (status, body["error"]["code"]) == (409, "conflict")
    assert "was rolled back to v1" in body["error"]["message"]
    assert server.http("GET", "/ready").json()["patch"] == "v1"
    assert loaded(server) == ["v1", "v2"]
    assert activate(server, files["v3"])[0] == 200


def test_one_patch_loaded_by_many_at_once_is_loaded_once(server: Running, files: dict[str, str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: activate(server, files[f"v{2 + n % 2}"])[0], range(8)))
    assert answers == [200] * 8
    assert sorted(loaded(server)) == ["v1", "v2", "v3"]


def test_a_fifo_beside_a_patch_file_hangs_neither_an_activation_nor_the_end(
    tmp_path: Path, tiny_llama: Path, files: dict[str, str]
) -> None:
    """The call is answered within the client's patience, and the process ends within the helper's."""
    public = generate_keys(tmp_path / "keys")[1]
    for name in ("v2.manifest.json", "v2.sig"):
        os.mkfifo(Path(files["v2"]).with_name(name))
    with process(
        tmp_path / "home", "--model", str(tiny_llama), "--patch", files["v1"], "--trust", str(public)
    ) as server:
        refused = server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]})
        assert refused.status_code in (403, 422)
        assert "it is a pipe" in refused.json()["error"]["message"]
        assert server.admin("POST", "/v1/patches/activate", json={"patch": files["v3"]}).status_code == 200


def test_a_load_that_cannot_be_written_down_leaves_nothing_loaded(
    server: Running, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    for path in ("/v1/patches", "/v1/patches/activate"):
        with monkeypatch.context() as disk:
            disk.setattr("nest_runtime.serve.switching.audit.atomic_write", full)
            refused = server.admin("POST", path, json={"patch": files["v2"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert loaded(server) == ["v1"]
        assert on_model(server) == 1
    assert server.admin("POST", "/v1/patches", json={"patch": files["v2"]}).status_code == 200
    assert loaded(server) == ["v1", "v2"]


def test_an_activation_that_the_store_refuses_leaves_nothing_loaded(
    config: ServeConfig, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    store.activate(store.add(files["v1"]).digest)
    with serving(replace(config, patch=None)) as server:

        def full(*arguments: Any, **more: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(Store, "_commit", full)
            assert activate(server, files["v2"])[0] == 409
        assert loaded(server) == ["v1"]
        assert activate(server, files["v2"])[0] == 200


@pytest.fixture
def candidate(patches: list[Patch], tmp_path: Path) -> str:
    """Another patch that is version v3, too."""
    return str(patches[1].evolve(name="candidate", version="v3", serial=9).save(tmp_path / "candidate.safetensors"))


def test_a_version_that_the_store_has_is_no_label_for_another_patch(
    server: Running, files: dict[str, str], patches: list[Patch], candidate: str
) -> None:
    Store().add(files["v3"])
    row = server.admin("POST", "/v1/patches", json={"patch": candidate}).json()
    assert (row["version"], row["label"]) == ("v3", "candidate@v3")
    status, switch = activate(server, "v3")
    assert (status, switch["active"], switch["digest"]) == (200, "test@v3", patches[2].digest)
    assert activate(server, "candidate@v3")[1]["digest"] == row["digest"]
    assert server.admin("DELETE", "/v1/patches/test@v3").status_code == 200
    assert activate(server, "v3")[1]["digest"] == patches[2].digest


def test_a_label_that_becomes_ambiguous_is_refused(
    server: Running, files: dict[str, str], patches: list[Patch], candidate: str
) -> None:
    row = server.admin("POST", "/v1/patches", json={"patch": candidate}).json()
    assert row["label"] == "v3"
    Store().add(files["v3"])  # by another command, while the server runs
    status, refused = activate(server, "v3")
    assert (status, refused["error"]["code"]) == (409, "conflict")
    assert "v3 is ambiguous: candidate@v3" in refused["error"]["message"]
    assert activate(server, "test@v3")[1]["digest"] == patches[2].digest
    assert activate(server, "candidate@v3")[1]["digest"] == row["digest"]
    assert activate(server, row["digest"])[0] == 200


def test_a_name_and_version_that_the_store_has_otherwise_is_refused(
    server: Running, files: dict[str, str], patches: list[Patch], tmp_path: Path
) -> None:
    Store().add(files["v3"])
    forged = patches[1].evolve(version="v3", serial=3).save(tmp_path / "forged.safetensors")
    status, refused = activate(server, str(forged))
    assert status == 409
    assert "test@v3 is already" in refused["error"]["message"]
    assert loaded(server) == ["v1"]
    assert on_model(server) == 1
