"""Around every request: access, a request id, the patch headers, the body's size, metrics and one log line.

A pure ASGI layer outside of FastAPI, so that errors of any kind pass through it as well. Prompts and answers are
never logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nest_runtime.addresses import Network
from nest_runtime.errors import StoreError
from nest_runtime.escape import visible
from nest_runtime.serve.http.bodies import check_body
from nest_runtime.serve.http.clients import client_of
from nest_runtime.serve.http.connections import Connection
from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.switching.table import PatchTable
from nest_runtime.serve.tokens import AccessTokens

ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ENDPOINTS = (*ANSWERS, "/v1/models", "/v1/patches", "/v1/audit")
PROBES = ("/health", "/ready", "/metrics")
BODIES = 64  # of the largest size, that are held at once
GONE = 499  # nginx's status for a client that left; nobody reads it but the log
DENIAL_SECONDS, DENIAL_KINDS = 10.0, 32  # at most so many audit lines in that time: strangers must not fill the disk
OTHERS = ("others", "others")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

log = logging.getLogger("nest_runtime.serve.access")


@dataclass
class Secrets:
    """Bearer tokens in force; replaced when the files are read again.

    Attributes:
        api_keys: None lets anyone ask.
        admin: None switches the admin API off.
    """

    api_keys: AccessTokens | None
    admin: AccessTokens | None


@dataclass
class Access:
    """Who may ask one listener for what: API keys open /v1, admin tokens open the admin API.

    Attributes:
        secrets: shared by all listeners.
        audit: where admin calls are written, and attempts with a wrong token.
        admin_here: whether this listener answers admin calls; elsewhere they are unknown paths.
        proxies: whose word on who asks is taken.
    """

    secrets: Secrets
    audit: AuditLog
    admin_here: bool = True
    proxies: tuple[Network, ...] = ()
    _denials: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)  # by sender and call
    _denied_at: float = field(default=-DENIAL_SECONDS, init=False)
    _notes: Pool = field(default_factory=lambda: Pool("notes", 1), init=False)

    async def check(self, scope: Scope) -> ApiError | None:
        """The refusal for a request, or None; sets ``operator`` for whoever holds an admin token.

        Who is no operator is refused here on the admin API's known paths, before a body is read, and by every admin
        route itself (admin.py): a path that nobody thought of here is no way in.
        """
        path, token = scope["path"], _bearer(Headers(scope=scope).get("authorization", ""))
        host = client_of(scope, self.proxies)
        keys, admin = self.secrets.api_keys, self.secrets.admin
        scope["state"]["access"], scope["state"]["operator"] = self, None
        if admin is not None and self.admin_here and admin.matches(token):
            scope["state"]["operator"] = f"admin {hashlib.sha256(token.encode()).hexdigest()[:8]} from {host}"
        if _is_admin(path):
            if admin is None or not self.admin_here:
                return ApiError(404, f"Invalid URL ({scope['method']} {path})")
            return await self.admit(scope)
        if path.startswith("/v1/") and keys is not None and not keys.matches(token):
            return _unauthorized("API key", token)
        return None

    async def admit(self, scope: Scope) -> ApiError | None:
        """Let an operator on to an admin route, and set ``who`` for the audit log; else give the refusal."""
        if scope["state"].get("operator") is None:
            await self._denied(client_of(scope, self.proxies), scope["method"], scope["path"])
            return _unauthorized("admin token", _bearer(Headers(scope=scope).get("authorization", "")))
        scope["state"]["who"] = scope["state"]["operator"]
        return None

    async def note(self, scope: Scope, status: int) -> None:
        """Write down an admin call that no change wrote down: one that reads, or was refused before it began."""
        state = scope["state"]
        if "who" not in state or state.get("audited"):
            return
        state["audited"] = True
        event = {"what": "call", "who": state["who"], "path": _call(scope["method"], scope["path"])}
        await self._record({**event, "status": status, "done": status < 400})

    async def _denied(self, host: str, method: str, path: str) -> None:
        kind = (host, _call(method, path))
        self._denials[kind if kind in self._denials or len(self._denials) < DENIAL_KINDS else OTHERS] += 1
        if time.monotonic() - self._denied_at >= DENIAL_SECONDS:
            await self.write_denials()

    async def write_denials(self) -> None:
        """Write down the calls without a valid token since the last time: a line for each sender and call."""
        denials, self._denials, self._denied_at = self._denials, Counter(), time.monotonic()
        for (host, call), count in denials.items():
            await self._record({"what": "denied", "who": host, "path": call, "count": count, "done": False})

    async def _record(self, event: dict[str, Any]) -> None:
        try:
            await self._notes.run(self.audit.record, event)
        except StoreError as error:
            log.error("an admin call (%s) could not be audited: %s", event["path"], error)


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
        elif _is_admin(scope["path"]):
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
        message = f"This server is for this machine only, and the request was made to {host[:200]!r}."
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


def _call(method: str, path: str) -> str:
    """A method and a path of bounded length, as a line of the audit log has them."""
    return f"{visible(method, 16)} {visible(path, 200)}"


def _is_admin(path: str) -> bool:
    return path == "/v1/audit" or path == "/v1/patches" or path.startswith("/v1/patches/")


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(what: str, token: str) -> ApiError:
    message = (
        f"Incorrect {what} provided." if token else f"No {what} provided: send it as Authorization: Bearer <token>."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def host_of(header: str) -> str:
    """The host in a Host header, without its port and in small letters; empty if there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
