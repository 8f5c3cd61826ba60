"""A real server on a free port, in a thread of the test process, and the official client for it.

Fixtures that use it are in tests/support/fixtures_serve.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.examples import encode
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.app import Server, build
from nest_runtime.serve.ports import bind, bind_admin
from nest_runtime.serve.server import run

PROMPTS = [
    "How do I bake bread?",
    "What is the capital of the country north of here, and why?",
    "Mix",
    "Tell me, in as many words as you like, how flour and water become a loaf.",
    "I cannot help with that. Or can I?",
    "One two three four five six seven eight nine ten.",
]


TOKEN = "admin-secret"
READY_SECONDS = 240.0  # a process needs 6 s on a quiet machine; test machines are not

# Every engine that ends collects garbage twice, through all that was ever imported: half a second each time.
gc.collect()
gc.freeze()

# One for all: a client of its own for every request would read the system's certificates every time.
_HTTP = httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass
class Running:
    """A server that answers."""

    url: str
    name: str
    server: Server
    events: list[dict[str, Any]]
    stop: threading.Event
    thread: threading.Thread
    admin_token: str = TOKEN
    admin_url: str = ""
    _clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, **settings: Any) -> openai.OpenAI:
        """The official client, without retries."""
        plain = openai.DefaultHttpxClient(verify=False)
        settings = {"api_key": "any", "max_retries": 0, "timeout": 60, "http_client": plain, **settings}
        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **settings))
        return self._clients[-1]

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One plain HTTP request."""
        return _HTTP.request(method, f"{self.url}{path}", **arguments)

    def admin(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One request with the admin token."""
        headers = {"authorization": f"Bearer {self.admin_token}"}
        return _HTTP.request(method, f"{self.admin_url or self.url}{path}", headers=headers, **arguments)

    def on_loop(self, call: Callable[[], Any]) -> Any:
        """What ``call`` gives on the server's event loop."""
        done: dict[str, Any] = {}
        finished = threading.Event()

        def there() -> None:
            done["value"] = call()
            finished.set()

        assert self.server.service.engine._loop is not None
        self.server.service.engine._loop.call_soon_threadsafe(there)
        assert finished.wait(10)
        return done["value"]

    def await_(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """What a coroutine of the server gives, run on its event loop."""
        loop = self.server.service.engine._loop
        assert loop is not None

        async def run_it() -> Any:
            return await call()

        return asyncio.run_coroutine_threadsafe(run_it(), loop).result(60)


@contextmanager
def serving(config: ServeConfig, admin_token: str = TOKEN) -> Iterator[Running]:
    """Run a server until the context ends; it must drain and end by itself."""
    server, port, stop, ready = build(config), bind(config), threading.Event(), threading.Event()
    events: list[dict[str, Any]] = []
    failures: list[BaseException] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "ready":
            ready.set()

    def work() -> None:
        try:
            with closing(port), bind_admin(config) as admin_port:
                asyncio.run(run(server, port, emit, stop, admin_port))
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=work, name="server")
    thread.start()
    assert ready.wait(60)
    if failures:
        thread.join()
        raise failures[0]
    ready_event = next(event for event in events if event["event"] == "ready")
    admin_url = ready_event.get("admin_url", "")
    running = Running(ready_event["url"], ready_event["model"], server, events, stop, thread, admin_token, admin_url)
    try:
        yield running
    finally:
        stop.set()
        for client in running._clients:
            client.close()
        thread.join(90)
        assert not thread.is_alive()
        assert not failures, failures


class Reference:
    """What ``model.generate`` answers, greedily and alone, under each patch: the truth the server is held to."""

    def __init__(self, folder: Path, patches: list[Patch]) -> None:
        self._known: dict[tuple[tuple[int, ...], str | None, int], list[int]] = {}
        self.loaded = load_model(folder)
        self.runtime = PatchRuntime(self.loaded.model, base_hash=self.loaded.hash)
        for patch in patches:
            self.runtime.add(patch)

    def tokens(self, ids: list[int], version: str | None, count: int) -> list[int]:
        """New token ids, the end of sequence included; worked out once."""
        key = (tuple(ids), version, count)
        if key not in self._known:
            self._known[key] = self._generate(ids, version, count)
        return self._known[key]

    def _generate(self, ids: list[int], version: str | None, count: int) -> list[int]:
        with self.runtime.using(version), torch.inference_mode():
            rows = self.loaded.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=count
            )
        return rows[0, len(ids) :].tolist()

    def chat(self, prompt: str, version: str | None, count: int) -> str:
        """The answer's text."""
        ids = encode(self.loaded.tokenizer, [{"role": "user", "content": prompt}])
        return self.loaded.tokenizer.decode(self.tokens(ids, version, count), skip_special_tokens=True)


def eventually(check: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether ``check`` becomes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.02)
    return False


@dataclass
class Process:
    """A server as a process of its own, started by the command; its log goes to ``log``."""

    popen: subprocess.Popen[str]
    url: str
    name: str
    log: Path

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One plain HTTP request."""
        return _HTTP.request(method, f"{self.url}{path}", **arguments)

    def admin(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One request with the admin token."""
        return self.http(method, path, headers={"authorization": f"Bearer {TOKEN}"}, **arguments)


def spawn(home: Path, *options: str) -> subprocess.Popen[str]:
    """Start ``nest-runtime serve`` with an admin token on a free port; it may not be ready yet."""
    home.mkdir(parents=True, exist_ok=True)
    token = home / "admin-token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    command = [sys.executable, "-m", "nest_runtime.cli.main", "serve", "--json", "--port", "0"]
    with (home / "serve.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--admin-token-file", str(token), "--allow-completions", "--allow-special-tokens", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "NEST_HOME": str(home), "OMP_NUM_THREADS": "1"},
        )


def when_ready(popen: subprocess.Popen[str], home: Path) -> Process:
    """Wait for a spawned server to say that it is ready; one that does not in time is killed."""
    event = next_event(popen)
    if event.get("event") != "ready":
        raise AssertionError(f"{event}: {(home / 'serve.log').read_text()[-3000:]}")
    return Process(popen, event["url"], event["model"], home / "serve.log")


def next_event(popen: subprocess.Popen[str], seconds: float = READY_SECONDS) -> dict[str, Any]:
    """The next event of a server process, or nothing where it ended; a silent one is killed when the time is over."""
    assert popen.stdout is not None
    guard = threading.Timer(seconds, popen.kill)
    guard.start()
    try:
        line = popen.stdout.readline()
    finally:
        guard.cancel()
    return json.loads(line) if line else {}


@contextmanager
def process(home: Path, *options: str) -> Iterator[Process]:
    """A server process until the context ends; then it must end with status 0."""
    popen = spawn(home, *options)
    try:
        yield when_ready(popen, home)
        popen.terminate()
        popen.communicate(timeout=60)
        assert popen.returncode == 0
    finally:
        popen.kill()
        popen.communicate()
