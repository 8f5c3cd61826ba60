"""The connections of one listener: how many there may be, how long one may keep us waiting, and how one is cut off.

uvicorn's own protocol (h11) with what it lacks. An idle connection gives way to a new one, the longest idle first:
connections cost a stranger nothing, and must not keep others out. If all are in use, a few more are accepted for
operators alone (access.py). Nothing here knows of routes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE, H11Protocol

KEPT = 16  # connections beyond the limit, where every other is at work: they are for operators
ADMIN = 64  # connections of a listener that is the admin API's own
MOST = 4096  # connections where descriptors are plenty
UNSENT_BYTES = 4096  # that the system may hold for a client who does not take them; not all systems can be told so
MAX_FIELDS = 100  # of a request's head
FREE_PIECES = 1024  # of a request's body, and one more
PIECE_BYTES = 64  # for as many bytes: what a piece costs must not depend on how little is in it
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, and send nothing more

log = logging.getLogger("nest_runtime.serve.connections")


def descriptors() -> int | None:
    """How many files and connections the system lets this process open; None if it does not say."""
    if os.name != "posix":
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def clients_share(most: int | None) -> int:
    """How many of ``most`` descriptors clients' connections may have; the rest is for operators, files and new ones."""
    return MOST if most is None else max(8, min(MOST, most - max(256, most // 4) if most >= 512 else most // 4))


def backlog(most: int | None) -> int:
    """How many connections the system may hold for a listener; as many may come in at once, and want descriptors."""
    return 128 if most is None else max(16, min(128, most // 8))


def _hold_back(transport: Any) -> None:
    """Let a transport take nothing that it cannot send: what is not sent yet stays where it can be taken back."""
    wire = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    if wire is None:
        transport.set_write_buffer_limits(high=0)
        return
    transport.set_write_buffer_limits(high=1, low=0)  # asyncio's TLS pauses at `high`, and not above it
    wire.set_write_buffer_limits(high=0)


@dataclass
class Crowd:
    """The connections of one listener.

    Attributes:
        limit: how many there may be.
        header_seconds: for a request's head to come whole.
        idle_seconds: that a connection may be silent between requests.
        stall_seconds: that a client may leave an answer untaken.
        turned_away: connections that were closed to keep to the limit.
        slow: connections that were closed because their client was.
    """

    limit: int
    header_seconds: float
    idle_seconds: float
    stall_seconds: float
    turned_away: int = field(default=0, init=False)
    slow: int = field(default=0, init=False)
    _open: set[Connection | _Handshake] = field(default_factory=set, init=False)
    _silent: dict[Connection | _Handshake, None] = field(
        default_factory=dict, init=False
    )  # wait for a request; longest first
    _sending: dict[Connection | _Handshake, None] = field(default_factory=dict, init=False)  # wait for a request's body

    def protocol(self, tls: ssl.SSLContext | None = None) -> Callable[..., Connection | _Handshake]:
        """What makes the protocol of a new connection, for uvicorn; with TLS, if there is a context for that."""
        return partial(Connection, self) if tls is None else partial(_Handshake, self, tls)

    @property
    def open(self) -> int:
        """Connections that are open."""
        return len(self._open)

    def enter(self, connection: Connection | _Handshake) -> None:
        """Take a new connection in, at another's cost where need be, or turn it away."""
        if len(self._open) >= self.limit:
            waiting = self._silent or self._sending
            if waiting:
                self._turn_away(next(iter(waiting)))
            elif len(self._open) >= self.limit + KEPT:
                self._turn_away(connection)
                return
            else:
                connection.beyond = True
        self._open.add(connection)
        self._silent[connection] = None

    def place(self, connection: Connection, state: Any) -> None:
        """Note what a connection waits for, by what its client has sent (an h11 state)."""
        if connection not in self._open:
            return
        for waiting, wanted in ((self._silent, state is h11.IDLE), (self._sending, state is h11.SEND_BODY)):
            if not wanted:
                waiting.pop(connection, None)
            else:
                waiting.setdefault(connection)

    def leave(self, connection: Connection | _Handshake) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._silent.pop(connection, None)
        self._sending.pop(connection, None)

    def _turn_away(self, connection: Connection | _Handshake) -> None:
        self.turned_away += 1
        self.leave(connection)
        log.warning("all %d connections are taken: one that waits for its client is closed for a new one", self.limit)
        connection.transport.abort()


class _Bounded(h11.Connection):
    """Reads requests like its base, and refuses heads of very many fields and bodies in very many pieces."""

    def next_event(self) -> Any:
        """What was received next. Raises h11.RemoteProtocolError, for these also."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
            if len(event.headers) > MAX_FIELDS:
                raise h11.RemoteProtocolError(f"more than {MAX_FIELDS} header fields", 431)
        elif isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > FREE_PIECES + self._bytes // PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


class _Handshake(SSLProtocol):
    """The TLS of one connection. It has a place from its first moment on, and no more time than a request's head.

    asyncio would say nothing of a connection before its handshake is done, and wait a minute for that.
    """

    def __init__(self, crowd: Crowd, context: ssl.SSLContext, **settings: Any) -> None:
        within, seconds = Connection(crowd, **settings), crowd.header_seconds
        super().__init__(
            within.loop,
            within,
            context,
            None,  # type: ignore[arg-type]  # nobody waits for the handshake
            server_side=True,
            ssl_handshake_timeout=seconds,  # type: ignore[arg-type]  # any number of seconds
            ssl_shutdown_timeout=seconds,
        )
        self.beyond = False
        self.transport: Any = None
        self._crowd = crowd
        within.handshake = self

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._crowd.enter(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._crowd.leave(self)
        super().connection_lost(exc)


class Connection(H11Protocol):
    """One connection; the app finds it in the request's state.

    Args:
        crowd: the listener's connections.
        settings: uvicorn's.

    Attributes:
        beyond: it was taken in beyond the limit.
        handshake: what its TLS began with, if it has any.
    """

    def __init__(self, crowd: Crowd, **settings: Any) -> None:
        super().__init__(**settings)
        self.conn = _Bounded(h11.SERVER, DEFAULT_MAX_INCOMPLETE_EVENT_SIZE)
        self.beyond = False
        self.handshake: _Handshake | None = None
        self.timeout_keep_alive = crowd.idle_seconds  # type: ignore[assignment]  # uvicorn hands it to call_later
        self.app_state = {**self.app_state, "connection": self}
        self._crowd = crowd
        self._head: asyncio.TimerHandle | None = None  # runs while a request's head is awaited
        self._stall: asyncio.TimerHandle | None = None  # runs while the client takes nothing

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio: count the connection, and start the clock for its first request."""
        super().connection_made(transport)
        _hold_back(transport)
        port = transport.get_extra_info("socket")
        if port is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with suppress(OSError):  # no TCP
                port.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if self.handshake is not None:
            self._crowd.leave(self.handshake)
        self._crowd.enter(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio: stop the clocks, and count the connection no more."""
        self._crowd.leave(self)
        self._stop_head()
        self._stop_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio: read the bytes, and restart the clock for the head."""
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request with 400, or cut the connection if an answer was already begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the request was answered before its body was read: there is nothing more to say
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Called by uvicorn: start the clock for the next request."""
        super().on_response_complete()
        self._watch(answered=True)

    def pause_writing(self) -> None:
        """Called by asyncio when the client reads too slowly: start the clock that cuts it off."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._crowd.stall_seconds, self._too_slow)

    def resume_writing(self) -> None:
        """Called by asyncio when the client reads again: stop that clock."""
        super().resume_writing()
        self._stop_stall()

    @property
    def spare(self) -> bool:
        """Whether this is one of the connections beyond the limit, which are for operators and probes."""
        return self.beyond and self._crowd.open > self._crowd.limit

    async def writable(self) -> None:
        """Wait until the client has taken what it was sent, or has left."""
        if self.flow.write_paused:
            await self.flow.drain()

    def cut(self) -> None:
        """Close at once if the client has not taken all it was sent: what waits for it is thrown away."""
        held = 0 if self.handshake is None else self.handshake.transport.get_write_buffer_size()
        if not (self.flow.write_paused or held) or self.transport.is_closing():
            return
        port = self.transport.get_extra_info("socket")
        with suppress(OSError):
            port.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _watch(self, *, answered: bool = False) -> None:
        """Give a request's head its time from its first byte on, or from the connection's beginning."""
        state = self.conn.their_state
        self._crowd.place(self, state)
        if state is not h11.IDLE or answered:  # after an answer, idle_seconds count
            self._stop_head()
        elif self._head is None:
            self._head = self.loop.call_later(self._crowd.header_seconds, self._too_slow)

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _too_slow(self) -> None:
        self._crowd.slow += 1
        self.transport.abort()
