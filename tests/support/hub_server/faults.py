"""Faults on demand: which requests go wrong, how, and how often. Wraps the routes as ASGI."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass
class Fault:
    """One way in which requests fail.

    Attributes:
        kind: "status" (answer with ``status``), "drop" (cut the connection without an answer), or "drop-late" (act,
            then cut it, so that the client cannot know). The body may be "slow" (one byte at a time), "cut" (half of
            it, then the connection is cut), or "wrong" (other bytes of the same size). With "body" it is passed
            through ``change``.
        path: a regular expression that the request's path must contain.
        method: the request's method; any where empty.
        times: how many requests; None for all.
        status, headers: of the answer.
        change: the body's replacement.
        pause: seconds between bytes of a slow answer.
        seen: how many requests it has hit.
    """

    kind: str
    path: str = ""
    method: str = ""
    times: int | None = None
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] = lambda body: body
    pause: float = 0.3
    seen: int = 0

    def hits(self, method: str, path: str) -> bool:
        if self.times is not None and self.seen >= self.times:
            return False
        return self.method in ("", method) and re.search(self.path, path) is not None


class Faults:
    """ASGI middleware. ``active`` may be changed at any time; ``log`` holds every request."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.active: list[Fault] = []
        self.log: list[tuple[str, str, bool, str]] = []  # method, path, carried a token, host asked

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["raw_path"].decode()
        headers = {key.decode().lower(): value.decode() for key, value in scope["headers"]}
        self.log.append((scope["method"], path, "authorization" in headers, headers.get("host", "")))
        fault = next((fault for fault in self.active if fault.hits(scope["method"], path)), None)
        if fault is None:
            await self.app(scope, receive, send)
            return
        fault.seen += 1
        await self._break(fault, scope, receive, send)

    async def _break(self, fault: Fault, scope: Message, receive: Any, send: Any) -> None:
        if fault.kind == "drop":
            _connection(receive).abort()
            return
        if fault.kind == "status":
            await _read_all(receive)
            body = f'{{"error": "injected {fault.status}"}}'.encode()
            await _answer(send, fault.status, {"content-type": "application/json", **fault.headers}, body)
            return
        answer = _Answer()
        await self.app(scope, receive, answer)
        body = answer.body
        if fault.kind == "drop-late":
            _connection(receive).abort()
        elif fault.kind == "wrong":
            await _answer(send, answer.status, answer.headers, bytes(byte ^ 0x55 for byte in body))
        elif fault.kind == "body":
            await _answer(send, answer.status, answer.headers, fault.change(body))
        elif fault.kind in ("slow", "cut"):
            await self._drip(fault, answer, receive, send)

    async def _drip(self, fault: Fault, answer: _Answer, receive: Any, send: Any) -> None:
        await send(answer.start)
        if fault.kind == "cut":
            await send({"type": "http.response.body", "body": answer.body[: len(answer.body) // 2], "more_body": True})
            await asyncio.sleep(0.05)
            _connection(receive).abort()
            return
        for at in range(len(answer.body)):
            await send({"type": "http.response.body", "body": answer.body[at : at + 1], "more_body": True})
            await self._pause(fault)
            if fault not in self.active:  # healed: the client may try again
                _connection(receive).abort()
            if _connection(receive).is_closing():
                return
        await send({"type": "http.response.body", "body": b""})

    async def _pause(self, fault: Fault) -> None:
        """Wait for the fault's pause, or until it is healed."""
        loop = asyncio.get_running_loop()
        until = loop.time() + fault.pause
        while fault in self.active and (left := until - loop.time()) > 0:
            await asyncio.sleep(min(left, 0.05))


class _Answer:
    """Collects what the app sends."""

    def __init__(self) -> None:
        self.start: Message = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        else:
            self.body += message.get("body", b"")

    @property
    def status(self) -> int:
        return int(self.start["status"])

    @property
    def headers(self) -> dict[str, str]:
        rows = [(key.decode(), value.decode()) for key, value in self.start["headers"]]
        return {key: value for key, value in rows if key.lower() != "content-length"}


async def _answer(send: Any, status: int, headers: dict[str, str], body: bytes) -> None:
    rows = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    rows.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": rows})
    await send({"type": "http.response.body", "body": body})


async def _read_all(receive: Any) -> None:
    while (await receive()).get("more_body"):
        pass


def _connection(receive: Any) -> Any:
    """Uvicorn's transport behind a request; ASGI itself has no way to cut a connection."""
    return receive.__self__.transport
