"""What one server takes on: sizes, lengths, times, numbers; and what a client is told beyond them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nest_runtime.cli.main import main
from nest_runtime.errors import UsageError
from nest_runtime.serve import Allowed, Limits, ServeConfig
from nest_runtime.serve.requests.sampling import choose_tokens
from tests.support.serve import PROMPTS, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": PROMPTS[0]}]


LIMITS = Limits(
    running=4,
    cache_tokens=2048,
    batch_tokens=64,
    max_prompt_tokens=60,
    max_tokens=150,
    max_choices=6,
    max_body_bytes=10_000,
    drain_seconds=5,
)


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(replace(config, limits=LIMITS, max_queue=4)) as running:
        yield running


@pytest.fixture
def hasty(config: ServeConfig) -> Iterator[Running]:
    """A server that gives no request more than a second."""
    with serving(replace(config, limits=replace(LIMITS, request_seconds=1.0), max_queue=4)) as running:
        yield running


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"prompt": [5] * 61}, "prompt", "context_length_exceeded", "61 tokens; this server takes at most 60"),
        ({"prompt": [5], "max_tokens": 151}, "max_tokens", "invalid_value", "at most 150"),
        ({"prompt": [5], "n": 7, "temperature": 1}, "n", "invalid_value", "at most 6"),
        ({"prompt": ["a", "b"], "n": 4, "temperature": 1}, "n", "invalid_value", "2 prompts times n = 4"),
    ],
)
def test_what_is_too_much_is_refused_by_name(
    server: Running, fields: dict[str, Any], param: str, code: str, message: str
) -> None:
    response = server.http("POST", "/v1/completions", json={"model": server.name, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert message in error["message"]


def test_an_answer_that_nobody_bounded_ends_at_the_servers_limit(server: Running) -> None:
    answer = server.client().chat.completions.create(model=server.name, messages=USER)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 150


def test_a_request_that_takes_too_long_is_ended(hasty: Running, slow_engine: None) -> None:
    body = {"model": hasty.name, "messages": USER, "max_tokens": 150}
    late = hasty.http("POST", "/v1/chat/completions", json=body)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert late.json()["error"]["message"] == "the answer took over 1 s"
    with httpx.stream(
        "POST", f"{hasty.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as response:
        assert response.status_code == 200
        events = [line for line in response.iter_lines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert eventually(lambda: hasty.server.service.engine.jobs == 0)


def test_time_in_the_queue_counts(hasty: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that never got its turn has sent nothing: it gets a status, not an event."""

    def very_slowly(*arguments: Any) -> Any:
        time.sleep(0.4)
        return choose_tokens(*arguments)

    monkeypatch.setattr("nest_runtime.serve.transformers.continuous.choose_tokens", very_slowly)
    body = {"model": hasty.name, "prompt": [5, 6], "max_tokens": 150}
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(hasty.http, "POST", "/v1/completions", json=body) for _ in range(4)]
        assert eventually(lambda: hasty.server.service.engine.live == 4)
        late = hasty.http("POST", "/v1/completions", json={**body, "stream": True})
        assert [one.result().status_code for one in busy] == [504] * 4
    assert (late.status_code, late.headers["content-type"]) == (504, "application/json")


def test_more_than_run_and_wait_get_429_at_once(server: Running, slow_engine: None) -> None:
    def ask(_: int) -> int:
        began = time.monotonic()
        try:
            server.client().completions.create(model=server.name, prompt=[5, 6], max_tokens=40)
        except openai.RateLimitError as error:
            return 429 if int(error.response.headers["retry-after"]) >= 1 and time.monotonic() - began < 5 else 0
        return 200

    with ThreadPoolExecutor(12) as pool:
        found = sorted(pool.map(ask, range(12)))
    assert found == [200] * 8 + [429] * 4
    assert ask(0) == 200


def raw(server: Running, *parts: bytes) -> bytes:
    """What a connection brings back for bytes sent piece by piece."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while not answer.endswith((b"}}", b"request received.")) and (more := connection.recv(65536)):
            answer += more
        return answer


def test_a_body_that_never_ends_does_not_hold_a_connection_forever(hasty: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    head += b"content-type: application/json\r\ncontent-length: 100\r\n\r\n"
    began = time.monotonic()
    answer = raw(hasty, head, b'{"model": ')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"The body did not come in 1 s." in answer
    assert time.monotonic() - began < 5


def test_a_body_that_lies_about_its_size(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -5\r\n\r\n"
    assert raw(server, head).split(b" ")[1] in (b"400", b"413")
    large = server.http("POST", "/v1/completions", content=b"x" * 10_001)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


def test_many_connections_at_once_are_all_answered(server: Running) -> None:
    """Far more clients than fit: each gets an answer or a 429 that says when to come back; nothing hangs."""
    barrier = threading.Barrier(40)

    def ask(_: int) -> int:
        barrier.wait()
        body = {"model": server.name, "prompt": [5, 6], "max_tokens": 2}
        return server.http("POST", "/v1/completions", json=body).status_code

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(40)))
    assert set(found) <= {200, 429}
    assert found.count(200) >= 8
    assert eventually(lambda: server.server.service.engine.live == 0)


FLAGS = ("--log-prompts", "--allow-completions", "--allow-prefill", "--allow-special-tokens")


def test_the_command_line_sets_every_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[ServeConfig] = []
    monkeypatch.setattr("nest_runtime.serve.server.serve", lambda config, on_event=None: made.append(config))
    options = {
        "--host": "0.0.0.0",
        "--port": "0",
        "--admin-token-file": str(tmp_path / "token"),
        "--admin-host": "127.0.0.2",
        "--admin-port": "8001",
        "--api-key-file": str(tmp_path / "keys"),
        "--swap-policy": "enforce",
        "--max-running": "3",
        "--max-queue": "4",
        "--max-body": "5",
        "--max-prompt-tokens": "6",
        "--max-tokens": "7",
        "--max-choices": "8",
        "--request-timeout": "9",
        "--drain-timeout": "10",
        "--cache-tokens": "64",
        "--batch-tokens": "11",
        "--audit-file": str(tmp_path / "audit.jsonl"),
    }
    assert main(["serve", *FLAGS, *(word for pair in options.items() for word in pair)]) == 0
    assert made[0] == ServeConfig(
        host="0.0.0.0",
        port=0,
        admin_token_file=tmp_path / "token",
        admin_host="127.0.0.2",
        admin_port=8001,
        api_key_file=tmp_path / "keys",
        swap_policy="enforce",
        log_prompts=True,
        allowed=Allowed(completions=True, prefill=True, special_tokens=True),
        max_queue=4,
        audit_file=tmp_path / "audit.jsonl",
        limits=Limits(
            running=3,
            max_body_bytes=5,
            max_prompt_tokens=6,
            max_tokens=7,
            max_choices=8,
            request_seconds=9,
            drain_seconds=10,
            cache_tokens=64,
            batch_tokens=11,
        ),
    )
    assert main(["serve", "--swap-policy", "soon"]) == 2


@pytest.mark.parametrize(
    "limits",
    [{"running": 0}, {"max_tokens": 0}, {"max_prompt_tokens": -1}, {"request_seconds": 0}, {"drain_seconds": -1}],
)
def test_limits_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"the limit {next(iter(limits))} is"):
        Limits(**limits)
