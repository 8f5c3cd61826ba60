"""Operators: the admin API's own listener, tokens, the audit of every call, reloading, and what never waits."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from nest_runtime.cli.main import main
from nest_runtime.errors import EngineError, NestError, UsageError
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve import ServeConfig, serve
from nest_runtime.serve.app import build
from nest_runtime.serve.limits import FollowConfig
from nest_runtime.serve.ports import bind, bind_admin
from nest_runtime.serve.server import run
from nest_runtime.serve.tokens import read_tokens
from nest_runtime.store.store import Store
from nest_runtime.trust.check import sign_patch
from nest_runtime.trust.keys import generate_keys
from tests.support.serve import PROMPTS, Reference, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": PROMPTS[3]}]


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


def audit(server: Running) -> list[dict[str, Any]]:
    return server.server.audit.tail(1000)


@pytest.fixture
def apart(config: ServeConfig) -> Iterator[Running]:
    """A server whose admin API has a listener of its own."""
    with serving(replace(config, admin_port=0)) as running:
        yield running


def test_the_admin_api_can_listen_elsewhere(apart: Running, files: dict[str, str]) -> None:
    assert apart.admin_url.startswith("http://127.0.0.1:")
    assert apart.admin_url != apart.url
    assert apart.admin("GET", "/v1/patches").json()["active"] == "v1"
    assert apart.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]}).json()["active"] == "v2"
    token = {"authorization": f"Bearer {apart.admin_token}"}
    for method, path in (("GET", "/v1/patches"), ("POST", "/v1/patches/rollback"), ("GET", "/v1/audit")):
        lost = apart.http(method, path, headers=token)  # to clients these paths do not exist, token or not
        assert (lost.status_code, lost.json()["error"]["type"]) == (404, "not_found_error")
        assert httpx.request(method, f"{apart.admin_url}{path}").status_code == 401
    asked = httpx.post(f"{apart.admin_url}/v1/chat/completions", json={"model": apart.name, "messages": USER})
    assert asked.status_code == 404
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{apart.admin_url}{path}").status_code == 200
    assert apart.http("GET", "/ready").headers["x-nest-patch"] == "v2"
    public = apart.http("GET", "/openapi.json").json()["paths"]
    assert not [path for path in public if path.startswith(("/v1/patches", "/v1/audit"))]


def test_the_admin_listener_stays_while_clients_are_drained(apart: Running, slow_engine: None) -> None:
    with ThreadPoolExecutor(1) as pool:
        create = apart.client().chat.completions.create
        answer = pool.submit(create, model=apart.name, messages=USER, max_tokens=100)
        assert eventually(lambda: apart.server.service.engine.live == 1)
        apart.stop.set()
        assert eventually(lambda: httpx.get(f"{apart.admin_url}/ready").json()["status"] == "draining")
        assert apart.admin("GET", "/v1/patches").json()["patches"][0]["in_flight"] == 1
        assert answer.result().choices[0].finish_reason == "length"


def test_a_taken_admin_port_is_said_before_anything_is_loaded(config: ServeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        clash = replace(config, model="/no/such/model", admin_port=number)
        with pytest.raises(EngineError, match=f"port {number} on 127.0.0.1 is in use"):
            serve(clash, on_event=lambda event: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": "nothing"}, "there is no patch 'nothing'"),
        ({"patch": "/no/such/patch.safetensors"}, "there is no patch file"),
        ({"expose": ("v1", "nothing")}, "there is no patch 'nothing'"),
        ({"follow": FollowConfig("nothing")}, "'nothing' names no repository"),
        ({"trust": (Path("/no/such/key.pub"),)}, "key.pub cannot be read"),
    ],
)
def test_what_is_named_and_not_there_is_said_before_a_model_is_loaded(
    config: ServeConfig, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(NestError, match=message):
        serve(replace(config, **{"model": "/no/such/model", "port": 0, "patch": None, **fields}), on_event=print)


def test_an_admin_port_taken_while_the_model_loads(config: ServeConfig) -> None:
    """Two sockets may be bound to a port before either listens."""
    with bind(replace(config, port=0)) as first:
        number = first.getsockname()[1]
        clash = replace(config, admin_port=number)
        with bind_admin(clash) as second, closing(bind(config)) as port:
            first.listen()
            with pytest.raises(EngineError, match=f"port {number} on 127.0.0.1 is in use"):
                asyncio.run(run(build(clash), port, lambda event: None, threading.Event(), second))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"admin_host": "127.0.0.1"}, "without --admin-port"),
        ({"admin_port": 70000}, "--admin-port is 70000; expected 0 to 65535"),
        ({"admin_port": 0, "admin_token_file": None}, "no --admin-token-file"),
        ({"port": 8143, "admin_port": 8143}, "--port and --admin-port are both 8143"),
    ],
)
def test_admin_options_that_make_no_sense(config: ServeConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(config, **fields)


def test_token_files_that_others_see_are_refused(config: ServeConfig) -> None:
    path = config.admin_token_file
    assert path is not None
    path.chmod(0o644)
    with pytest.raises(UsageError, match=r"can be read by others \(mode 644\)"), serving(config):
        pass
    assert read_tokens(path, "API key file").matches("admin-secret")  # those open less: a warning is enough
    path.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others"):
        read_tokens(path, "admin token file", secret=True)
    path.chmod(0o660)
    with pytest.raises(UsageError, match="can be written by others"):
        read_tokens(path, "admin token file", secret=True)


def outcomes(server: Running) -> list[dict[str, Any]]:
    """The audit log without the intents that stand before changes."""
    return [entry for entry in audit(server) if entry["what"] != "intent"]


def test_every_admin_call_is_in_the_audit(server: Running, files: dict[str, str]) -> None:
    calls: list[tuple[str, str, Any, str, bool]] = [
        ("GET", "/v1/patches", None, "call", True),
        ("GET", "/v1/audit?limit=1", None, "call", True),
        ("POST", "/v1/patches", {"patch": files["v2"]}, "load", True),
        ("POST", "/v1/patches", {"patch": "v99"}, "load", False),
        ("POST", "/v1/patches", {"ptach": "v2"}, "call", False),
        ("POST", "/v1/patches/activate", {"patch": "v2"}, "activate", True),
        ("POST", "/v1/patches/activate", {"patch": "v1", "policy": "soon"}, "call", False),
        ("POST", "/v1/patches/rollback", None, "rollback", True),
        ("POST", "/v1/patches/rollback", None, "rollback", False),
        ("DELETE", "/v1/patches/v2", None, "remove", True),
        ("PUT", "/v1/patches/v2", None, "call", False),
    ]
    before = len(outcomes(server))
    for number, (method, path, body, what, done) in enumerate(calls, start=1):
        server.admin(method, path, json=body)
        entries = outcomes(server)
        assert len(entries) == before + number, (method, path)
        assert (entries[-1]["what"], entries[-1]["done"]) == (what, done), (method, path)
        assert entries[-1]["who"].startswith("admin ")
    reads = [entry for entry in audit(server) if entry["what"] == "call"]
    assert [(e["path"], e["status"]) for e in reads] == [
        ("GET /v1/patches", 200),
        ("GET /v1/audit", 200),
        ("POST /v1/patches", 400),
        ("POST /v1/patches/activate", 400),
        ("PUT /v1/patches/v2", 405),
    ]
    server.client().models.list()
    assert len(outcomes(server)) == before + len(calls)  # what clients do is no admin call
    assert server.server.audit.unfinished() == []


def test_a_change_that_fails_after_it_was_written_down_says_so(
    config: ServeConfig, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    store = Store()
    store.activate(store.add(files["v1"]).digest)
    store.add(files["v2"])
    with serving(replace(config, patch=None)) as server:

        def full(*arguments: Any, **more: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Store, "_commit", full)
        refused = server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]})
        assert refused.status_code == 409
        assert "No space left" in refused.json()["error"]["message"]
        assert server.http("GET", "/ready").json()["patch"] == "v1"
        meant, failed = audit(server)[-2:]
        assert (meant["what"], meant["of"], meant["version"]) == ("intent", "activate", "v2")
        assert (failed["what"], failed["done"], failed["intent"]) == ("activate", False, meant["seq"])
        monkeypatch.undo()
        active = Store(store.root.parent).active(load_model(tiny_llama).hash)
        assert active is not None
        assert active.version == "v1"


def test_a_rollback_that_cannot_be_audited_changes_neither_server_nor_store(
    config: ServeConfig, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    store = Store()
    for version in ("v1", "v2"):
        store.activate(store.add(files[version]).digest)
    with serving(replace(config, patch=None)) as server:

        def full(*arguments: Any, **more: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patcher:
            patcher.setattr("nest_runtime.store.history.ChainLog.append", full)
            assert server.admin("POST", "/v1/patches/rollback").status_code == 409
        assert server.http("GET", "/ready").json()["patch"] == "v2"
        active = store.active(load_model(tiny_llama).hash)
        assert active is not None
        assert active.version == "v2"
        assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"


class Slow:
    """Makes a step of loading take a second, in whatever thread it runs."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.during: list[tuple[float, float]] = []

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        began = time.monotonic()
        time.sleep(1)
        try:
            return self.inner(*arguments, **more)
        finally:
            self.during.append((began, time.monotonic()))


def test_loading_and_verifying_never_hold_up_answers(
    server: Running, slow_engine: None, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    """A stream's tokens go on coming while a patch is read, while it is checked against the model, and is put on."""
    steps = {
        "nest_runtime.serve.switching.loading.load_patch": Slow(
            __import__("nest_runtime.resolve", fromlist=["x"]).load_patch
        ),
        "nest_runtime.runtime.checks.check_base": Slow(
            __import__("nest_runtime.runtime.checks", fromlist=["x"]).check_base
        ),
    }
    for name, slow in steps.items():
        monkeypatch.setattr(name, slow)
    body = {"model": server.name, "messages": USER, "max_tokens": 400, "stream": True}
    came: list[float] = []
    with (
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response,
        ThreadPoolExecutor(1) as pool,
    ):
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        switch = pool.submit(server.admin, "POST", "/v1/patches/activate", json={"patch": files["v2"]})
        text = ""
        for line in lines:
            came.append(time.monotonic())
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        assert switch.result().status_code == 200
    assert text == reference.chat(PROMPTS[3], "v1", 400)
    for name, slow in steps.items():
        (began, ended), *_ = slow.during
        within = [began, *(at for at in came if began < at < ended), ended]
        assert max(b - a for a, b in itertools.pairwise(within)) < 0.4, name


def test_a_runtime_that_is_busy_does_not_hold_up_a_change_of_mixture(
    config: ServeConfig, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    """While a patch is checked, the runtime is locked: a batch that would be unfolded goes on as it is."""
    with serving(replace(config, expose_base=True)) as server:
        engine = server.server.service.engine
        create = server.client().chat.completions.create
        create(model=server.name, messages=USER, max_tokens=150)
        assert engine.folded
        locked, release = threading.Event(), threading.Event()
        inner = PatchRuntime._check_base

        def held(self: PatchRuntime, *arguments: Any) -> Any:
            locked.set()
            assert release.wait(30)
            return inner(self, *arguments)

        monkeypatch.setattr(PatchRuntime, "_check_base", held)
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(server.admin, "POST", "/v1/patches", json={"patch": files["v2"]})
            assert locked.wait(10)
            answer = create(model=f"{server.name}@base", messages=USER, max_tokens=20)
            assert answer.choices[0].message.content == reference.chat(PROMPTS[3], None, 20)
            assert not load.done()
            release.set()
            assert load.result().status_code == 200


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


def test_reloading_takes_the_new_trust_policy(
    config: ServeConfig, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is taken out of the policy: what it signed is refused from the reload on, and the operator is told."""
    old, new = (generate_keys(tmp_path / "keys", name)[0] for name in ("old", "new"))
    for version, key in (("v1", old), ("v2", old), ("v3", new)):
        sign_patch(files[version], key)
    policy = tmp_path / "trust.toml"

    def trust(*keys: Path) -> None:
        named = [f'[[keys]]\nname = "{key.stem}"\nfile = "{key.with_suffix(".pub")}"\nnames = ["*"]\n' for key in keys]
        policy.write_text("format = 1\n" + "".join(named))

    trust(old)
    with serving(replace(config, trust_policy=policy)) as server:
        assert server.admin("POST", "/v1/patches", json={"patch": files["v3"]}).status_code == 403
        trust(new)
        assert server.admin("POST", "/v1/patches", json={"patch": files["v3"]}).status_code == 403
        news = server.await_(server.server.reread)
        assert len(news) == 1
        assert "v1, which is loaded, is not trusted any more" in news[0]
        assert audit(server)[-1]["what"] == "reload"
        assert server.admin("POST", "/v1/patches", json={"patch": files["v2"]}).status_code == 403
        assert server.admin("POST", "/v1/patches/activate", json={"patch": files["v3"]}).json()["active"] == "v3"
        assert server.admin("POST", "/v1/patches/rollback").status_code == 403
        policy.unlink()
        with pytest.raises(UsageError):
            server.await_(server.server.reread)
        assert server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]}).status_code == 403


def test_bad_files_at_a_reload_leave_the_old_ones_in_force(config: ServeConfig, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    keys.chmod(0o600)
    with serving(replace(config, api_key_file=keys)) as server:
        keys.write_text("")
        assert config.admin_token_file is not None
        config.admin_token_file.write_text("other\n")
        with pytest.raises(UsageError, match="holds no token"):
            server.await_(server.server.reread)
        assert server.admin("GET", "/v1/patches").status_code == 200
        keys.write_text("two\n")
        server.await_(server.server.reread)
        assert server.client(api_key="two").models.list().data
        assert server.admin("GET", "/v1/patches").status_code == 401
        server.admin_token = "other"
        assert server.admin("GET", "/v1/patches").status_code == 200


def verify(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any], str]:
    status = main(["history", "--verify", "--json", *options])
    out, err = capsys.readouterr()
    return status, json.loads(out or "{}"), err


def test_history_verify_finds_an_edited_or_missing_line_of_the_audit(
    config: ServeConfig, files: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usual = replace(config, audit_file=None)
    assert verify(capsys)[:2] == (0, {"entries": [], "verified": 0, "audit": None})
    with serving(usual) as server:
        for version in ("v2", "v3"):
            server.admin("POST", "/v1/patches/activate", json={"patch": files[version]})
        path = server.server.audit.path
        status, found, _ = verify(capsys)  # while the server runs
        assert (status, found["audit"]) == (0, {"path": str(path), "entries": 6, "unfinished": 0})
    assert main(["history", "--verify"]) == 0
    assert "the audit log is whole: 6 entries" in capsys.readouterr().out
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for damage, message in (
        (whole.replace('"v2"', '"v9"'), "line 3 was edited"),
        ("".join([lines[0], lines[2]]), "line 2 has number 3 where 2 was expected"),
        ("".join(lines[:2]), "lines 3 to 6 are missing"),
        ("", "lines 1 to 6 are missing"),
    ):
        path.write_text(damage)
        status, found, err = verify(capsys)
        assert (status, found) == (1, {}), message
        assert message in err
    path.unlink()
    assert "lines 1 to 6 are missing" in verify(capsys)[2]
    path.write_text(whole)
    assert verify(capsys)[0] == 0
    elsewhere = tmp_path / "elsewhere.jsonl"
    status, _, err = verify(capsys, "--audit-file", str(elsewhere))
    assert status == 1
    assert "there is no audit log" in err


def test_an_append_reads_only_the_end_of_a_long_log(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    log = server.server.audit
    log.record({"what": "note"})
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read whole"))
    log.record({"what": "note"})


def test_a_patch_whose_file_vanishes(server: Running, files: dict[str, str]) -> None:
    """Loaded patches are in memory; what is gone from the disk cannot be loaded, and changes nothing."""
    assert server.admin("POST", "/v1/patches", json={"patch": files["v2"]}).status_code == 200
    for version in ("v1", "v2", "v3"):
        Path(files[version]).unlink()
    assert server.admin("POST", "/v1/patches/activate", json={"patch": files["v3"]}).status_code == 404
    assert server.admin("POST", "/v1/patches/activate", json={"patch": "v2"}).json()["active"] == "v2"
    assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"


def test_a_store_that_lost_a_patch_refuses_to_go_back_to_it(
    config: ServeConfig, files: dict[str, str], patches: list[Patch], tiny_llama: Path
) -> None:
    store = Store()
    for version in ("v1", "v2"):
        store.activate(store.add(files[version]).digest)
    with serving(replace(config, patch=None)) as server:
        digits = patches[0].digest.partition(":")[2]
        (store.root / "objects" / "sha256" / digits[:2] / f"{digits}.safetensors").unlink()
        gone = server.admin("POST", "/v1/patches/rollback")
        assert gone.status_code == 409
        assert "gone" in gone.json()["error"]["message"]
        assert server.http("GET", "/ready").json()["patch"] == "v2"
        active = store.active(load_model(tiny_llama).hash)
        assert active is not None
        assert active.version == "v2"
