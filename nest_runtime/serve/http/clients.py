"""The sender's address: the peer of the connection, or what a trusted proxy says.

A client can write any ``X-Forwarded-For``. It counts only from a trusted proxy, read from its end, where that proxy
wrote; and the log says that a proxy said it.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

from nest_runtime.addresses import Network, is_address, is_in
from nest_runtime.escape import visible

MAX_FORWARDED = 1024  # characters at the header's end that are looked at


def client_of(scope: Scope, proxies: Sequence[Network]) -> str:
    """Who asks, in a few words of bounded length: ``10.0.0.9``, or ``192.0.2.1 by proxy 10.0.0.9``."""
    peer = visible(scope["client"][0], 64) if scope.get("client") else "unknown"
    if not is_in(peer, proxies):
        return peer
    said = ",".join(Headers(scope=scope).getlist("x-forwarded-for"))[-MAX_FORWARDED:]
    for hop in reversed([part.strip() for part in said.split(",")]):
        if not is_in(hop, proxies):
            return f"{hop if is_address(hop) else 'unknown'} by proxy {peer}"
    return f"unknown by proxy {peer}"
