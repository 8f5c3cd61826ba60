"""Runs the hub in a thread: one port, reached as 127.0.0.1 for the Hub and as localhost for the file host."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from tests.support.hub_server.faults import Fault, Faults
from tests.support.hub_server.routes import Routes
from tests.support.hub_server.state import Repo, State


class HubServer:
    """A running hub. Use it as a context manager.

    Args:
        xet_folder: where hf_xet keeps its store when ``state.mode`` is "xet"; this process only.

    Attributes:
        state: repositories and tokens.
        url: the endpoint, for ``HfApi(endpoint=…)`` and ``HF_ENDPOINT``.
    """

    def __init__(self, xet_folder: Path | None = None) -> None:
        self.state = State()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.file_host = f"http://localhost:{port}"
        self.faults = Faults(Routes(self.state, self.url, self.file_host, xet_folder))
        config = uvicorn.Config(self.faults, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        for _ in range(1000):
            if self._server.started:
                return self
            time.sleep(0.01)
        raise RuntimeError("the test hub did not start")

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    def fault(self, kind: str, path: str = "", **fields: Any) -> Fault:
        """Break matching requests from now on; see Fault."""
        fault = Fault(kind, path, **fields)
        self.faults.active.append(fault)
        return fault

    def heal(self) -> None:
        """No more faults."""
        self.faults.active.clear()

    def repo(self, repo_id: str) -> Repo:
        return self.state.repos[repo_id]

    @property
    def requests(self) -> list[str]:
        """``METHOD path`` of every request so far."""
        return [f"{method} {path}" for method, path, _, _ in self.faults.log]

    def forget_requests(self) -> None:
        self.faults.log.clear()
