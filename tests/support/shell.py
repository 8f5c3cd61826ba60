"""A real bash in a folder, in which the lines of a document are run one after the other, as a reader would.

What a line leaves behind stays: the folder, variables, an environment that was switched on. A line that starts
``nest-runtime serve`` goes on in the background, in the place of the server before it. A line that clones the
project's repository gets this one. What a line installs, and the environment it makes for that, is left out: the
tests' own environment takes their place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from nest_runtime.install import SOURCE

ROOT = Path(__file__).parents[2]
SECONDS = 1200.0  # for one command; the slowest trains, on a machine with other work too
PORT = "8000"  # of the documents
LEFT_OUT = ("python3 -m venv ", ". .venv/bin/activate", "pip install ", "pytest")  # parts of lines


def here(line: str) -> str:
    """What is left of a line without what it installs."""
    return " && ".join(part for part in line.split(" && ") if not part.startswith(LEFT_OUT))


class Shell:
    """A bash, and the one server that was started from it.

    Attributes:
        port: where its servers listen, in the place of the documents' 8000.
        url: of the server.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._notes = folder / ".shell"
        self._notes.mkdir(parents=True)
        self._log = self._notes / "serve.log"
        self._server = 0  # process id
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            cwd=folder,
            start_new_session=True,
            text=True,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "NEST_HOME": str(folder / "home"),
                "NEST_SERVE_PORT": str(self.port),
                "HF_HUB_OFFLINE": "1",
                "COLUMNS": "80",
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": f"url.{ROOT}.insteadOf",
                "GIT_CONFIG_VALUE_0": SOURCE,
                **environment,
            },
        )

    def run(self, command: str) -> str:
        """Do what a line says; it must end well. Gives its stdout.

        A server is left running once it is ready, and the one before it is ended first.
        """
        before, serves, options = command.rpartition("nest-runtime serve ")
        if not serves:
            return self._run(command.replace(f":{PORT}", f":{self.port}"))
        first, joined, variables = before.rpartition("&& ")
        printed = self._run(first) if joined else ""
        self.stop()
        start = f"{variables}nest-runtime serve {options}"
        self._server = int(self._run(f"{start} >>'{self._log}' 2>&1 &\necho $!"))
        self._wait(lambda: self.ready() is not None, f"not ready: $ {start}")
        return printed

    def ready(self) -> dict[str, object] | None:
        """What /ready says, or None while nobody answers."""
        with contextlib.suppress(httpx.TransportError):
            return dict(httpx.get(f"{self.url}/ready", timeout=60).json())
        assert not self._server or alive(self._server), self._log.read_text()
        return None

    def patch(self) -> object:
        """The active patch."""
        found = self.ready()
        return found and found["patch"]

    def stop(self) -> None:
        """SIGTERM, as the documents say; the server must end well."""
        if self._server:
            self._run(f"kill {self._server} && wait {self._server}")
            self._server = 0

    def close(self) -> None:
        """End bash and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.communicate()

    def _run(self, command: str) -> str:
        """One command in this bash, whose braces keep what it sets."""
        printed, said, status = (self._notes / name for name in ("printed", "said", "status"))
        status.unlink(missing_ok=True)
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{{ {command}\n}} >'{printed}' 2>'{said}' </dev/null; echo $? >'{status}'\n")
        self._bash.stdin.flush()
        self._wait(lambda: status.is_file() and status.read_text().endswith("\n"), f"$ {command}")
        text = printed.read_text(encoding="utf-8")
        assert status.read_text() == "0\n", f"$ {command}\n{text}{said.read_text(encoding='utf-8')}"
        return text

    def _wait(self, happened: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < until, what
            assert self._bash.poll() is None, f"bash ended: {what}"
            time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process runs."""
    state = Path(f"/proc/{process}/stat")
    with contextlib.suppress(OSError):
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def bash() -> Iterator[Callable[..., Shell]]:
    """Opens a shell in a folder; all are ended with the test."""
    made: list[Shell] = []

    def open_one(folder: Path, **environment: str) -> Shell:
        made.append(Shell(folder, **environment))
        return made[-1]

    yield open_one
    for shell in made:
        shell.close()
