"""Around every request: access, a request id, the patch headers, the body's size, metrics and one log line.

A pure ASGI layer outside of FastAPI, so that errors of any kind pass through it as well. Prompts and answers are
never logged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nest_runtime.serve.http.access import Access, is_admin_path
from nest_runtime.serve.http.bodies import check_body
from nest_runtime.serve.http.connections import Connection
from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.switching.table import PatchTable

ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ENDPOINTS = (*ANSWERS, "/v1/models", "/v1/patches", "/v1/audit")
PROBES = ("/health", "/ready", "/metrics")
BODIES = 64  # of the largest size, that are held at once
GONE = 499  # nginx's status for a client that left; nobody reads it but the log
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

log = logging.getLogger("nest_runtime.serve.access")


class RequestFrame:
    """The ASGI app around the API.

    Args:
        app: the API.
        table: for the patch headers; a response that no patch was chosen for names the active one.
        access: who may ask.
        metrics: counts requests.
        limits: larger bodies get 413, and those that do not come to an end in time 408.
        welcome: says whether requests may be made to a host; None lets them be made to any.
        origins: sites whose pages may ask from a browser, the admin API excepted.
    """

    def __init__(
        self,
        app: ASGIApp,
        table: PatchTable,
        access: Access,
        metrics: Metrics,
        limits: Limits,
        *,
        welcome: Callable[[str], bool] | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._welcome = welcome
        self._for_pages: ASGIApp = self._framed
        if origins:
            shown = ["x-nest-patch", "x-nest-patch-digest", "x-request-id", "retry-after"]
            methods, headers = ["GET", "POST"], ["*"]
            self._for_pages = CORSMiddleware(self._framed, origins, methods, headers, expose_headers=shown)
        self._table = table
        self._access = access
        self._metrics = metrics
        self._limits = limits
        self._held = 0  # bytes of the bodies that are being read or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, self._ending(receive), send)
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif is_admin_path(scope["path"]):
            await self._framed(scope, receive, send)
        else:
            await self._for_pages(scope, receive, send)

    def _ending(self, receive: Receive) -> Receive:
        """At the end, what was counted is written down."""

        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._access.write_denials()
            return message

        return received

    async def _framed(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: dict[str, Any] = scope.setdefault("state", {})
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started, status = time.perf_counter(), 0

        async def framed(message: Message) -> None:
            """Add the patch's headers to the answer as it begins."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await self._access.note(scope, status)
                self._add_headers(MutableHeaders(raw=message["headers"]), state)
            await send(message)

        try:
            refusal = self._elsewhere(scope) or await self._access.check(scope)
            refusal = refusal or _crowded(scope) or self._too_large(scope)
            if refusal is None:
                try:
                    receive = await self._whole(scope, receive)
                except ApiError as error:
                    refusal = error
                except ClientDisconnect:
                    status = GONE
                    return
            await (self._app if refusal is None else refusal.response())(scope, receive, framed)
        finally:
            self._held -= state.get("held", 0)
            self._note(scope, state, status, time.perf_counter() - started)

    def _add_headers(self, headers: MutableHeaders, state: dict[str, Any]) -> None:
        pin: ServedPatch = state.get("pin") or self._table.active
        state["pin"] = pin
        headers["x-nest-patch"] = quote(pin.label, safe="@+ ")
        headers["x-nest-patch-digest"] = pin.digest
        headers["x-request-id"] = state["request_id"]

    def _elsewhere(self, scope: Scope) -> ApiError | None:
        """The refusal for a request to another host's name: a page elsewhere may have made that name point here."""
        host = Headers(scope=scope).get("host")
        if self._welcome is None or host is None or self._welcome(host_of(host)):
            return None
        message = (
            f"This server is for this machine only, and the request was made to {host[:200]!r}; "
            "--allowed-host lets more names in."
        )
        return ApiError(403, message, code="host_not_allowed")

    def _too_large(self, scope: Scope) -> ApiError | None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) <= self._limits.max_body_bytes:
            return None
        return ApiError(
            413, f"The body has {length} bytes; at most {self._limits.max_body_bytes} are taken.", code="body_too_large"
        )

    async def _whole(self, scope: Scope, receive: Receive) -> Receive:
        """The request with its body read and counted.

        Raises:
            ApiError: the body grows too long, never ends, or holds too much.
            ClientDisconnect: the client left.
        """
        headers = Headers(scope=scope)
        if "transfer-encoding" not in headers and headers.get("content-length", "0").strip("0") == "":
            return receive
        most, seconds = self._limits.max_body_bytes, self._limits.request_seconds
        body, state = bytearray(), scope["state"]
        state["held"] = 0
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    piece = message.get("body", b"")
                    body += piece
                    self._held += len(piece)
                    state["held"] += len(piece)
                    more = message.get("more_body", False)
                    if self._held > BODIES * most and state.get("operator") is None:
                        raise ApiError(
                            503,
                            "The requests that are being read and answered are too large together; try again later.",
                            code="too_many_bodies",
                            headers={"retry-after": "5", "connection": "close"},
                        )
                    if len(body) > most:
                        raise ApiError(
                            413, f"The body is too large; at most {most} bytes are taken.", code="body_too_large"
                        )
        except TimeoutError:
            late = f"The body did not come in {seconds:g} s."
            raise ApiError(408, late, headers={"connection": "close"}) from None
        check_body(body, self._limits.max_values)
        return replayed(bytes(body), receive)

    def _note(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        path = scope["path"]
        endpoint = next((e for e in (*ENDPOINTS, *PROBES) if path == e or path.startswith(f"{e}/")), "other")
        pin: ServedPatch = state.get("pin") or self._table.active
        self._metrics.requests.labels(endpoint, str(status), pin.label).inc()
        self._metrics.request_seconds.labels(endpoint).observe(seconds)
        level = logging.DEBUG if endpoint in PROBES else logging.INFO
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": quote(path[:200]),
            "status": status,
            "ms": round(seconds * 1000, 1),
            "patch": pin.label,
        }
        answered = endpoint in ANSWERS and status < 400
        extra = {"fields": fields, "kind": None if answered else f"{endpoint} {status}"}
        log.log(level, " ".join(f"{key}={value}" for key, value in fields.items()), extra=extra)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, then whatever else comes: that the client left."""
    given = False

    async def again() -> Message:
        """Give the body that was read already, then what comes."""
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _crowded(scope: Scope) -> ApiError | None:
    """The refusal for a client on a connection that is kept for operators and probes, or None."""
    connection: Connection | None = scope["state"].get("connection")
    if connection is None or not connection.spare or scope["state"].get("operator") or scope["path"] in PROBES:
        return None
    headers = {"retry-after": "1", "connection": "close"}
    message = "All connections of this server are taken; try again in a moment."
    return ApiError(503, message, code="too_many_connections", headers=headers)


def host_of(header: str) -> str:
    """The host in a Host header, without its port and in small letters; empty if there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
