"""Bodies that cost more than they look: a million small values, names as long as the body, texts without end."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from nest_runtime.serve import ServeConfig
from nest_runtime.serve.http.bodies import MAX_DEPTH, MAX_NAMED, check_counts
from nest_runtime.serve.http.problems import ApiError
from tests.support.serve import PROMPTS, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

MEBI = 1024 * 1024
USER: list[Any] = [{"role": "user", "content": PROMPTS[0]}]


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


def post(server: Running, body: bytes, path: str = "/v1/completions") -> httpx.Response:
    return server.http("POST", path, content=body, headers={"content-type": "application/json"})


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30)


def filled(server: Running, piece: bytes, size: int) -> bytes:
    """A completion request whose prompt is a list of one piece again and again."""
    head = b'{"model": "%b", "prompt": [' % server.name.encode()
    return head + piece + (b"," + piece) * (size // (len(piece) + 1) - 100) + b"]}"


@pytest.mark.parametrize("piece", [b"{}", b"[]", b'"a"', b"1", b"null", b'{"a":{}}'])
def test_four_megabytes_of_small_values_are_refused_at_once(server: Running, piece: bytes) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refused = post(server, filled(server, piece, 4 * MEBI))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_values")
    assert len(refused.content) < 1000
    assert time.process_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_many_prompts_are_counted_before_they_are_tokenized(server: Running) -> None:
    """Eight clients with 100,000 prompts each cost next to nothing, and delay no operator."""
    body = filled(server, b'"a"', 400_000)
    began = time.process_time()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, server, body) for _ in range(8)]
        assert server.admin("POST", "/v1/patches/activate", json={"patch": "v1", "policy": "enforce"}).is_success
        found = [answer.result() for answer in answers]
    assert {(one.status_code, one.json()["error"]["param"]) for one in found} == {(400, "n")}
    assert "at most 32 are answered" in found[0].json()["error"]["message"]
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [{}] * 5000}, "prompt.0"),
        ("/v1/completions", {"prompt": [[1, "x"]] * 5000}, "prompt.0.1"),
        ("/v1/completions", {"prompt": "x", "y" * MEBI: 1}, "y" * 200 + "…"),
        ("/v1/completions", {"prompt": "x", **{f"field{n}": n for n in range(5000)}}, "field0"),
        ("/v1/chat/completions", {"messages": [{}] * 2000}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": USER * 2049}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 5000}]}, None),
        ("/v1/chat/completions", {"messages": [{"role": "x" * MEBI, "content": ""}]}, "messages.0.role"),
    ],
)
def test_an_error_is_one_and_short(server: Running, path: str, fields: dict[str, Any], param: str | None) -> None:
    refused = post(server, json.dumps({"model": server.name, **fields}).encode(), path)
    assert refused.status_code == 400
    assert len(refused.content) < 5000
    assert param is None or refused.json()["error"]["param"] == param


def test_bodies_that_never_end_fill_no_memory(config: ServeConfig) -> None:
    """What all clients together have sent, and not been answered to, is bounded; operators do not count."""
    limits = replace(config.limits, max_body_bytes=10_000)
    with serving(replace(config, limits=limits)) as server, ExitStack() as senders:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 10000\r\n\r\n"
        sent = [senders.enter_context(connect(server)) for _ in range(65)]
        for sender in sent:
            sender.sendall(head + b"x" * 9_990)

        def refused() -> bool:
            body = {"model": server.name, "prompt": "x" * 9_000}
            return server.http("POST", "/v1/completions", json=body).status_code == 503

        assert eventually(refused)
        assert server.admin("POST", "/v1/patches/activate", json={"patch": "v1"}).status_code == 200
        senders.close()
        assert eventually(lambda: not refused())


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "PUT"])
def test_a_body_is_bounded_whatever_the_method(config: ServeConfig, method: str) -> None:
    """Chunks announce no size: whoever reads them has to count."""
    limits = replace(config.limits, max_body_bytes=10_000)
    with serving(replace(config, limits=limits)) as server, connect(server) as sender:
        head = f"{method} /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n"
        sender.sendall(head.encode() + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 4)
        assert sender.recv(65536).split(b" ")[1] == b"413"


def test_a_body_of_tiny_chunks_is_refused(server: Running) -> None:
    """A chunk costs more than a byte: bodies in chunks of a few bytes, in great number, are no client's."""
    body = json.dumps({"model": server.name, "messages": USER, "max_tokens": 1}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"

    def send(text: bytes, size: int) -> bytes:
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        with connect(server) as sender:
            sender.sendall(head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
            return sender.recv(65536).split(b" ")[1]

    assert send(body, 1) == b"200"
    assert send(body + b" " * 200_000, 100) == b"200"
    with contextlib.suppress(OSError):  # the server has closed before all was sent
        assert send(body + b" " * 200_000, 1) == b"400"
    assert server.http("GET", "/health").status_code == 200


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_bodies_in_other_encodings_are_refused(server: Running, encoding: str) -> None:
    """What is counted in bytes is in UTF-8: half of a letter elsewhere reads like a quotation mark."""
    text = f'{{"user": "\u0122", "model": "{server.name}", "prompt": [{"{}," * 200_000}{{}}]}}'
    refused = post(server, text.encode(encoding))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert "expected JSON in UTF-8" in refused.json()["error"]["message"]
    assert post(server, text.encode("utf-8-sig")).json()["error"]["code"] == "too_many_values"


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 944, 16_000, 2_000_000])
@pytest.mark.parametrize(
    "field", ['"metadata": {"a": %s}', '"tools": [{"a": %s}]', '"x": %s', '"messages": [{"role": "user", "a": %s}]']
)
def test_bodies_nested_too_deep_are_refused(server: Running, field: str, depth: int) -> None:
    body = f'{{"model": "{server.name}", {field % ("[" * depth + "]" * depth)}}}'
    refused = post(server, body.encode(), "/v1/chat/completions")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] in ("nested_too_deep", "too_many_values")
    open_ = post(server, b'{"a": ' * min(depth, 500_000), "/v1/chat/completions")
    assert open_.status_code == 400


def test_what_is_deep_but_not_too_deep_is_read(server: Running) -> None:
    value: Any = "x"
    for _ in range(MAX_DEPTH // 2 - 4):
        value = {"a": [value]}
    text = "[{" * 500 + '"]}' * 500  # within a string, brackets are text
    messages = [*USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": value}}]}, *USER]
    messages[1]["tool_calls"].append({"function": {"name": "f", "arguments": json.dumps(value)}})
    body = {"model": server.name, "messages": messages, "metadata": {"a": text}, "max_tokens": 1}
    assert server.http("POST", "/v1/chat/completions", json=body).status_code == 200


def test_long_texts_are_no_large_numbers_of_values(server: Running) -> None:
    """Commas and braces inside of strings do not count."""
    for text in ("a,{[:" * 100_000, '\\",' * 100_000):
        body = {"model": server.name, "messages": [{"role": "user", "content": text}]}
        refused = server.http("POST", "/v1/chat/completions", json=body)
        assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        (b'{"a": [1,2,3,4,5]}', True),
        (b"[" + b"1," * 5 + b"1]", True),
        (b"[" + b"1," * 6 + b"1]", False),
        (b'["' + b"," * 50 + b'"]', True),
        (b'["' + b'\\",' * 50 + b'"]', True),
        (b'["\\\\",' + b"1," * 6 + b"1]", False),  # the string ends at the second quote: its backslash is escaped
        (b'["' + b'\\"' * 1000, True),  # cut off: no JSON at all, which is for others to say
        (b'["a\\', True),
        (b"[" * (MAX_NAMED + 1), False),
        (b'{"a":' * (MAX_NAMED + 1), False),
        (b"", True),
    ],
)
def test_values_are_counted_outside_of_strings(body: bytes, fits: bool) -> None:
    if fits:
        check_counts(body, 5)
    else:
        with pytest.raises(ApiError, match="at most"):
            check_counts(body, 5)


def test_counting_takes_no_longer_than_the_body_is_long() -> None:
    for body in (b'"' + b'\\"' * (2 * MEBI), b'"' * (4 * MEBI), b'{"p":"' + b"[{:," * MEBI + b"\\", b",[" * (2 * MEBI)):
        began = time.process_time()
        with contextlib.suppress(ApiError):
            check_counts(body, 131_072)
        assert time.process_time() - began < 1
