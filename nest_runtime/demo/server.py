"""Listens: the page behind uvicorn on a socket of its own, with a fence around it (fence.py).

A content security policy lets the browser load nothing from elsewhere, even if a dependency asked for it.
"""

from __future__ import annotations

import errno
import hmac
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.addresses import is_loopback
from nest_runtime.demo.fence import Fence, Guests
from nest_runtime.errors import UsageError, port_taken
from nest_runtime.secret_files import secret_lines

if TYPE_CHECKING:
    from fastapi import FastAPI

    from nest_runtime.demo.state import DemoState


@dataclass(frozen=True)
class Listen:
    """Where and for whom.

    Attributes:
        host, port: where; port 0 takes a free one.
        logins: passwords by user; empty lets everybody in.
        framed: other sites may show the page in a frame, as Spaces do.
        key: what opens the page beside a login, as part of the link that is printed; empty for none.
        root_path: what a proxy puts before every path, such as ``/demo``.
        trusted: names by which a proxy calls it.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    logins: dict[str, str] = field(default_factory=dict)
    framed: bool = False
    key: str = ""
    root_path: str = ""
    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise UsageError(
                f"the root path is {self.root_path!r}; expected one such as /demo",
                "begin it with a slash, and end without",
            )

    @property
    def guests(self) -> Guests:
        """Who may come in."""
        return Guests(self.loopback, self.trusted, self.key, self.root_path, self.framed)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


def read_logins(path: Path) -> dict[str, str]:
    """Passwords by user, from lines ``user:password``; empty lines and ``#`` comments do not count.

    Raises:
        UsageError: the file cannot be read, others may read it, or it has other lines.
    """
    found = {}
    for number, line in secret_lines(path, "login file"):
        user, colon, password = line.partition(":")
        if not (user.strip() and colon and password):
            raise UsageError(f"{path}:{number}: expected user:password", "write one login a line")
        found[user.strip()] = password
    if not found:
        raise UsageError(f"the login file {path} has no logins", "write user:password, one a line")
    return found


def bind(listen: Listen) -> socket.socket:
    """A socket that listens. Raises EngineError if the port is taken, UsageError if there is no such address."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    port = socket.socket(family, socket.SOCK_STREAM)
    try:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind((listen.host, listen.port))
        port.listen()  # two may bind a port, only one may listen; who comes too early waits for the model
        return port
    except OSError as error:
        port.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(listen.host, listen.port) from error
        raise UsageError(
            f"cannot listen on {listen.host}:{listen.port}: {error}", "give another --host or --port"
        ) from error


def serve(state: DemoState, listen: Listen, port: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        state: what it shows.
        listen: for whom.
        port: from ``bind``; closed at the end.
        on_ready: called with the URL once it answers.
    """
    import uvicorn

    host, number = port.getsockname()[:2]
    url = f"http://{'[' + host + ']' if ':' in host else host}:{number}"
    config = uvicorn.Config(application(state, listen), log_level="warning", timeout_graceful_shutdown=2)
    server = _server(config, lambda: on_ready(url))
    try:
        server.run(sockets=[port])
    finally:
        port.close()


def application(state: DemoState, listen: Listen) -> FastAPI:
    """The page as an ASGI application."""
    _stay_home()
    import gradio as gr
    from fastapi import FastAPI

    from nest_runtime.demo.app import CSS, build, script, theme

    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    outer.add_middleware(Fence, guests=listen.guests)
    return gr.mount_gradio_app(
        outer,
        build(state),
        path="/",
        auth=_door(listen.logins) if listen.logins else None,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css_paths=[CSS],
        head=script(),
        max_file_size=1,  # nothing is uploaded here
        root_path=listen.root_path or None,
    )


def _stay_home() -> None:
    """Switch off Gradio's telemetry. It is read when Gradio is imported, so call this first."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_CHECK_VERSION", "False")


def _door(logins: dict[str, str]) -> Callable[[str, str], bool]:
    """Whether a user has given the right password; an unknown user takes as long to refuse."""

    def opens(user: str, password: str) -> bool:
        expected = logins.get(user)
        same = hmac.compare_digest((expected or "").encode(), password.encode())
        return expected is not None and same

    return opens


def _server(config: Any, ready: Callable[[], None]) -> Any:
    """Uvicorn's server, which says when it answers."""
    import uvicorn

    class DemoServer(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                ready()

    return DemoServer(config)
