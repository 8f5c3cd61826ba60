"""Whom the page answers: no other sites, no names pointed at this machine, and for changes only its operator.

A third-party page in the visitor's browser can send requests to any address, and can give its own name the address of
this machine (DNS rebinding). So the Host must be an address or a listed name, and the Origin must be the page's own.
If the page has buttons that change something, the browser must have been opened by the printed link. Pure ASGI:
streams pass.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from nest_runtime.addresses import is_address, is_loopback

COOKIE = "nest_demo"
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:(?P<port>[0-9]{1,5}))?")
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; object-src 'none'"
)


@dataclass(frozen=True)
class Guests:
    """Who may use the page.

    Attributes:
        loopback: it listens on this machine only: the Host must be this machine's, or a trusted one.
        trusted: names by which a proxy calls it; if there are any, no other name is answered.
        key: the secret in the link that opens the page; empty lets everybody in.
        root_path: what a proxy puts before every path, such as ``/demo``.
        framed: other sites may show the page in a frame, and send requests from there.
    """

    loopback: bool = True
    trusted: tuple[str, ...] = ()
    key: str = ""
    root_path: str = ""
    framed: bool = False

    def knows(self, host: str) -> bool:
        """Whether a Host header is one that the page goes by."""
        name = _hostname(host)
        if not name:
            return False
        if name in {trusted.lower() for trusted in self.trusted} or is_loopback(name):
            return True
        return not self.loopback and (not self.trusted or is_address(name))

    def is_own(self, origin: str, host: str) -> bool:
        """Whether an Origin is the page itself. A proxy may leave the port out of the Host; then names are compared."""
        if not _has_port(host) and _hostname(host) in {name.lower() for name in self.trusted}:
            return _hostname(_netloc(origin)) == _hostname(host)
        return _netloc(origin).lower() == host.lower()

    def opens(self, given: str) -> bool:
        """Whether a token is the key; takes the same time wherever they differ."""
        return hmac.compare_digest(self.key.encode(), given.encode("utf-8", "surrogatepass"))


class Fence:
    """The ASGI app around the page.

    Args:
        app: the page.
        guests: who may come in.
    """

    def __init__(self, app: Any, guests: Guests) -> None:
        self.app, self.guests = app, guests
        framing = "" if guests.framed else "; frame-ancestors 'self'"
        self.headers = [
            (b"content-security-policy", (_POLICY + framing).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        method = scope.get("method", "GET")  # a websocket has none
        if not self._welcome(scope["type"], method, given):
            await _answer(scope, send, 403, "this request comes from another site\n")
            return
        if self.guests.key and not self._has_key(given):
            await self._at_the_door(scope, send, method)
            return

        async def more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        await self.app(scope, receive, more)

    def _welcome(self, kind: str, method: str, given: dict[str, str]) -> bool:
        host, origin = given.get("host", ""), given.get("origin")
        if not self.guests.knows(host):
            return False  # a name of somebody else's that was made to point here
        safe = kind == "http" and method in ("GET", "HEAD", "OPTIONS")
        return safe or origin is None or self.guests.framed or self.guests.is_own(origin, host)

    def _has_key(self, given: dict[str, str]) -> bool:
        try:
            cookie = SimpleCookie(given.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        scheme, _, token = given.get("authorization", "").partition(" ")
        tokens = [cookie.value if cookie is not None else "", token if scheme.lower() == "bearer" else ""]
        return any(self.guests.opens(item) for item in tokens)

    async def _at_the_door(self, scope: Any, send: Any, method: str) -> None:
        """Turn the link's token into a cookie and remove it from the address; others learn where to find it."""
        asked = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in asked if name == "token"]
        if scope["type"] != "http" or method != "GET" or not any(self.guests.opens(item) for item in tokens):
            await _answer(scope, send, 401, "open the link that `nest-runtime demo` printed: it holds the token\n")
            return
        rest = urlencode([pair for pair in asked if pair[0] != "token"])
        root = self.guests.root_path
        place = quote(root + scope["path"].removeprefix(root)) + (f"?{rest}" if rest else "")
        cookie = f"{COOKIE}={self.guests.key}; Path={root or '/'}; HttpOnly; SameSite=Strict"
        place = "/" + place.lstrip("/")  # never another site's address
        headers = [(b"location", place.encode()), (b"set-cookie", cookie.encode()), *self.headers]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def _answer(scope: Any, send: Any, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _netloc(origin: str) -> str:
    scheme, colon, rest = origin.partition("://")
    return rest if colon and scheme in ("http", "https") else ""


def _hostname(host: str) -> str:
    """The name or address in a Host; empty for what is none, which nobody is called."""
    found = _HOST.fullmatch(host)
    return (found["address"] or found["name"]).lower().rstrip(".") if found else ""


def _has_port(host: str) -> bool:
    found = _HOST.fullmatch(host)
    return found is not None and found["port"] is not None
