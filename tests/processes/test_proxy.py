"""The demo behind a real nginx, with the very block that docs/guide/demo.md gives: under a path, by another name."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
NAME = "demo.example.org"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light"),
]
CONFIG = """
pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    {block}
  }}
}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Where nginx listens, and the demo's admin token."""
    folder = tmp_path_factory.mktemp("nginx")
    words = ["demo", "--admin", "--port", "0", "--json", "--root-path", "/demo", "--trusted-host", NAME]
    environment = {**os.environ, "NEST_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log, socket.socket() as free:
        process = subprocess.Popen(
            [sys.executable, "-m", "nest_runtime", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            assert process.stdout is not None
            event = json.loads(process.stdout.readline())
            block = re.search(
                r"( *location /demo/ \{.*?\n *\})", (ROOT / "docs" / "guide" / "demo.md").read_text(), re.S
            )
            assert block is not None
            text = block[1].replace("http://127.0.0.1:7860", event["url"])
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port, block=text))
            command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
            proxy = subprocess.Popen(command, stderr=log)
            try:
                _wait(port)
                yield f"http://127.0.0.1:{port}", event["link"].partition("token=")[2]
            finally:
                proxy.terminate()
                proxy.wait(20)
        finally:
            process.kill()
            process.communicate()


def _wait(port: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nginx does not answer")


@pytest.fixture
def browser(place: tuple[str, str]) -> Iterator[httpx.Client]:
    """Who comes by the link, as a browser that knows nginx by the demo's name."""
    url, token = place
    with httpx.Client(base_url=url, headers={"host": NAME}, timeout=60) as client:
        door = client.get("/demo/", params={"token": token})
        assert (door.status_code, door.headers["location"]) == (303, "/demo/")
        cookie = door.headers["set-cookie"]
        assert "Path=/demo" in cookie
        client.headers["cookie"] = cookie.partition(";")[0]
        yield client


def test_the_page_and_all_that_it_loads_come_through(browser: httpx.Client) -> None:
    page = browser.get("/demo/")
    assert page.status_code == 200
    config = browser.get("/demo/config").json()
    assert config["root"] == f"http://{NAME}/demo"
    loaded = set(re.findall(r'(?:src|href)="(?:\./|/demo/)([^"?#]+\.(?:js|css))', page.text))
    assert loaded
    for path in loaded:
        assert browser.get(f"/demo/{path}").status_code == 200, path
    outside = [url for url in re.findall(r'(?:src|href)="(/[^"]*)"', page.text) if not url.startswith("/demo")]
    assert [url for url in outside if url.endswith((".js", ".css"))] == []


def test_an_event_runs_through_the_proxy(browser: httpx.Client) -> None:
    """What a click sends, and the stream of answers behind it."""
    config = browser.get("/demo/config").json()
    number = next(row["id"] for row in config["dependencies"] if row["backend_fn"] and not row["inputs"])
    body = {"fn_index": number, "data": [], "session_hash": "abc"}
    origin = {"origin": f"http://{NAME}"}
    joined = browser.post(f"/demo{config['api_prefix']}/queue/join", json=body, headers=origin)
    assert joined.status_code == 200, joined.text
    said = ""
    path = f"/demo{config['api_prefix']}/queue/data"
    with browser.stream("GET", path, params={"session_hash": "abc"}) as stream:
        for line in stream.iter_lines():
            said += line
            if "process_completed" in line or "close_stream" in line:
                break
    assert "process_completed" in said


def test_others_stay_outside_behind_the_proxy_too(place: tuple[str, str], browser: httpx.Client) -> None:
    url, token = place
    with httpx.Client(base_url=url, timeout=60) as other:
        assert other.get("/demo/config", headers={"host": NAME}).status_code == 401
        for name in ("127.0.0.1.nip.io", "attacker.example", f"{NAME}.attacker.example"):
            assert other.get("/demo/", params={"token": token}, headers={"host": name}).status_code == 403, name
        # What the client says of itself reaches nobody: nginx writes these headers anew.
        spoofed = {"host": "attacker.example", "x-forwarded-host": NAME}
        assert other.get("/demo/", params={"token": token}, headers=spoofed).status_code == 403
    foreign = {"origin": "http://attacker.example"}
    body = {"fn_index": 0, "data": [], "session_hash": "x"}
    config = browser.get("/demo/config").json()
    assert browser.post(f"/demo{config['api_prefix']}/queue/join", json=body, headers=foreign).status_code == 403
