"""Around every request: who may ask, a request id, the patch headers, the body's size, metrics and one log line.

A pure ASGI layer outside of FastAPI, so that errors of any kind pass through it as well. Prompts and
answers are never logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nest_runtime.addresses import Network
from nest_runtime.errors import StoreError
from nest_runtime.escape import visible
from nest_runtime.serve.audit import AuditLog
from nest_runtime.serve.clients import client_of
from nest_runtime.serve.config import Limits, Tokens
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.patches import PatchTable
from nest_runtime.serve.problems import ApiError
from nest_runtime.serve.served import Served

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/patches", "/v1/audit")
PROBES = ("/health", "/ready", "/metrics")
DENIAL_SECONDS = 10.0  # at most one audit line per so many seconds: strangers must not fill the disk
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

log = logging.getLogger("nest_runtime.serve.access")


@dataclass
class Secrets:
    """Bearer tokens in force; replaced when the files are read again.

    Attributes:
        api_keys: None lets anyone ask.
        admin: None switches the admin API off.
    """

    api_keys: Tokens | None
    admin: Tokens | None


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
    _denials: int = field(default=0, init=False)
    _denied_at: float = field(default=-DENIAL_SECONDS, init=False)

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
        self._denials += 1
        if time.monotonic() - self._denied_at < DENIAL_SECONDS:
            return
        event = {"what": "denied", "who": host, "path": _call(method, path), "count": self._denials, "done": False}
        self._denials, self._denied_at = 0, time.monotonic()
        await self._record(event)

    async def _record(self, event: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(self.audit.record, event)
        except StoreError as error:
            log.error("an admin call (%s) could not be audited: %s", event["path"], error)


class Frame:
    """The ASGI app around the API.

    Args:
        app: the API.
        table: for the patch headers; a response that no patch was chosen for names the active one.
        access: who may ask.
        metrics: counts requests.
        limits: larger bodies get 413, and those that do not come to an end in time 408.
    """

    def __init__(self, app: ASGIApp, table: PatchTable, access: Access, metrics: Metrics, limits: Limits) -> None:
        self._app = app
        self._table = table
        self._access = access
        self._metrics = metrics
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started, status = time.perf_counter(), 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await self._access.note(scope, status)
                self._add_headers(MutableHeaders(raw=message["headers"]), state)
            await send(message)

        try:
            refusal = await self._access.check(scope) or self._too_large(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, framed)
            else:
                await self._app(scope, self._counted(receive), framed)
        finally:
            self._note(scope, state, status, time.perf_counter() - started)

    def _add_headers(self, headers: MutableHeaders, state: dict[str, Any]) -> None:
        pin: Served = state.get("pin") or self._table.active
        state["pin"] = pin
        headers["x-nest-patch"] = quote(pin.label, safe="@+ ")
        headers["x-nest-patch-digest"] = pin.digest
        headers["x-request-id"] = state["request_id"]

    def _too_large(self, scope: Scope) -> ApiError | None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) <= self._limits.max_body_bytes:
            return None
        return ApiError(
            413, f"The body has {length} bytes; at most {self._limits.max_body_bytes} are taken.", code="body_too_large"
        )

    def _counted(self, receive: Receive) -> Receive:
        """Refuses bodies that do not say how long they are and grow too long, and those that never end."""
        size, ended = 0, False
        most, seconds = self._limits.max_body_bytes, self._limits.request_seconds
        until = asyncio.get_running_loop().time() + seconds

        async def counted() -> Message:
            nonlocal size, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not come in {seconds:g} s.") from None
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > most:
                raise HTTPException(413, f"The body is too large; at most {most} bytes are taken.")
            return message

        return counted

    def _note(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        path = scope["path"]
        endpoint = next((e for e in (*ENDPOINTS, *PROBES) if path == e or path.startswith(f"{e}/")), "other")
        pin: Served = state.get("pin") or self._table.active
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
        log.log(level, " ".join(f"{key}={value}" for key, value in fields.items()), extra={"fields": fields})


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
