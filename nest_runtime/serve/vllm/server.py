"""``serve --engine vllm``: vLLM's own server in this process, with the plugin configured.

Reports its progress as the transformers server does (serve/events.py). vLLM binds the port before it loads, and
listens when the patch is on every rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

from nest_runtime.errors import EngineError, NestError
from nest_runtime.model.load import resolve_model
from nest_runtime.serve.app import Server, check_refs, guard_of
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.engine import Engine
from nest_runtime.serve.events import Emit, json_events, json_line, sentence, set_up_logging
from nest_runtime.serve.ports import bind, bind_admin, tls_context
from nest_runtime.serve.running import noted
from nest_runtime.serve.server import admin_listener, note_of, reread_on_hangup, warn
from nest_runtime.serve.vllm.arguments import engine_arguments, environment
from nest_runtime.serve.vllm.plugin import PLAN
from nest_runtime.store.store import Store


def serve(config: ServeConfig, *, on_event: Emit | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is running and return. Call it from a program's main thread.

    Args:
        config: how.
        on_event: gets every event instead of stdout or stderr.

    Raises:
        NestError: the server cannot start: no vLLM, the port is taken, the model or a patch cannot be had.
    """
    emit = on_event or (json_events(json_line) if config.json else sentence)
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed here", "install it beside nest-runtime as docs/guide/engines.md says")
    set_up_logging(config.json)
    tls_context(config)
    guard_of(config, Store())
    check_refs(config, Store())
    warn(config, emit)
    emit({"event": "loading", "model": config.model, "patch": config.patch})
    with contextlib.closing(bind(config)) as free:
        port = free.getsockname()[1]
    folder = resolve_model(config.model, trust_remote_code=config.trust_remote_code)[1]
    arguments = engine_arguments(config, folder, port)
    os.environ["VLLM_PLUGINS"] = environment(os.environ.get("VLLM_PLUGINS"))
    os.environ["FORWARDED_ALLOW_IPS"] = ""  # who asks is for http/clients.py to say, and not for uvicorn
    with bind_admin(config) as admin_port, _events_alone(emit, config.json) as say:
        _run(_Said(config, say, admin_port), arguments)
    emit({"event": "stopped"})


class _Said:
    """Tells when the server is ready, and keeps the admin listener open while it runs."""

    def __init__(self, config: ServeConfig, emit: Emit, admin_port: Any) -> None:
        self.error: NestError | None = None
        self._config = config
        self._emit = emit
        self._admin_port = admin_port
        self._stack = contextlib.AsyncExitStack()
        self._waiting: asyncio.Task[None] | None = None

    async def start(self, server: Server[Engine], state: Any) -> None:
        """Patches are on: say so as soon as the port is listened on."""
        if server.following is not None:
            server.following.on_event = self._emit
        if server.service.table.active.key is None:
            self._emit({"event": "warning", "message": "no patch is active: answers come from the bare base model"})
        reread_on_hangup(server, self._emit)
        await self._stack.enter_async_context(admin_listener(server, self._admin_port))
        self._waiting = asyncio.create_task(self._ready(server, state))

    async def stop(self) -> None:
        """The app ends."""
        if self._waiting is not None:
            self._waiting.cancel()
        await self._stack.aclose()

    async def _ready(self, server: Server[Engine], state: Any) -> None:
        while not getattr(getattr(state, "server", None), "started", False):
            await asyncio.sleep(0.02)
        host, number = state.server.servers[0].sockets[0].getsockname()[:2]
        patch = server.service.table.active
        url = f"{self._config.scheme}://{f'[{host}]' if ':' in host else host}:{number}"
        event = {"event": "ready", "url": url, "model": server.service.table.model_name}
        event |= {"patch": patch.label, "digest": patch.digest, "engine": "vllm"}
        if self._admin_port is not None:
            host, number = self._admin_port.getsockname()[:2]
            event["admin_url"] = f"{self._config.scheme}://{host}:{number}"
        self._stack.enter_context(noted(note_of(server, url, event.get("admin_url"))))
        self._emit(event)


def _run(said: _Said, arguments: list[str]) -> None:
    """The way of vLLM itself, from a command line to a server that has ended."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    PLAN.config, PLAN.on_start, PLAN.on_stop = said._config, said.start, said.stop
    try:
        cli_env_setup()
        args = make_arg_parser(FlexibleArgumentParser(prog="--engine-args")).parse_args(arguments)
        validate_parsed_serve_args(args)
        uvloop.run(run_server(args))
    except (NestError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise EngineError(
            f"vLLM ended: {type(error).__name__}: {error}".splitlines()[0], "its own log, above, says why"
        ) from error
    finally:
        PLAN.config = PLAN.on_start = PLAN.on_stop = None


@contextlib.contextmanager
def _events_alone(emit: Emit, wanted: bool) -> Iterator[Emit]:
    """An ``emit`` that writes on stdout, where nothing else is written as long as the context is open.

    vLLM and its processes log on stdout, where ``--json`` promises events alone: theirs goes to stderr.
    """
    if not wanted:
        yield emit
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def only(event: dict[str, Any]) -> None:
        """Write an event to the real stdout; everything else that is printed goes to stderr."""
        sys.stdout.flush()  # what others left there goes where theirs belongs
        os.dup2(real, 1)
        try:
            emit(event)
            sys.stdout.flush()
        finally:
            os.dup2(2, 1)

    try:
        yield only
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
