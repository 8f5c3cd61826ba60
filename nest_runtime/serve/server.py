"""``serve``: bind the port, load, answer until a signal comes, drain, and end.

Reports its progress as events (events.py). Ports are bound first, so that a second server fails at once and not after
loading a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp

from nest_runtime.addresses import is_loopback
from nest_runtime.errors import NestError
from nest_runtime.serve.app import Server, admin_app, asgi_app, build, secrets_of
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.engine import Engine
from nest_runtime.serve.events import Emit, Event, json_events, json_line, sentence, set_up_logging
from nest_runtime.serve.http.connections import Crowd, backlog, descriptors
from nest_runtime.serve.ports import bind, bind_admin, listening_on, tls_context, url_of
from nest_runtime.serve.running import Note, noted
from nest_runtime.serve.tokens import MAKE_ONE, SHORTEST, readable_by_others
from nest_runtime.serve.transformers.engine import TransformersEngine


def serve(config: ServeConfig, *, on_event: Emit | None = None, until: threading.Event | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is running and return.

    Args:
        config: how.
        on_event: gets every event instead of stdout or stderr; for programs that embed the server.
        until: ends the server like a signal when it is set; for programs that run it in a thread.

    Raises:
        NestError: the server cannot start: the port is taken, the model or a patch cannot be had.
    """
    emit = on_event or (json_events(json_line) if config.json else sentence)
    if until is None:  # the process is the server's own
        emit = _settled(emit)
    set_up_logging(config.json)
    tls_context(config)
    with contextlib.closing(bind(config)) as port, bind_admin(config) as admin_port:
        warn(config, emit)
        emit({"event": "loading", "model": config.model, "patch": config.patch})
        asyncio.run(run(build(config), port, emit, until, admin_port))
    emit({"event": "stopped"})


def _settled(emit: Emit) -> Emit:
    """``emit``, but before ``ready`` all that was imported and loaded is put out of the garbage collector's sight.

    It stays until the end anyway, and a full collection through it stops every answer for a tenth of a second or more.
    """

    def settled(event: Event) -> None:
        if event["event"] == "ready":
            gc.collect()
            gc.freeze()
        emit(event)

    return settled


class _Uvicorn(uvicorn.Server):
    """uvicorn with our own signals: after draining, SIGINT and SIGTERM end the process with status 0.

    Args:
        config: uvicorn's.
        on_started: called when it listens.
        on_exit: called at the first signal; without it, signals are left alone.
    """

    def __init__(
        self, config: uvicorn.Config, on_started: Callable[[], None], on_exit: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._on_exit = on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        if self._on_exit is None:
            yield
            return
        try:
            for number in signals:
                loop.add_signal_handler(number, self._leave, number)
        except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or a system without them
            yield
            return
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def leave_when(self, until: threading.Event) -> None:
        """End as at a signal once the event is set."""
        while not until.is_set():
            await asyncio.sleep(0.05)
        self._leave(None)

    def _leave(self, number: signal.Signals | None) -> None:
        self.force_exit = self.should_exit and number == signal.SIGINT  # a second Ctrl-C does not wait
        self.should_exit = True
        if self._on_exit is not None:
            self._on_exit()


async def run(
    server: Server[TransformersEngine],
    port: socket.socket,
    emit: Emit,
    until: threading.Event | None = None,
    admin_port: socket.socket | None = None,
) -> None:
    """Start a built server on bound sockets, and answer until a signal comes or ``until`` is set.

    Args:
        server: as ``app.build`` gives it.
        port: bound, not listening yet.
        emit: gets the events.
        until: ends it like a signal when set.
        admin_port: the admin API's own socket, or None.

    Raises:
        EngineError: the engine does not start, or another server listens on the port.
    """
    engine, table = server.service.engine, server.service.table
    notes = contextlib.ExitStack()

    def ready() -> None:
        """Say where the server is, and leave a note for commands on this machine."""
        patch, url = table.active, url_of(port, server.config)
        event = {"event": "ready", "url": url, "model": table.model_name}
        event |= {"patch": patch.label, "digest": patch.digest}
        if admin_port is not None:
            event["admin_url"] = url_of(admin_port, server.config)
        notes.enter_context(noted(note_of(server, url, event.get("admin_url"))))
        emit(event)

    def leaving() -> None:
        if not engine.draining:
            emit({"event": "stopping", "live": engine.live})
        engine.draining = True

    if server.following is not None:
        server.following.on_event = emit
    try:
        if (await server.start()).key is None:
            emit({"event": "warning", "message": "no patch is active: answers come from the bare base model"})
        reread_on_hangup(server, emit)
        web = _Uvicorn(_uvicorn_config(server, asgi_app(server), server.crowd), ready, leaving)
        watch = None if until is None else asyncio.create_task(web.leave_when(until))
        try:
            async with admin_listener(server, admin_port):
                with listening_on(server.config.host, server.config.port):
                    await web.serve(sockets=[port])
        finally:
            if watch is not None:
                watch.cancel()
    finally:
        notes.close()
        await engine.stop()


def note_of(server: Server[Engine], url: str, admin_url: str | None) -> Note:
    """What commands on this machine are to know of a running server."""
    config, table = server.config, server.service.table
    admin = admin_url or (None if config.admin_token_file is None else url)
    return Note(url, admin, os.getpid(), table.model_name, table.model_hash, config.patch is None)


@contextlib.asynccontextmanager
async def admin_listener(server: Server[Engine], port: socket.socket | None) -> AsyncIterator[None]:
    """The admin API on a socket, an event loop and connections of its own: clients cannot hold it up.

    It runs from before clients are answered until after the last one was.
    """
    address = server.config.admin_address
    if port is None or address is None:
        yield
        return
    loop, started = asyncio.get_running_loop(), asyncio.Event()

    def ready() -> None:
        loop.call_soon_threadsafe(started.set)

    web = _Uvicorn(
        _uvicorn_config(server, admin_app(server), server.admin_crowd, lifespan="off"),
        ready,
        None,
    )
    ended: Future[None] = Future()
    threading.Thread(target=_run_beside, args=(web, port, ended), name="nest-admin", daemon=True).start()
    over = asyncio.wrap_future(ended)
    try:
        waiting = asyncio.ensure_future(started.wait())
        both: set[asyncio.Future[Any]] = {over, waiting}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if over.done():
            with listening_on(*address):
                await over  # raises what kept it from starting
        yield
    finally:
        web.should_exit = True
        await asyncio.gather(over, return_exceptions=True)


def _run_beside(web: _Uvicorn, port: socket.socket, ended: Future[None]) -> None:
    """Run a listener on an event loop of this thread's own, and say how it ended."""
    try:
        asyncio.run(web.serve(sockets=[port]))
    except BaseException as error:  # handed to the loop that waits for it, whatever it is
        ended.set_exception(error)
    else:
        ended.set_result(None)


def _uvicorn_config(
    server: Server[Engine], app: ASGIApp, crowd: Crowd, lifespan: Literal["on", "off"] = "on"
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=crowd.protocol(tls_context(server.config)),  # type: ignore[arg-type]  # a factory is as good as a class
        ws="none",
        backlog=backlog(descriptors()),
        log_config=None,
        access_log=False,
        proxy_headers=False,  # who asks is read from the connection, and from proxies that were named (http/clients.py)
        lifespan=lifespan,
        timeout_graceful_shutdown=max(1, round(server.config.limits.drain_seconds)),
        server_header=False,
    )


def warn(config: ServeConfig, emit: Emit) -> None:
    """Warn about settings that open the server to strangers."""

    def say(message: str) -> None:
        emit({"event": "warning", "message": message})

    if config.api_keys:
        say(
            "keys given with --api-key or in NEST_SERVE_API_KEY can be seen by others on this machine: "
            "put them into --api-key-file"
        )
    if not config.loopback and not config.keyed:
        say(
            f"ANYONE who reaches {config.host}:{config.port} may ask, and nobody is asked who they are: "
            "give --api-key-file, or listen on 127.0.0.1"
        )
    admin_host = config.admin_address[0] if config.admin_address else config.host
    if config.admin_token_file is not None and not is_loopback(admin_host) and config.ssl_certfile is None:
        say(
            f"the admin API can be reached from other machines, at {admin_host}, and tokens travel unencrypted: "
            "give --admin-port, which listens on 127.0.0.1, or --ssl-certfile"
        )
    if config.api_key_file is not None and config.api_key_file.exists() and readable_by_others(config.api_key_file):
        say(f"{config.api_key_file} can be read by other users: chmod 600 {config.api_key_file}")
    for what, tokens in zip(("an API key", "an admin token"), secrets_of(config), strict=True):
        if tokens is not None and tokens.shortest < SHORTEST:
            say(f"{what} of length {tokens.shortest} can be guessed: {MAKE_ONE} prints a longer one")
    if config.log_prompts:
        say("what clients ask is written into the log: --log-prompts")


def reread_on_hangup(server: Server[Engine], emit: Emit) -> None:
    """At SIGHUP, read keys, tokens and the trust policy again."""
    loop, running = asyncio.get_running_loop(), set()

    async def again() -> None:
        """Read everything again, and say what came of it."""
        try:
            news = await server.reread()
        except NestError as error:
            emit({"event": "warning", "message": f"tokens and trust stay as they were: {error}"})
            return
        emit({"event": "reloaded"})
        for message in news:
            emit({"event": "warning", "message": message})

    def hangup() -> None:
        task = loop.create_task(again())
        running.add(task)  # the loop itself holds tasks by weak references only
        task.add_done_callback(running.discard)

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):  # no such signal here
        loop.add_signal_handler(signal.SIGHUP, hangup)
