"""Who may ask one listener for what: API keys open /v1, admin tokens the admin API; what is refused is audited."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from nest_runtime.addresses import Network
from nest_runtime.errors import StoreError
from nest_runtime.escape import visible
from nest_runtime.serve.http.clients import client_of
from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.tokens import AccessTokens

DENIAL_SECONDS, DENIAL_KINDS = 10.0, 32  # at most so many audit lines in that time: strangers must not fill the disk
OTHERS = ("others", "others")

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
        if is_admin_path(path):
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


def _call(method: str, path: str) -> str:
    """A method and a path of bounded length, as a line of the audit log has them."""
    return f"{visible(method, 16)} {visible(path, 200)}"


def is_admin_path(path: str) -> bool:
    """Whether a path is of the admin API."""
    return path == "/v1/audit" or path == "/v1/patches" or path.startswith("/v1/patches/")


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(what: str, token: str) -> ApiError:
    message = (
        f"Incorrect {what} provided." if token else f"No {what} provided: send it as Authorization: Bearer <token>."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
