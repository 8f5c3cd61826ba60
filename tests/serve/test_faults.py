"""Faults from outside on a running server process: a disk that takes nothing more, an engine that fails, a reload."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.store.store import Store
from tests.support.serve import Process, eventually, next_event, process

pytest_plugins = ["tests.support.fixtures_serve"]
pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit")


@pytest.fixture(scope="module")
def home(patches: list[Patch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose store has all three patches, v1 active."""
    folder = tmp_path_factory.mktemp("faults")
    store = Store(folder / "home")
    for patch in patches:
        store.add(str(patch.save(folder / f"{patch.version}.safetensors")))
    store.activate("test@v1")
    return folder / "home"


@pytest.fixture(scope="module")
def server(home: Path, tiny_llama: Path) -> Iterator[Process]:
    with process(home, "--model", str(tiny_llama)) as running:
        yield running


@contextmanager
def full_disk(server: Process) -> Iterator[None]:
    """The kernel refuses the process every further byte of any file."""
    before = resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(server.popen.pid, resource.RLIMIT_FSIZE, before)


def ask(server: Process) -> tuple[int, str]:
    body = {"model": server.name, "prompt": [5, 6, 7], "max_tokens": 4}
    response = server.http("POST", "/v1/completions", json=body)
    return response.status_code, response.headers["x-nest-patch"]


def switch(server: Process, version: str) -> tuple[int, dict[str, Any]]:
    response = server.admin("POST", "/v1/patches/activate", json={"patch": version})
    return response.status_code, response.json()


def test_a_full_disk_changes_nothing_and_answers_go_on(server: Process, home: Path, tiny_llama: Path) -> None:
    assert switch(server, "v2")[0] == 200
    with full_disk(server):
        for _ in range(3):
            status, refused = switch(server, "v3")
            assert status == 409
            assert "cannot be written" in refused["error"]["message"]
            assert server.admin("POST", "/v1/patches/rollback").status_code == 409
            assert ask(server) == (200, "v2")
        assert server.admin("GET", "/v1/patches").json()["active"] == "v2"
        assert server.http("GET", "/ready").json()["patch"] == "v2"
        assert 'nest_patch_failures_total{error="StoreError"} 6.0' in server.http("GET", "/metrics").text
    assert switch(server, "v3")[0] == 200
    assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v2"
    store = Store(home)
    active = store.active(load_model(tiny_llama).hash)
    assert active is not None
    assert active.version == "v2"
    assert store.verify_history() == 7
    assert AuditLog(home / "audit.jsonl").verify() > 0


def test_hangup_reads_tokens_and_trust_again(server: Process, home: Path) -> None:
    before = ask(server)
    token = home / "admin-token"
    kept = token.read_text()
    token.write_text("")
    server.popen.send_signal(signal.SIGHUP)
    assert eventually(lambda: "stay as they were" in server.log.read_text())
    assert server.admin("GET", "/v1/patches").status_code == 200
    token.write_text("another\n")
    server.popen.send_signal(signal.SIGHUP)
    assert next_event(server.popen, 60) == {"event": "reloaded"}
    assert server.admin("GET", "/v1/patches").status_code == 401
    assert AuditLog(home / "audit.jsonl").tail(2)[0]["what"] == "reload"
    token.write_text(kept)
    (home / "trust.toml").write_text("format = 1\nkeys = 7\n")
    server.popen.send_signal(signal.SIGHUP)
    assert eventually(lambda: "keys" in server.log.read_text().splitlines()[-1])
    assert (ask(server), before[0]) == (before, 200)
