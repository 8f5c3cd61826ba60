"""Other people's pages in the visitor's browser: names that point here, other origins, no token."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from nest_runtime.addresses import is_loopback
from nest_runtime.demo.fence import Fence, Guests
from nest_runtime.errors import UsageError
from nest_runtime.serve.config import ServeConfig

KEY = "k" * 43


def ask(guests: Guests, path: str = "/", method: str = "GET", **headers: str) -> httpx.Response:
    """What a browser gets through the fence; the page behind it says yes to everything."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app=Fence(page, guests))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(work())


@pytest.mark.parametrize(
    "host",
    [
        "127.attacker.example",
        "127.0.0.1.nip.io",
        "127.0.0.1.nip.io:7860",
        "localhost.attacker.example",
        "127.0.0.1.",
        "0x7f000001.example",
        "[::1].example",
        "attacker.example:7860",
        "127.0.0.1@attacker.example",
        "10.0.0.1",
        "::bad::",
        "[",
        "",
    ],
)
def test_names_that_were_made_to_point_here(host: str) -> None:
    expected = 200 if host == "127.0.0.1." else 403  # which is the address
    for method in ("GET", "POST"):
        assert ask(Guests(), method=method, host=host).status_code == expected, host


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "127.8.9.1", "localhost", "LOCALHOST:7860", "[::1]:7860"])
def test_this_machine(host: str) -> None:
    assert ask(Guests(), host=host).status_code == 200


def test_addresses_are_compared_as_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.255.0.9", "::1", "localhost", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("127.attacker.example", "127.0.0.1.nip.io", "0.0.0.0", "::", "", "1270.0.0.1")))
    assert not ServeConfig(host="127.attacker.example").loopback


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://127.0.0.1:7860", "127.0.0.1:7860", 200),
        ("http://127.0.0.1:3000", "127.0.0.1:7860", 403),  # another program's page on this machine
        ("http://attacker.example", "127.0.0.1:7860", 403),
        ("null", "127.0.0.1:7860", 403),
        ("https://demo.example", "demo.example", 200),
        ("https://demo.example:8443", "demo.example", 200),  # nginx' $host leaves the port out
        ("https://attacker.example", "demo.example", 403),
    ],
)
def test_other_origins(origin: str, host: str, status: int) -> None:
    assert ask(Guests(trusted=("demo.example",)), method="POST", origin=origin, host=host).status_code == status


def test_only_listed_names_behind_a_proxy() -> None:
    for loopback in (True, False):
        guests = Guests(loopback, trusted=("Demo.example",))
        assert ask(guests, host="demo.EXAMPLE").status_code == 200
        assert ask(guests, host="other.example").status_code == 403
    assert ask(Guests(loopback=False, trusted=("demo.example",)), host="192.168.1.5:7860").status_code == 200


def test_the_token_of_the_link() -> None:
    """Without it nothing is answered; with it the browser gets a cookie, and the address loses the token."""
    for guests, root in ((Guests(key=KEY), ""), (Guests(key=KEY, root_path="/demo"), "/demo")):
        for path in ("/", "/gradio_api/call/activate", "/?token=", "/?token=wrong", "/?token=wrong&token="):
            answer = ask(guests, path)
            assert (answer.status_code, "printed" in answer.text) == (401, True)
            assert KEY not in answer.text
        assert ask(guests, f"/?token={KEY}", "POST").status_code == 401
        opened = ask(guests, f"/?token={KEY}&__theme=dark")
        assert (opened.status_code, opened.headers["location"]) == (303, f"{root}/?__theme=dark")
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert f"Path={root or '/'};" in cookie
        assert ask(guests, cookie=cookie.partition(";")[0]).text == "page"
        assert ask(guests, cookie="nest_demo=wrong").status_code == 401
        assert ask(guests, cookie="[bad").status_code == 401
        assert ask(guests, authorization=f"Bearer {KEY}").text == "page"
        assert ask(guests, f"//attacker.example/?token={KEY}").headers["location"].startswith(f"{root}/")
        assert not ask(guests, f"//attacker.example/?token={KEY}").headers["location"].startswith("//")


def test_the_page_behind_a_proxy_knows_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gradio documents it for nginx: the prefix is taken off, Host and X-Forwarded-* are the public name's."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from nest_runtime.demo import server
    from nest_runtime.demo.server import Listen, application

    def page(_: object) -> Any:
        import gradio

        with gradio.Blocks() as made:
            gradio.Markdown("hello")
        return made

    monkeypatch.setattr("nest_runtime.demo.app.build", page)
    listen = Listen(root_path="/demo", trusted=("demo.example",), key=KEY)
    client = TestClient(server.application(object(), listen), follow_redirects=False)  # type: ignore[arg-type]
    headers = {"host": "demo.example", "x-forwarded-host": "demo.example", "x-forwarded-proto": "https"}
    assert client.get("/", headers=headers).status_code == 401
    opened = client.get(f"/?token={KEY}", headers=headers)
    assert (opened.status_code, opened.headers["location"]) == (303, "/demo/")
    headers["authorization"] = f"Bearer {KEY}"
    config = client.get("/config", headers=headers)
    assert config.status_code == 200
    assert config.json()["root"] == "https://demo.example/demo"
    assert application is server.application
    with pytest.raises(UsageError, match="root path"):
        Listen(root_path="demo/")
