"""What the audit log says, whatever is asked and whatever the disk does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from nest_runtime.addresses import networks_of
from nest_runtime.errors import NestError, UsageError
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.app import Server, admin_app, asgi_app, build
from nest_runtime.serve.http.clients import client_of
from nest_runtime.serve.switching.audit import MAX_TEXT, AuditLog
from tests.support.patches import make_patch
from tests.support.patchfile import put_together, take_apart

TOKEN = {"authorization": "Bearer admin-secret"}
HERE = "http://127.0.0.1"
PAGE = 4096


@pytest.fixture(scope="module")
def patches(tiny_llama: Path) -> list[Patch]:
    loaded = load_model(tiny_llama)
    return [make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, base_hash=loaded.hash) for n in (1, 2, 3)]


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> ServeConfig:
    token = tmp_path / "token"
    token.write_text("admin-secret\n")
    token.chmod(0o600)
    return ServeConfig(
        model=str(tiny_llama),
        port=0,
        admin_token_file=token,
        audit_file=tmp_path / "audit.jsonl",
        limits=Limits(cache_tokens=512, batch_tokens=64),
    )


@pytest.fixture
def server(config: ServeConfig) -> Server:
    return build(config)


def lines(server: Server) -> list[dict[str, Any]]:
    return server.audit.tail(1000)


def scope(peer: str, *said: str) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in said]
    return {"type": "http", "client": (peer, 1), "headers": headers}


@pytest.mark.parametrize(
    ("peer", "said", "who"),
    [
        ("127.0.0.1", ("6.6.6.6",), "127.0.0.1"),  # nobody's word but the connection's
        ("10.0.0.9", ("6.6.6.6, 192.0.2.1",), "192.0.2.1 by proxy 10.0.0.9"),  # what the proxy wrote stands last
        ("10.0.0.9", ("6.6.6.6", "192.0.2.1, 10.0.0.7"), "192.0.2.1 by proxy 10.0.0.9"),  # over two proxies
        ("10.0.0.9", ("x" * 60_000,), "unknown by proxy 10.0.0.9"),
        ("10.0.0.9", ("\x1b]0;owned\x07",), "unknown by proxy 10.0.0.9"),
        ("10.0.0.9", (), "unknown by proxy 10.0.0.9"),
        ("2001:db8::1", ("6.6.6.6",), "2001:db8::1"),
    ],
)
def test_who_asks(peer: str, said: tuple[str, ...], who: str) -> None:
    assert client_of(scope(peer, *said), networks_of(("10.0.0.0/24",))) == who


def test_a_proxy_is_named_by_its_address() -> None:
    with pytest.raises(UsageError, match=r"trusted-proxy is 'proxy\.example'"):
        ServeConfig(trusted_proxies=("proxy.example",))


def test_denials_are_counted_by_sender_and_call_and_none_is_lost(server: Server) -> None:
    with TestClient(asgi_app(server), client=("127.0.0.1", 7), base_url=HERE) as client:
        for _ in range(3):
            assert client.get("/v1/patches").status_code == 401
            assert client.post("/v1/patches/activate", json={"version": "v1"}).status_code == 401
        for number in range(100):
            assert client.delete(f"/v1/patches/v{number}").status_code == 401
    counted = Counter()
    for entry in lines(server):
        if entry["what"] == "denied":
            counted[entry["path"]] += entry["count"]
    assert counted["GET /v1/patches"] == counted["POST /v1/patches/activate"] == 3
    assert counted.total() == 106
    assert len(counted) <= 34


def test_denials_are_bounded_and_say_who(server: Server) -> None:
    client = TestClient(asgi_app(server), client=("127.0.0.1", 7), base_url=HERE)
    path = "/v1/patches/" + "a%0a%1b" * 9000
    assert client.request("M" * 5000, path, headers={"x-forwarded-for": "6.6.6.6" * 9000}).status_code == 401
    entry = lines(server)[-1]
    assert (entry["what"], entry["who"]) == ("denied", "127.0.0.1")
    assert len(json.dumps(entry)) < 1000
    assert "\n" not in entry["path"]


def odd_site(patch: Patch, path: Path) -> str:
    """A patch file whose header names a site with half of a surrogate pair, and with a terminal's commands."""
    outer, header, area = take_apart(patch.save(path).read_bytes())
    text = json.dumps(header).replace("gate_proj", "gate_proj\\ud800\\u001b]0;x\\u0007")
    path.write_bytes(put_together(outer, text, area))
    return str(path)


def test_every_admin_call_leaves_a_line(server: Server, patches: list[Patch], tmp_path: Path) -> None:
    """Whatever is asked: homes of nobody, names that no file has, half characters, folders, devices."""
    client = TestClient(admin_app(server), raise_server_exceptions=False, base_url=HERE)
    (tmp_path / "shadow").write_bytes(b"root:$y$j9T$secret:19000:0:99999:7:::\n" * 40)
    asked = [
        "~nosuch/x",
        "~nosuch/x.safetensors",
        "a\0b/x.safetensors",
        "/" + "x" * 5000 + ".safetensors",
        "hf://\x1b[31m",
        "v9\u202e",
        odd_site(patches[0], tmp_path / "odd.safetensors"),
        str(tmp_path),
        "/dev/zero",
        str(tmp_path / "shadow"),
        "sha256:zz",
        "",
    ]
    for ref in asked:
        for path in ("/v1/patches", "/v1/patches/activate"):
            before = len(lines(server))
            answer = client.post(path, json={"patch": ref}, headers=TOKEN)
            new = lines(server)[before:]
            assert new, (path, ref)
            assert new[-1]["done"] is False, (path, ref)
            assert 400 <= answer.status_code < 500, (path, ref, answer.text)
            assert len(json.dumps(new)) < 8 * MAX_TEXT
            assert "\x1b" not in answer.text
            assert "secret" not in answer.text
            assert str(int.from_bytes(b"root:$y$", "little")) not in answer.text  # its first bytes as a number
    assert server.audit.verify() == len(lines(server))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB, for those who may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def filler(place: Path, pages: int) -> Path:
    """Leave so many pages of the disk free."""
    path = place / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * PAGE) == PAGE:
            pass
    os.truncate(path, max(0, path.stat().st_size // PAGE - pages) * PAGE)
    return path


@pytest.mark.parametrize("slack", range(0, PAGE, 1024))
@pytest.mark.parametrize("pages", range(4))
def test_a_disk_that_is_full_at_any_write(
    server: Server, patches: list[Patch], small_disk: Path, pages: int, slack: int
) -> None:
    """The log never says that something was done which was not; what was done has its intent at least."""
    table, audit = server.service.table, AuditLog(small_disk / "audit.jsonl")
    server.audit = table._changes._audit = audit
    files = [str(patch.save(small_disk.parent / f"{patch.version}.safetensors")) for patch in patches]

    async def go() -> None:
        await table.activate(files[0], "tester")
        while audit.path.stat().st_size % PAGE < PAGE - slack - 300:  # about so many bytes are left of the log's page
            audit.record({"what": "note", "who": "x" * 50})
        path = filler(small_disk, pages)
        on = table.active.label
        with contextlib.suppress(NestError):
            on = (await table.activate(files[1], "tester")).active.label
        assert table.active.label == on
        path.unlink()

    asyncio.run(go())
    done = [e for e in audit.tail(1000) if e["what"] == "activate" and e["done"]]
    intents = [e for e in audit.tail(1000) if e["what"] == "intent" and e["of"] == "activate"]
    assert {e["version"] for e in done} <= {"v1", table.active.label}
    assert table.active.label in {e["version"] for e in intents}
    assert audit.verify() > 0


def test_an_outcome_names_its_intent(server: Server, patches: list[Patch], tmp_path: Path) -> None:
    table = server.service.table
    asyncio.run(table.activate(str(patches[0].save(tmp_path / "v1.safetensors")), "tester"))
    intent, outcome = lines(server)[-2:]
    assert (intent["what"], intent["of"], intent["done"]) == ("intent", "activate", False)
    assert (outcome["what"], outcome["done"], outcome["intent"]) == ("activate", True, intent["seq"])
    assert server.audit.unfinished() == []
    server.audit.intend({"what": "activate", "who": "tester"})
    assert [entry["of"] for entry in server.audit.unfinished()] == ["activate"]
