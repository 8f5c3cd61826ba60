"""Connections that ask nothing, ask slowly or take nothing: they keep neither clients nor operators out."""

from __future__ import annotations

import json
import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from nest_runtime.errors import UsageError
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.events import Thinned
from nest_runtime.serve.http.connections import KEPT, clients_share
from tests.support.certificates import certificate
from tests.support.serve import PROMPTS, Process, Running, eventually, process, serving

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": PROMPTS[3]}]


@contextmanager
def limited(config: ServeConfig, **limits: Any) -> Iterator[Running]:
    with serving(replace(config, limits=replace(config.limits, **limits))) as running:
        yield running


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def closed(connection: socket.socket) -> bool:
    """Whether the other side closes within the time out of the connection; what it sends before is read."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def healthy(connection: socket.socket) -> bool:
    """Whether one request on a connection is answered well; its answer is read whole."""
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}") and (more := connection.recv(65536)):
        answer += more
    return answer.startswith(b"HTTP/1.1 200 ")


def ask(server: Running | Process, path: str = "/v1/models") -> int:
    return server.http("GET", path).status_code


def test_idle_connections_give_way_to_those_that_ask(config: ServeConfig) -> None:
    with limited(config, connections=20) as server, ExitStack() as idle:
        first = idle.enter_context(connect(server.url))
        for _ in range(100):
            idle.enter_context(connect(server.url))
        assert ask(server) == 200
        assert server.admin("GET", "/v1/patches").status_code == 200
        assert closed(first)
        crowd = server.server.crowd
        assert crowd.open <= 20
        assert crowd.turned_away >= 81
        assert "nest_connections_limit 20.0" in server.http("GET", "/metrics").text


def test_connections_that_never_finish_a_handshake_give_way_too(config: ServeConfig, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    secure = replace(config, ssl_certfile=cert, ssl_keyfile=key)
    trusting = ssl.create_default_context(cafile=str(cert))
    with limited(secure, connections=20, header_seconds=2.0) as server, ExitStack() as idle:
        url, named = server.url.replace("https", "http"), server.url.replace("127.0.0.1", "localhost")
        first = idle.enter_context(connect(url))
        others = [idle.enter_context(connect(url)) for _ in range(100)]
        others[-1].sendall(b"\x16\x03\x01")  # a handshake's beginning
        assert httpx.get(f"{named}/v1/models", verify=trusting).status_code == 200
        assert closed(first)
        assert server.server.crowd.open <= 20
        assert server.server.crowd.turned_away >= 81
        assert all(map(closed, others[-3:]))  # those that did not have to give way have run out of time
        assert httpx.get(f"{named}/ready", verify=trusting).status_code == 200
        assert eventually(lambda: server.server.crowd.open == 0)


def test_where_all_connections_are_at_work_operators_still_get_one(config: ServeConfig, slow_engine: None) -> None:
    body = {"model": "tiny-llama", "messages": USER, "max_tokens": 400, "stream": True}
    with limited(config, connections=4) as server, ExitStack() as busy:
        url = f"{server.url}/v1/chat/completions"
        for _ in range(4):
            stream = busy.enter_context(httpx.stream("POST", url, json=body, timeout=60))
            assert stream.status_code == 200
        refused = server.http("GET", "/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert refused.headers["connection"] == "close"
        assert server.http("GET", "/v1/patches").status_code == 401  # the admin API is not open to everybody for that
        assert server.admin("POST", "/v1/patches/activate", json={"patch": "v1"}).status_code == 200
        assert (ask(server, "/health"), ask(server, "/ready"), ask(server, "/metrics")) == (200, 200, 200)
        for _ in range(2 * KEPT):
            busy.enter_context(connect(server.url))
        assert server.admin("GET", "/v1/patches").status_code == 200
        assert server.server.crowd.open <= 4 + KEPT
    assert eventually(lambda: server.server.crowd.open == 0)


def test_a_head_that_does_not_come_whole_in_time_ends_the_connection(config: ServeConfig) -> None:
    with limited(config, header_seconds=1.0) as server, connect(server.url) as silent, connect(server.url) as slow:
        dripping = threading.Event()

        def drip() -> None:
            for byte in b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-long: " + b"a" * 10_000:
                try:
                    slow.sendall(bytes([byte]))
                except OSError:
                    return
                if dripping.wait(0.05):
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        assert closed(silent)
        assert closed(slow)
        assert time.monotonic() - began < 20
        dripping.set()
        thread.join()
        assert server.server.crowd.slow == 2


def test_a_second_head_has_no_more_time_than_the_first(config: ServeConfig) -> None:
    with limited(config, header_seconds=1.0, idle_seconds=60.0) as server, connect(server.url) as kept:
        assert healthy(kept)
        time.sleep(1.5)  # between two requests a client may be silent for longer
        assert healthy(kept)
        kept.sendall(b"GET /health HT")
        assert closed(kept)


def test_a_head_of_very_many_fields_is_refused(config: ServeConfig) -> None:
    with serving(config) as server:
        for count, status in ((80, b"200"), (1000, b"400"), (15_000, b"400")):
            with connect(server.url) as sender:
                sender.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n" + b"a:\r\n" * count + b"\r\n")
                assert sender.recv(65536).split(b" ")[1] == status


def test_what_is_no_http_after_an_answer_ends_the_connection_without_a_word(config: ServeConfig, caplog: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n"
    with serving(replace(config, allowed_hosts=())) as server, connect(server.url) as sender:
        sender.sendall(head.replace(b"127.0.0.1", b"elsewhere.example") + b"\r\n")
        assert sender.recv(65536).split(b" ")[1] == b"403"
        sender.sendall(b"no chunk\r\n")
        assert closed(sender)
    assert "Traceback" not in caplog.text
    assert "exception" not in caplog.text.lower()


def test_a_client_that_is_silent_after_its_answer_is_let_go(config: ServeConfig) -> None:
    with limited(config, idle_seconds=0.5) as server, connect(server.url) as kept:
        assert healthy(kept)
        assert closed(kept)


def test_a_client_that_takes_nothing_of_its_answer_is_let_go(config: ServeConfig) -> None:
    body = json.dumps({"model": "tiny-llama", "messages": USER, "max_tokens": 400, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    with limited(config, idle_seconds=1.0) as server, socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = server.url.removeprefix("http://").split(":")
        late.connect((host, int(port)))
        late.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: server.server.crowd.slow == 1)
        assert eventually(lambda: server.server.service.engine.live == 0)
        assert server.server.crowd.open == 0


def test_the_admin_listener_answers_while_the_clients_loop_does_not(config: ServeConfig) -> None:
    """Whatever stalls the clients' event loop: operators look, and see, on one of their own."""
    with serving(replace(config, admin_port=0)) as server:
        release = threading.Event()
        loop = server.server.service.engine._loop
        assert loop is not None
        loop.call_soon_threadsafe(release.wait, 60)
        try:
            for path in ("/health", "/ready", "/metrics"):
                assert httpx.get(f"{server.admin_url}{path}", timeout=20).status_code == 200
            assert server.admin("GET", "/v1/patches", timeout=20).json()["active"] == "v1"
            with ThreadPoolExecutor(1) as pool:
                switch = pool.submit(server.admin, "POST", "/v1/patches/activate", json={"patch": "v1"})
                time.sleep(0.5)
                assert not switch.done()  # a switch is for the clients' loop, and waits for it
                release.set()
                assert switch.result().status_code == 200
        finally:
            release.set()


@pytest.fixture(scope="module")
def few_files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server process that may open 256 files, with an admin listener of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with ExitStack() as stack:
            running = stack.enter_context(
                process(tmp_path_factory.mktemp("few") / "home", "--model", str(tiny_llama), "--admin-port", "0")
            )
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield running
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_flood_of_connections_takes_neither_the_server_nor_the_disk(few_files: Process) -> None:
    """More connections than descriptors: clients are answered, and the log hardly notices."""
    before = few_files.log.stat().st_size
    with ExitStack() as idle:
        for _ in range(600):
            idle.enter_context(connect(few_files.url))
        assert ask(few_files) == 200
        assert ask(few_files, "/ready") == 200
    for _ in range(300):
        assert ask(few_files, "/v1/nothing") == 404
    log = few_files.log.read_bytes()[before:]
    assert len(log) < 60_000
    assert log.count(b"/v1/nothing") < 200
    assert b"out of system resource" not in log
    assert b"Traceback" not in log


@pytest.mark.parametrize(("most", "share"), [(None, 4096), (1024, 768), (256, 64), (65536, 4096), (4096, 3072)])
def test_clients_get_a_share_of_the_descriptors(most: int | None, share: int) -> None:
    assert clients_share(most) == share


def test_more_connections_than_descriptors_are_refused(config: ServeConfig) -> None:
    with pytest.raises(UsageError, match="the system lets this process open"), limited(config, connections=10**9):
        pass


def test_the_log_thins_out_what_comes_again_and_again() -> None:
    thinned = Thinned(burst=3, seconds=0.2)

    def passed(**fields: Any) -> logging.LogRecord | None:
        record = logging.makeLogRecord({"pathname": "a.py", "lineno": 1, **fields})
        return record if thinned.filter(record) else None

    assert [passed() is not None for _ in range(10)] == [True] * 3 + [False] * 7
    assert passed(lineno=2) is not None
    assert [passed(kind="404") is not None for _ in range(5)] == [True] * 3 + [False] * 2
    assert all(passed(kind=None) is not None for _ in range(100))
    time.sleep(0.25)
    again = passed()
    assert again is not None
    assert again.left_out == 7  # type: ignore[attr-defined]
