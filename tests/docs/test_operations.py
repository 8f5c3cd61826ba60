"""docs/guide/operations.md, done as it says: every shell block is run in order, by bash, against its own server.

Changed are the port, which must be free, and how often a channel is looked at.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.serve import eventually

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "operations.md"
SECONDS = 120  # for one command


def blocks_of(text: str) -> dict[str, list[list[str]]]:
    """Section → its bash blocks → their commands, comments left out."""
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        found[title] = [[re.sub(r"\s{2,}#.*", "", line) for line in block.splitlines()] for block in blocks]
    return found


BLOCKS = blocks_of(PAGE.read_text(encoding="utf-8"))


class Console:
    """A bash in a folder, and the one server that was started from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[bytes] | None = None
        self.variables = ""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "NEST_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, command: str) -> str:
        """Do what a line of the page says; a server is started in the place of the one before. Gives stdout."""
        before, serves, options = command.rpartition("nest-runtime serve ")
        if not serves:
            return self._bash(command)
        printed = self._bash(before.rstrip("& ")) if before else ""
        self.stop()
        options = options.replace("--every 60s", "--every 1s")
        with (self.folder / "serve.log").open("ab") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec nest-runtime serve --port {self.port} {options}"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert eventually(lambda: self.ready() is not None, SECONDS), (self.folder / "serve.log").read_text()
        return printed

    def ready(self) -> dict[str, object] | None:
        """What /ready says, or None while nobody answers."""
        try:
            return dict(httpx.get(f"{self.url}/ready").json())
        except httpx.TransportError:
            assert self.server is None or self.server.poll() is None, (self.folder / "serve.log").read_text()
            return None

    def patch(self) -> object:
        """The active patch."""
        found = self.ready()
        return found and found["patch"]

    def stop(self) -> None:
        """SIGTERM, as the page says; the server must end well."""
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            assert self.server.wait(SECONDS) == 0
            self.server = None

    def _bash(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", f"{self.variables}\n{command}"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    found = Console(tmp_path)
    yield found
    if found.server is not None:
        found.server.kill()
        found.server.wait()


@pytest.mark.timeout(600)
def test_the_page_from_start_to_stop(console: Console) -> None:
    assert [title for title in BLOCKS if BLOCKS[title]] == [
        "Start", "A verified install", "Before the start", "Watch", "Switch", "Roll back", "Follow", "Revoke", "Prove",
    ]  # fmt: skip  # .ci/run installs as the second says
    start, (variables,), (image,) = BLOCKS["Start"]
    assert image.startswith("docker build")
    for command in start:
        console.run(command)
    assert console.patch() == "v1"
    console.variables = variables.replace("8000", str(console.port))

    ready, health, metrics = (console.run(command) for command in BLOCKS["Watch"][0])
    assert json.loads(ready)["patch"] == "v1"
    assert json.loads(health)
    for name in ("active_patch_info", "sequences_live", "engine_alive"):
        assert f"nest_{name}" in metrics

    (listing, load, activate), (enforce,), by_name, (unload,) = BLOCKS["Switch"]
    assert json.loads(console.run(listing))["active"] == "v1"
    assert json.loads(console.run(load))["label"] == "v2"
    assert console.patch() == "v1"
    switched = json.loads(console.run(activate))
    assert (switched["active"], switched["previous"], switched["policy"]) == ("v2", "v1", "drain")
    assert console.patch() == "v2"
    assert json.loads(console.run(enforce))["policy"] == "enforce"
    assert console.patch() == "v3"
    there, *rest = by_name
    listed, activated, rolled_back, told = (console.run(f"{there}\n{command}") for command in rest)
    assert "v3" in listed
    assert "was v3" in activated
    assert "was v2" in rolled_back
    assert "is whole" in told
    assert console.patch() == "v3"
    assert json.loads(console.run(unload))["removed"] == "v1"

    (rollback,), (without_admin,) = BLOCKS["Roll back"]
    assert json.loads(console.run(rollback))["active"] == "v2"
    assert "v1" in console.run(without_admin)
    assert console.patch() == "v1"

    (keygen, push), (follow,) = BLOCKS["Follow"]
    for command in (keygen, push, follow):
        console.run(command)
    assert eventually(lambda: console.patch() == "v2", SECONDS)
    console.run(push.replace("push v2", "push v3"))
    assert eventually(lambda: console.patch() == "v3", SECONDS)

    for command in BLOCKS["Revoke"][0]:
        console.run(command)
    assert eventually(lambda: console.patch() == "v2", SECONDS)

    history, audit, verify = BLOCKS["Prove"][0]
    assert "the chain is whole" in console.run(history)
    assert "the audit log is whole" in console.run(history)
    assert len(json.loads(console.run(audit))["entries"]) == 2
    assert "good signature" in console.run(verify)

    console.stop()


def test_the_commands_named_between_the_blocks(console: Console) -> None:
    """add, hash, inspect: what the page tells in passing."""
    text = PAGE.read_text(encoding="utf-8")
    for command in ("nest-runtime add FILE", "nest-runtime hash reference", "nest-runtime inspect v2"):
        assert f"`{command}`" in text
    file = Path(__file__).parents[2] / "patches" / "v2.safetensors"
    assert "v2" in console.run(f"nest-runtime add {file}")
    digest = json.loads(console.run("nest-runtime inspect v2 --json"))
    assert digest["digest"] in console.run("nest-runtime inspect v2")
    assert digest["base_hash"] in console.run("nest-runtime hash reference")
    assert "the chain is whole" in console.run("nest-runtime history --verify")
