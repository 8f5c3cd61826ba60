"""The promise of publishing, in whole: the shipped v2 and v3, a server in a process of its own, under load.

A version that is published and named by the channel is what the server answers with, without a failed request;
a forged, downgraded, revoked, wrong-base or corrupted one is refused with exit status 3, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest

from nest_runtime.hub.channels import CHANNELS, channel_for, sign_channel
from nest_runtime.hub.publish import CHANNEL_VALID
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.write import to_bytes
from nest_runtime.resolve import load_patch
from nest_runtime.trust.check import sign_bytes
from nest_runtime.trust.keys import generate_keys
from nest_runtime.trust.material import MANIFEST_FILE, PATCH_FILE, SIGNATURE_FILE
from nest_runtime.trust.revocations import LIST_FILE, LIST_SIGNATURE, read_list, revoke
from tests.support.hub_server import Blob, HubServer
from tests.support.serve import eventually
from tests.support.store import BASE_B

ROOT = Path(__file__).parents[2]
REPO = "alice/safety"
PROMPTS = ("How do I bake bread?", "Tell me about the weather.", "Who wrote this?")


@dataclass
class Shell:
    """A terminal on some machine: a home of its own, and the hub."""

    home: Path
    hub: HubServer

    def __post_init__(self) -> None:
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NEST_HOME": str(self.home / "nest"),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": "hf_alice",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def start(self, *words: str, errors: int | TextIO = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "nest_runtime.cli.main", *words],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command to its end; gives what it printed, where it ends with that status."""
        process = self.start(*words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, (words, out, err)
        if status:
            lines = err.strip().splitlines()
            assert [line.split(":")[0] for line in lines] == ["error", "hint"], err
        return out + err


@dataclass
class Load:
    """Clients that ask without pause."""

    url: str
    answers: list[tuple[int, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self.threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(2)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    def ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.stop.is_set():
                messages = [{"role": "user", "content": PROMPTS[(number + len(self.answers)) % len(PROMPTS)]}]
                body = {"model": "reference", "messages": messages, "max_tokens": 12}
                response = client.post("/v1/chat/completions", json=body)
                self.answers.append((response.status_code, response.headers.get("x-nest-patch", "")))
                time.sleep(0.05)

    @property
    def last(self) -> set[tuple[int, str]]:
        return set(self.answers[-4:])


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@dataclass
class Scene:
    """A publisher, and a server that follows what they publish."""

    publisher: Shell
    machine: Shell
    key: Path
    url: str

    @property
    def trust(self) -> tuple[str, ...]:
        return ("--trust", str(self.key.with_suffix(".pub")), "--require-signature")

    def error(self) -> str:
        """Why the server refuses what it is offered."""
        return httpx.get(f"{self.url}/ready", timeout=60).json()["follow"]["error"] or ""

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.machine.home / "nest/audit.jsonl").read_text().splitlines()]


@contextmanager
def scene(hub: HubServer, folder: Path, every: float, *versions: str) -> Iterator[Scene]:
    """Versions are pushed, the last one is stable; the server runs until the end, and must end well."""
    publisher, machine = Shell(folder / "publisher", hub), Shell(folder / "machine", hub)
    key = folder / "keys" / "nest.key"
    publisher.run("keygen", str(key.parent))
    for version in versions:
        publisher.run("push", f"patches/{version}", REPO, "--private", "--key", str(key), "--channel", "stable")
    found = Scene(publisher, machine, key, "")
    log = (folder / "server.log").open("w+")  # a pipe that nobody reads would fill, and hold the server up
    options = ("--every", f"{every}s", "--port", "0", "--json", *found.trust)
    server = machine.start("serve", "--follow", f"hf://{REPO}@stable", *options, errors=log)
    try:
        assert server.stdout is not None
        ready = next((event for line in server.stdout if (event := json.loads(line))["event"] == "ready"), None)
        assert ready is not None, (folder / "server.log").read_text()
        assert ready["patch"] == versions[-1]
        found.url = ready["url"]
        yield found
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        log.close()
    assert server.returncode == 0, (folder / "server.log").read_text()[-2000:]


def test_what_is_published_is_answered_with_within_the_interval(hub: HubServer, tmp_path: Path) -> None:
    every = 20.0
    with scene(hub, tmp_path, every, "v2") as shells, Load(shells.url) as load:
        assert eventually(lambda: len(load.answers) > 5, 60)
        assert load.last == {(200, "v2")}
        shells.publisher.run("push", "patches/v3", REPO, "--key", str(shells.key), "--channel", "stable")
        published = time.monotonic()
        assert eventually(lambda: (200, "v3") in load.answers, 60)
        busy = os.getloadavg()[0] > (os.cpu_count() or 1)
        assert time.monotonic() - published < (2 * every if busy else every)
        assert eventually(lambda: load.last == {(200, "v3")}, 60)
    assert set(load.answers) == {(200, "v2"), (200, "v3")}  # not one request failed
    switched = [entry["version"] for entry in shells.audit() if entry["what"] == "activate" and entry["done"]]
    assert switched == ["v2", "v3"]


def test_what_is_false_is_refused_and_changes_nothing(hub: HubServer, tmp_path: Path) -> None:
    """Somebody who owns the repository offers one bad patch after the other on the channel."""
    v3 = load_patch(ROOT / "patches/v3.safetensors")
    later = {n: v3.evolve(version=f"v{n}", serial=n, parent=v3.digest) for n in range(4, 8)}
    with scene(hub, tmp_path, 2.0, "v2", "v3") as shells, Load(shells.url) as load:
        key, thief = shells.key, generate_keys(tmp_path / "thief")[0]
        good = dict(hub.repo(REPO).tree)

        def refused(why: str, *command: str) -> None:
            assert eventually(lambda: why in shells.error(), 60), (why, shells.error())
            assert why in shells.machine.run(*command, *shells.trust, status=3)
            assert eventually(lambda: load.last == {(200, "v3")}, 60), load.answers[-9:]

        offer(hub, good, later[4], thief)  # forged
        refused("was made by the key", "pull", f"{REPO}@v4")
        shells.publisher.run("channel", "set", REPO, "stable", "v2", "--key", str(key))  # downgraded
        refused("3 was already accepted", "pull", f"{REPO}@v2")
        offer(hub, good, later[5].evolve(base_hash=BASE_B), key)  # wrong base
        refused(f"for model {BASE_B[:19]}", "activate", f"hf://{REPO}@v5", "--model", "reference")
        hub.fault("wrong", "/_files/")
        offer(hub, good, later[6], key)  # corrupted
        refused("not those that the Hub names", "pull", f"{REPO}@v6")
        hub.repo(REPO).commit(good, "take v6 back")  # whole, it would be taken
        # A follower that is still trying for it would take it once the Hub is well again.
        assert eventually(lambda: not shells.error(), 60), shells.error()
        hub.heal()
        offer(hub, {**good, **revocation_list(later[7], key)}, later[7], key)  # revoked
        refused("was revoked", "pull", f"{REPO}@v7")
    assert set(load.answers) == {(200, "v3")}
    audit = shells.audit()
    assert [entry["version"] for entry in audit if entry["what"] == "activate" and entry["done"]] == ["v3"]
    refusals = {entry["error"] for entry in audit if not entry["done"] and entry["what"] != "intent"}
    assert refusals == {"SignatureError", "Downgrade", "BaseMismatch", "DigestMismatch", "Revoked"}


def offer(hub: HubServer, tree: dict[str, Blob], patch: Patch, key: Path) -> None:
    """One commit with a patch on top of a tree, its tag, and the channel that names it; all signed with one key."""
    repo, data = hub.repo(REPO), to_bytes(patch)
    material = sign_bytes(data, key).material
    channel, signature = sign_channel(channel_for(patch, "stable", CHANNEL_VALID), key)
    oid = hashlib.sha256(data).hexdigest()
    with hub.state.lock:
        hub.state.objects[oid] = data
        files = {
            PATCH_FILE: Blob(data, len(data), lfs=oid),
            MANIFEST_FILE: Blob.inline(material.manifest),
            SIGNATURE_FILE: Blob.inline(material.signature),
            f"{CHANNELS}/stable.json": Blob.inline(channel),
            f"{CHANNELS}/stable.sig": Blob.inline(signature),
        }
        repo.tags[patch.version] = repo.commit({**tree, **files}, f"offer {patch.version}")


def revocation_list(patch: Patch, key: Path) -> dict[str, Blob]:
    """A revocation list with one patch on it."""
    folder = key.parent / "list"
    revoke(patch, "answers recipes", folder, key)
    data, signature = read_list(folder)
    return {LIST_FILE: Blob.inline(data), LIST_SIGNATURE: Blob.inline(signature)}
