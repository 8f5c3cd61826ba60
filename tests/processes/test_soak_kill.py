"""Kill -9 at random moments: the server comes back with the patch that the history names, the store intact.

Run by name; fifty kills, or what the environment says:

    pytest -m slow -s tests/processes/test_soak_kill.py
    NEST_KILLS=5 pytest -m slow -s tests/processes/test_soak_kill.py

Half of the kills come while patches are activated and rolled back as fast as the server lets, half at any
moment from the start of the process until a little after it is ready. What happened is printed as JSON, and
written to NEST_SOAK_REPORT.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.store.store import Store
from tests.support.serve import Process, process, spawn, when_ready

KILLS = int(os.environ.get("NEST_KILLS", "50"))
BUSY_SECONDS = 1.5

pytest_plugins = ["tests.support.fixtures_serve"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 * KILLS + 300)]


def named_by_history(store: Store, model_hash: str) -> str:
    """The digest that the last activation or rollback in the store's history names."""
    lines = [line for line in store.history(model_hash) if line["what"] in ("activate", "rollback")]
    return str(lines[-1]["digest"])


def check(home: Path, model_hash: str, patches: list[Patch]) -> str:
    """The store and the logs are whole, and agree; gives the digest that they name."""
    store = Store(home)
    named = named_by_history(store, model_hash)
    active = store.active(model_hash)
    assert active is not None
    assert active.digest == named
    store.verify_history()
    AuditLog(home / "audit.jsonl").verify()
    for patch in patches:
        assert store.get(patch.digest).digest == patch.digest
    return named


@contextmanager
def switching(server: Process, life: int) -> Iterator[list[int]]:
    """Activations and rollbacks from two threads, and a client, until the context ends."""
    stop, done = threading.Event(), [0]

    def operate(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            try:
                if dice.random() < 0.3:
                    response = server.admin("POST", "/v1/patches/rollback")
                else:
                    ref = f"test@v{dice.randint(1, 3)}"
                    response = server.admin("POST", "/v1/patches/activate", json={"patch": ref})
                done[0] += response.status_code == 200
            except httpx.HTTPError:
                return

    def ask() -> None:
        body: dict[str, Any] = {"model": server.name, "prompt": [5, 6, 7], "max_tokens": 20}
        while not stop.is_set():
            try:
                server.http("POST", "/v1/completions", json=body)
            except httpx.HTTPError:
                return

    threads = [threading.Thread(target=operate, args=(2 * life + n,)) for n in (0, 1)] + [threading.Thread(target=ask)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_kill_at_random_moments(tmp_path: Path, tiny_llama: Path, patches: list[Patch], files: dict[str, str]) -> None:
    home, model_hash, options = tmp_path / "home", load_model(tiny_llama).hash, ("--model", str(tiny_llama))
    store, dice, switches = Store(home), random.Random(0), 0
    for version in ("v1", "v2", "v3"):
        store.add(files[version])
    named = store.activate("test@v1").digest
    starts: list[float] = []
    for number in range(KILLS):
        began = time.monotonic()
        popen = spawn(home, *options)
        try:
            if number % 2:
                time.sleep(dice.uniform(0, 1.2 * starts[-1]))
                popen.send_signal(signal.SIGKILL)
            else:
                server = when_ready(popen, home)
                starts.append(time.monotonic() - began)
                assert server.http("GET", "/ready").json()["digest"] == named
                with switching(server, number) as done:
                    time.sleep(dice.uniform(0.05, BUSY_SECONDS))
                    popen.send_signal(signal.SIGKILL)
                switches += done[0]
        finally:
            popen.kill()
            popen.communicate()
        named = check(home, model_hash, patches)
    with process(home, *options) as server:
        assert server.http("GET", "/ready").json()["digest"] == named
        body = {"model": server.name, "prompt": [5, 6, 7], "max_tokens": 4}
        answer = server.http("POST", "/v1/completions", json=body)
        assert answer.headers["x-nest-patch-digest"] == named
    report = {
        "kills": KILLS,
        "while switching": len(starts),
        "at any moment": KILLS - len(starts),
        "switches answered with 200": switches,
        "lines of history": store.verify_history(),
        "lines of audit": AuditLog(home / "audit.jsonl").verify(),
        "restarts ready after seconds": {"median": statistics.median(starts), "most": max(starts)},
    }
    print(json.dumps(report, indent=2))
    if path := os.environ.get("NEST_SOAK_REPORT"):
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
    assert switches > KILLS / 4
