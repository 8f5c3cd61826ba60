"""The store's commands beside servers that run: what they say of them, how they ask them, and one history of both."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nest_runtime.serve import ServeConfig
from nest_runtime.serve.running import Note, noted, running
from nest_runtime.store.store import Store
from tests.support.cli import Run, fails
from tests.support.serve import Running, serving, spawn, when_ready

pytest_plugins = ["tests.support.fixtures_serve", "tests.support.cli"]

NOTE = Note("http://127.0.0.1:1", None, os.getpid(), "tiny", "sha256:" + "a" * 64, True)


@pytest.fixture
def stored(config: ServeConfig, files: dict[str, str]) -> Iterator[Running]:
    """A server that follows the store, in which v1 was activated, then v2."""
    store = Store()
    for version in ("v1", "v2"):
        store.activate(store.add(files[version]).digest)
    with serving(replace(config, patch=None)) as server:
        yield server


@pytest.fixture
def token_file(config: ServeConfig) -> Path:
    assert config.admin_token_file is not None
    return config.admin_token_file


def active(server: Running) -> str:
    return server.http("GET", "/ready").json()["patch"]


def test_running_servers_are_found_and_dead_ones_forgotten(tmp_path: Path) -> None:
    assert running() == []
    with noted(NOTE):
        assert running() == [NOTE]
        assert running("sha256:" + "b" * 64) == []
    assert running() == []
    folder = tmp_path / "nest-home" / "servers"
    (folder / "1-1.json").write_text(json.dumps(vars(NOTE)))  # a killed server lets go of its lock
    assert running() == []
    assert list(folder.iterdir()) == []


def test_a_home_that_cannot_be_written_costs_the_note_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEST_HOME", "/proc/nowhere")
    with noted(NOTE):
        assert running() == []


def test_local_commands_say_which_server_goes_on(stored: Running, run: Run) -> None:
    done = run("activate", "test@v1", "--json")
    assert done.status == 0
    (row,) = done.document["servers"]
    assert (row["url"], row["patch"], row["admin_url"]) == (stored.url, "v2", stored.url)
    assert f"warning: the server at {stored.url}" in done.err
    assert "answers with v2" in done.err
    assert f"activate {done.document['name']}@v1 --url {stored.url} --token-file FILE" in done.err
    assert active(stored) == "v2"
    back = run("rollback")
    assert back.status == 0
    assert "warning" not in back.err  # store and server agree again
    listed = run("list")
    assert f"the server at {stored.url} answers with v2" in listed.err


def test_with_a_url_the_server_is_switched_and_its_store_with_it(
    stored: Running, run: Run, token_file: Path, files: dict[str, str]
) -> None:
    there = ("--url", stored.url, "--token-file", token_file)
    loaded = run("load", files["v3"], *there, "--json")
    assert loaded.document["label"] == "v3"
    assert active(stored) == "v2"
    switched = run("activate", "v3", *there, "--swap-policy", "enforce", "--json")
    assert (switched.document["active"], switched.document["previous"]) == ("v3", "v2")
    assert switched.document["policy"] == "enforce"
    assert active(stored) == "v3"
    back = run("rollback", *there)
    assert back.out.startswith(f"active on {stored.url}: v2 (sha256:")
    assert back.out.endswith(", was v3\n")
    listed = run("list", *there, "--json").document
    assert (listed["active"], listed["store"]["agrees"], listed["store"]["followed"]) == ("v2", True, True)
    assert "v3" in run("list", *there).out
    told = run("history", *there, "--verify", "--json").document
    assert [entry["what"] for entry in told["entries"]] == ["activate", "load", "activate", "rollback"]
    assert "rollback" in run("history", *there, "--last", "1").out


@pytest.mark.parametrize("content", [None, "no certificate\n"])
def test_certificates_that_cannot_be_read_are_named(
    run: Run, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    file = tmp_path / "own.crt"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    fails(run("list", "--url", "https://127.0.0.1:1", "--token-file", token_file), 2, f"SSL_CERT_FILE={file}")


def test_wrong_use_of_a_url_is_refused_before_anything_is_asked(run: Run, token_file: Path, tmp_path: Path) -> None:
    fails(run("list", "--url", "http://127.0.0.1:1"), 2, "--token-file")
    fails(run("list", "--token-file", token_file), 2, "--url")
    fails(run("rollback", "--swap-policy", "drain"), 2, "--url")
    fails(run("load", "v1"), 2, "--url", "nest-runtime add v1")
    fails(run("activate", "v1", "--why", "x", "--url", "http://127.0.0.1:1", "--token-file", token_file), 2, "--why")
    fails(run("list", "--url", "127.0.0.1:8000", "--token-file", token_file), 2, "http://HOST:PORT")
    fails(run("list", "--url", "http://127.0.0.1:1", "--token-file", token_file), 1, "cannot be reached")
    fails(run("list", "--url", "http://127.0.0.1:1", "--token-file", tmp_path / "none"), 2, "cannot be read")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    empty.chmod(0o600)
    fails(run("list", "--url", "http://127.0.0.1:1", "--token-file", empty), 2, "holds no token")


def test_refusals_of_the_server_are_told_as_what_they_are(
    stored: Running, run: Run, token_file: Path, config: ServeConfig, tmp_path: Path
) -> None:
    there = ("--url", stored.url, "--token-file", token_file)
    fails(run("activate", "v9", *there), 1, "v9")
    fails(run("activate", "v1", *there, "--swap-policy", "now"), 2, "policy")
    wrong = tmp_path / "wrong"
    wrong.write_text("guess\n")
    wrong.chmod(0o600)
    fails(run("list", "--url", stored.url, "--token-file", wrong), 2, "Incorrect admin token")
    with serving(replace(config, admin_token_file=None)) as closed:
        fails(run("list", "--url", closed.url, "--token-file", token_file), 1, "admin API is off")


def test_a_rollback_of_the_store_beside_the_server_skips_nothing(
    stored: Running, run: Run, token_file: Path, files: dict[str, str]
) -> None:
    """The server has v3 on, and the store was rolled back to v2: the server goes back to v2, not past it."""
    there = ("--url", stored.url, "--token-file", token_file)
    run("activate", files["v3"], *there)
    assert run("rollback").status == 0
    assert run("list", *there, "--json").document["store"]["agrees"] is False
    assert "its store names" in run("list", *there).err
    assert stored.admin("POST", "/v1/patches/rollback").json()["active"] == "v2"
    assert stored.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    assert run("list", *there, "--json").document["store"]["agrees"] is True
    fails(run("rollback", *there), 1, "v1 is the first patch that answers here")


def test_an_activation_in_the_store_beside_the_server_is_not_gone_back_to(
    stored: Running, run: Run, files: dict[str, str]
) -> None:
    """The server has v2 on, and v3 was activated in the store alone: nobody was ever answered under v3."""
    assert run("activate", files["v3"]).status == 0
    assert stored.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    entry = Store().active(stored.server.service.table.model_hash)
    assert entry is not None
    assert entry.version == "v1"
    assert run("activate", files["v3"]).status == 0
    refused = stored.admin("POST", "/v1/patches/rollback")
    assert refused.status_code == 409
    assert "which this server was not switched to" in refused.json()["error"]["message"]
    assert stored.admin("POST", "/v1/patches/activate", json={"patch": "v2"}).json()["previous"] == "v1"
    assert stored.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    assert Store().verify_history() > 0


def test_a_server_with_a_patch_of_its_own_says_that_the_store_is_another_matter(
    config: ServeConfig, run: Run, files: dict[str, str], token_file: Path
) -> None:
    with serving(config) as server:
        assert run("activate", files["v3"]).status == 0
        refused = server.admin("POST", "/v1/patches/rollback").json()["error"]["message"]
        assert "v1 is the first patch that answers here" in refused
        assert "started with --patch" in refused
        shown = run("list", "--url", server.url, "--token-file", token_file)
        assert "was started with --patch" in shown.err


def test_a_killed_server_is_not_warned_of(tmp_path: Path, tiny_llama: Path, files: dict[str, str], run: Run) -> None:
    home = tmp_path / "nest-home"
    popen = spawn(home, "--model", str(tiny_llama), "--patch", files["v1"])
    server = when_ready(popen, home)
    try:
        assert f"process {popen.pid}" in run("activate", files["v2"]).err
        assert server.url in run("list").err
    finally:
        os.kill(popen.pid, signal.SIGKILL)
        popen.communicate()
    assert "warning" not in run("activate", files["v3"]).err
