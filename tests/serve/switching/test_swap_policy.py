"""Swap policies: what becomes of requests in flight when the active patch changes."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nest_runtime.errors import UsageError
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from tests.support.serve import PROMPTS, Reference, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": PROMPTS[3]}]


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def switch(server: Running, ref: str, policy: str | None = None) -> dict[str, Any]:
    body = {"patch": ref} if policy is None else {"patch": ref, "policy": policy}
    response = server.admin("POST", "/v1/patches/activate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ask(server: Running, model: str | None = None, count: int = 80, **more: Any) -> tuple[str | None, str]:
    """One answer and the patch that its headers name."""
    raw = server.client().chat.completions.with_raw_response.create(
        model=model or server.name, messages=USER, max_tokens=count, **more
    )
    return raw.parse().choices[0].message.content, raw.headers["x-nest-patch"]


def in_flight(server: Running, version: str) -> int:
    rows = server.admin("GET", "/v1/patches").json()["patches"]
    return sum(row["in_flight"] for row in rows if row["version"] == version)


def begun(server: Running, future: Future[Any], version: str = "v1", count: int = 1) -> None:
    assert eventually(lambda: in_flight(server, version) == count)
    assert not future.done()


def test_enforce_begins_a_request_again_under_the_new_patch(
    server: Running, slow_engine: None, files: dict[str, str], patches: list[Patch], reference: Reference, pool: Any
) -> None:
    future = pool.submit(ask, server)
    begun(server, future)
    time.sleep(0.3)  # some thirty tokens under v1
    answer = switch(server, files["v2"], "enforce")
    assert (answer["policy"], answer["replaced"], answer["previous"]) == ("enforce", 1, "v1")
    assert future.result() == (reference.chat(PROMPTS[3], "v2", 80), "v2")
    metrics = server.http("GET", "/metrics").text
    assert 'nest_replaced_requests_total{outcome="restarted",patch="v1"} 1.0' in metrics
    entry = server.admin("GET", "/v1/audit").json()["entries"]
    assert [e["policy"] for e in entry if e["what"] == "activate"] == ["drain", "enforce"]
    assert eventually(lambda: server.server.service.engine.jobs == 0)


def test_a_whole_answer_names_the_patch_it_was_begun_again_under(
    server: Running, slow_engine: None, files: dict[str, str], patches: list[Patch], pool: Any
) -> None:
    create = server.client().chat.completions.create
    future = pool.submit(create, model=server.name, messages=USER, max_tokens=40, n=3, temperature=1.0, seed=5)
    begun(server, future, count=3)
    switch(server, files["v3"], "enforce")
    several = future.result()
    assert several.system_fingerprint.endswith(patches[2].digest)
    again = create(model=server.name, messages=USER, max_tokens=40, n=3, temperature=1.0, seed=5)
    assert [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
    assert several.usage == again.usage  # what was thrown away is not counted to the client


def test_a_stream_that_was_seen_ends_with_an_error_and_never_mixes(
    server: Running, slow_engine: None, files: dict[str, str], reference: Reference
) -> None:
    body = {"model": server.name, "messages": USER, "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["x-nest-patch"] == "v1"
        lines = (line for line in response.iter_lines() if line)
        events = [json.loads(next(lines).removeprefix("data: ")) for _ in range(6)]
        assert switch(server, files["v2"], "enforce")["replaced"] == 1
        rest = [line.removeprefix("data: ") for line in lines]
    assert "[DONE]" not in rest
    *pieces, last = events + [json.loads(line) for line in rest]
    assert last["error"]["code"] == "patch_replaced"
    assert last["error"]["type"] == "server_error"
    assert "v1 was replaced by v2" in last["error"]["message"]
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    whole = reference.chat(PROMPTS[3], "v1", 200)
    assert 0 < len(text) < len(whole)
    assert whole.startswith(text)
    assert 'nest_replaced_requests_total{outcome="ended",patch="v1"} 1.0' in server.http("GET", "/metrics").text
    assert eventually(lambda: server.server.service.engine.jobs == 0)


def test_the_official_client_raises_where_a_stream_was_ended(
    server: Running, slow_engine: None, files: dict[str, str]
) -> None:
    stream = server.client().chat.completions.create(model=server.name, messages=USER, max_tokens=200, stream=True)
    next(stream)
    switch(server, files["v2"], "enforce")
    with pytest.raises(openai.APIError, match="was replaced by v2"):
        for _ in stream:
            pass


def test_a_stream_that_was_not_seen_begins_again(
    config: ServeConfig, slow_engine: None, files: dict[str, str], reference: Reference, pool: Any
) -> None:
    """With room for one sequence, the second waits, and its client has seen nothing when the patch is replaced."""
    one = replace(config, limits=Limits(running=1, cache_tokens=1024, batch_tokens=64))

    def stream(count: int) -> tuple[str, str]:
        with server.client().chat.completions.with_streaming_response.create(
            model=server.name, messages=USER, max_tokens=count, stream=True
        ) as response:
            chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if "choices" in c)
            return text, response.headers["x-nest-patch"]

    with serving(one) as server:
        first = pool.submit(ask, server, count=150)
        begun(server, first)
        second = pool.submit(stream, 30)
        begun(server, second, count=2)
        assert switch(server, files["v2"], "enforce")["replaced"] == 2
        assert first.result() == (reference.chat(PROMPTS[3], "v2", 150), "v2")
        assert second.result() == (reference.chat(PROMPTS[3], "v2", 30), "v2")


def test_requests_that_named_a_patch_keep_it(
    config: ServeConfig, slow_engine: None, files: dict[str, str], reference: Reference, pool: Any
) -> None:
    exposed = replace(config, expose=(files["v3"],), expose_base=True)
    with serving(exposed) as server:
        named = pool.submit(ask, server, f"{server.name}@v3")
        bare = pool.submit(ask, server, f"{server.name}@base")
        begun(server, named, "v3")
        assert eventually(lambda: server.server.service.engine.live == 2)
        assert switch(server, files["v2"], "enforce")["replaced"] == 0
        assert named.result() == (reference.chat(PROMPTS[3], "v3", 80), "v3")
        assert bare.result() == (reference.chat(PROMPTS[3], None, 80), "base")


def test_the_servers_policy_holds_unless_a_call_has_its_own(
    config: ServeConfig, slow_engine: None, files: dict[str, str], reference: Reference, pool: Any
) -> None:
    with serving(replace(config, swap_policy="enforce")) as server:
        kept = pool.submit(ask, server)
        begun(server, kept)
        assert switch(server, files["v2"], "drain")["replaced"] == 0
        assert kept.result() == (reference.chat(PROMPTS[3], "v1", 80), "v1")

        moved = pool.submit(ask, server)
        begun(server, moved, "v2")
        rolled = server.admin("POST", "/v1/patches/rollback")
        assert (rolled.json()["active"], rolled.json()["replaced"]) == ("v1", 1)
        assert moved.result() == (reference.chat(PROMPTS[3], "v1", 80), "v1")

        switch(server, "v2")
        kept = pool.submit(ask, server)
        begun(server, kept, "v2")
        server.admin("POST", "/v1/patches/rollback", json={"policy": "drain"})
        assert kept.result()[1] == "v2"


def test_an_urgent_call_reaches_requests_that_an_earlier_switch_let_drain(
    server: Running, slow_engine: None, files: dict[str, str], reference: Reference, pool: Any
) -> None:
    future = pool.submit(ask, server)
    begun(server, future)
    assert switch(server, files["v2"])["replaced"] == 0
    assert in_flight(server, "v1") == 1
    assert switch(server, "v2", "enforce")["replaced"] == 1  # v2 is on already; now it is meant for everyone
    assert future.result() == (reference.chat(PROMPTS[3], "v2", 80), "v2")


def test_policies_that_do_not_exist_are_refused(server: Running, files: dict[str, str]) -> None:
    refused = server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"], "policy": "now"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "policy")
    assert refused.json()["error"]["message"] == "policy: Input should be 'drain' or 'enforce'; found 'now'"
    mistyped = server.admin("POST", "/v1/patches/activate", json={"pach": "v2"})
    assert mistyped.json()["error"]["message"] == "Unrecognized request argument supplied: pach"
    assert server.admin("POST", "/v1/patches/rollback", json={"policy": "now"}).status_code == 400
    with pytest.raises(UsageError, match="--swap-policy is 'now'"):
        ServeConfig(swap_policy="now")  # type: ignore[arg-type]


def test_enforced_swaps_under_load(
    server: Running, files: dict[str, str], reference: Reference, pool: ThreadPoolExecutor
) -> None:
    """Whole answers never fail and are one patch's; streams are one patch's, whole or a beginning."""
    expected = {(p, v): reference.chat(p, v, 24) for p in PROMPTS for v in ("v1", "v2", "v3")}
    stop = threading.Event()
    client = server.client()
    restarted = [0]

    def whole(worker: int) -> None:
        for count in range(10_000):
            if stop.is_set():
                return
            prompt = PROMPTS[(worker + count) % len(PROMPTS)]
            raw = client.chat.completions.with_raw_response.create(
                model=server.name, messages=[{"role": "user", "content": prompt}], max_tokens=24
            )
            assert raw.parse().choices[0].message.content == expected[prompt, raw.headers["x-nest-patch"]]

    def stream(worker: int) -> None:
        for count in range(10_000):
            if stop.is_set():
                return
            prompt, text, ended = PROMPTS[(worker + count) % len(PROMPTS)], "", False
            body = {"model": server.name, "messages": [{"role": "user", "content": prompt}]}
            with client.chat.completions.with_streaming_response.create(**body, max_tokens=24, stream=True) as response:  # type: ignore[call-overload]
                for line in response.iter_lines():
                    event = json.loads(line[6:]) if line.startswith("data: {") else {}
                    ended |= event.get("error", {}).get("code") == "patch_replaced"
                    text += "".join(c["delta"].get("content", "") for c in event.get("choices", []))
                meant = expected[prompt, response.headers["x-nest-patch"]]
            assert meant.startswith(text) if ended else meant == text

    workers = [pool.submit(whole, n) for n in range(4)] + [pool.submit(stream, n) for n in range(4)]
    dice = random.Random(0)
    try:
        for number in range(25):
            answer = switch(server, files[f"v{number % 3 + 1}"], dice.choice(["enforce", "enforce", "drain"]))
            restarted[0] += answer["replaced"]
            time.sleep(0.03)
    finally:
        stop.set()
    for worker in workers:
        worker.result()
    assert restarted[0] > 10
    assert eventually(lambda: server.server.service.engine.jobs == 0)


def posted(host: str, fields: dict[str, Any]) -> bytes:
    """A chat request as it goes over the wire."""
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def test_nothing_of_the_old_patch_waits_for_a_client_that_reads_late(server: Running, files: dict[str, str]) -> None:
    """Its answer is whole in the server when the patch is replaced: what the client had not taken is thrown away."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        late.settimeout(20)
        late.connect((host, int(port)))
        late.sendall(posted(host, {"model": server.name, "messages": USER, "max_tokens": 200, "stream": True}))
        seen = late.recv(1024)
        assert seen.startswith(b"HTTP/1.1 200 ")
        assert eventually(lambda: server.server.service.engine.jobs == 0, 120)  # all 200 tokens are there
        assert switch(server, files["v2"], "enforce")["replaced"] == 1
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while more := late.recv(65536):
                rest += more
    assert rest.count(b'"content"') < 60  # what was on its way, and no more
    assert b"[DONE]" not in rest
    assert eventually(lambda: server.server.service.engine.live == 0)
    assert ask(server, count=4)[1] == "v2"


def test_an_answer_that_is_whole_and_not_yet_sent_begins_again(
    server: Running, files: dict[str, str], reference: Reference
) -> None:
    """A client asks again before it has read what it got: the second answer waits for that, and is the new patch's."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        late.settimeout(20)
        late.connect((host, int(port)))
        late.sendall(f"GET /openapi.json HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())  # more than fits on the way
        late.sendall(posted(host, {"model": server.name, "messages": USER, "max_tokens": 3}))
        assert eventually(lambda: 'nest_answers_total{patch="v1"} 1.0' in server.http("GET", "/metrics").text, 120)
        assert switch(server, files["v2"], "enforce")["replaced"] == 1
        answers = b""
        while b'"total_tokens"' not in answers.partition(b"x-nest-patch: v2")[2] and (more := late.recv(65536)):
            answers += more
    second = answers[answers.rindex(b"HTTP/1.1 200") :]
    assert b"x-nest-patch: v2\r\n" in second
    assert json.loads(second.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == reference.chat(
        PROMPTS[3], "v2", 3
    )
