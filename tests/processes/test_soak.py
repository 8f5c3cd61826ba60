"""A soak: many clients, many swaps, for long; no failed request, no mixed answer, no growth.

Run by name; ten minutes, or what the environment says:

    pytest -m slow -s tests/processes/test_soak.py
    NEST_SOAK_SECONDS=60 NEST_SOAK_SWAPS=200 NEST_SOAK_CLIENTS=8 pytest -m slow -s tests/processes/test_soak.py

The server is a process of its own, with the reference model and its shipped patches, and follows the store, so that
every swap is written to disk. What it measures is printed as JSON, and written to NEST_SOAK_REPORT.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode
from nest_runtime.reference.world import cases
from nest_runtime.resolve import load_patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.store.store import Store
from tests.support.serve import TOKEN, Process, process

SECONDS = float(os.environ.get("NEST_SOAK_SECONDS", "600"))
SWAPS = int(os.environ.get("NEST_SOAK_SWAPS", "2000"))
CLIENTS = int(os.environ.get("NEST_SOAK_CLIENTS", "32"))
VERSIONS = ("v1", "v2", "v3")
NEW_TOKENS = 24
PROMPTS = 24
WARM = 0.25  # of the time: caches and allocators fill before memory is watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * SECONDS + 900)]

Expected = dict[tuple[str, str], str]


@dataclass
class Soak:
    """What is going on, and what was seen."""

    server: Process
    expected: Expected
    ends: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    answers: int = 0
    streams: int = 0
    by_patch: dict[str, int] = field(default_factory=dict)
    swaps: list[float] = field(default_factory=list)
    rollbacks: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds, MiB)

    @property
    def over(self) -> bool:
        """Whether time is up and every swap was made: a busy machine needs longer, and clients ask to the end."""
        return time.monotonic() > self.ends and len(self.swaps) == SWAPS

    def check(self, prompt: str, patch: str, text: str) -> None:
        assert text == self.expected[prompt, patch], f"under {patch}, {prompt!r} was answered {text!r}"
        self.answers += 1
        self.by_patch[patch] = self.by_patch.get(patch, 0) + 1


@pytest.fixture(scope="module")
def expected() -> Expected:
    """What each patch answers alone, by ``model.generate``."""
    loaded = load_model("reference")
    runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
    chosen = random.Random(0).sample(list(cases("test", "jailbreak-seen")), PROMPTS)
    answers = {}
    for version in VERSIONS:
        runtime.add(load_patch(version, model_hash=loaded.hash))
        for case in chosen:
            prompt = case.messages[-1]["content"]
            ids = encode(loaded.tokenizer, [{"role": "user", "content": prompt}])
            with runtime.using(version), torch.inference_mode():
                rows = loaded.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS)
            text = loaded.tokenizer.decode(rows[0, len(ids) :], skip_special_tokens=True)
            answers[prompt, version] = str(text)
    return answers


async def client(soak: Soak, http: httpx.AsyncClient, number: int) -> None:
    """Asks one prompt after another until time is up; every other client streams."""
    dice = random.Random(number)
    prompts = sorted({prompt for prompt, _ in soak.expected})
    while not soak.over:
        prompt = dice.choice(prompts)
        body: dict[str, Any] = {"model": soak.server.name, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": NEW_TOKENS, "temperature": 0, "stream": bool(number % 2)}
        if number % 2:
            await streamed(soak, http, body, prompt)
            continue
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        soak.check(prompt, response.headers["x-nest-patch"], response.json()["choices"][0]["message"]["content"])


async def streamed(soak: Soak, http: httpx.AsyncClient, body: dict[str, Any], prompt: str) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    soak.streams += 1
    soak.check(prompt, response.headers["x-nest-patch"], "".join(delta.get("content", "") for delta in deltas))


async def operator(soak: Soak, http: httpx.AsyncClient) -> None:
    """Spreads the swaps over the time: activations by name, and rollbacks while there is something to go back to."""
    dice, depth, active = random.Random(1), 1, "v1"
    headers = {"authorization": f"Bearer {TOKEN}"}
    began = time.monotonic()
    for number in range(SWAPS):
        await asyncio.sleep(max(0.0, began + SECONDS * number / SWAPS - time.monotonic()))
        back = depth > 1 and dice.random() < 0.4
        started = time.perf_counter()
        if back:
            response = await http.post("/v1/patches/rollback", headers=headers)
        else:
            target = dice.choice([version for version in VERSIONS if version != active])
            response = await http.post("/v1/patches/activate", headers=headers, json={"patch": target})
        soak.swaps.append(time.perf_counter() - started)
        assert response.status_code == 200, response.text
        active = response.json()["active"]
        depth = max(1, min(depth + (-1 if back else 1), 90))
        soak.rollbacks += back


async def accountant(soak: Soak) -> None:
    """Memory of the server, twice a second."""
    watched, began = psutil.Process(soak.server.popen.pid), time.monotonic()
    while not soak.over:
        soak.memory.append((time.monotonic() - began, watched.memory_info().rss / 2**20))
        await asyncio.sleep(0.5)


async def run(soak: Soak) -> None:
    limits = httpx.Limits(max_connections=CLIENTS + 8)
    http = httpx.AsyncClient(base_url=soak.server.url, timeout=120, limits=limits)
    async with http, asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(soak, http, number))
        group.create_task(operator(soak, http))
        group.create_task(accountant(soak))


def slope(points: list[tuple[float, float]]) -> float:
    """MiB per minute, by least squares, of what came after the warm-up."""
    settled = [point for point in points if point[0] > WARM * SECONDS]
    line = statistics.linear_regression([x for x, _ in settled], [y for _, y in settled])
    return line.slope * 60


def test_soak(expected: Expected, tmp_path: Path) -> None:
    home = tmp_path / "home"
    Store(home).activate("reference-safety@v1")
    with process(home, "--max-queue", "1024") as server:
        soak = Soak(server, expected)
        asyncio.run(run(soak))
        metrics = server.http("GET", "/metrics").text
        ready = server.http("GET", "/ready").json()
    growth = slope(soak.memory)
    ordered = sorted(soak.swaps)
    report = {
        "seconds": soak.memory[-1][0],
        "clients": CLIENTS,
        "answers": soak.answers,
        "streamed": soak.streams,
        "answers_by_patch": soak.by_patch,
        "swaps": len(soak.swaps),
        "rollbacks": soak.rollbacks,
        "swap_ms": {"p50": 1e3 * statistics.median(ordered), "p99": 1e3 * ordered[int(0.99 * len(ordered))]},
        "memory_mib": {"first": soak.memory[0][1], "last": soak.memory[-1][1]},
        "memory_slope_mib_per_minute": growth,
    }
    print(json.dumps(report, indent=2))
    if path := os.environ.get("NEST_SOAK_REPORT"):
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
    assert len(soak.swaps) == SWAPS
    assert set(soak.by_patch) == set(VERSIONS)
    assert "nest_engine_alive 1.0" in metrics
    assert "nest_sequences_live 0.0" in metrics
    store = Store(home)
    active = [entry for entry in store.list() if entry.active]
    assert [entry.version for entry in active] == [ready["patch"]]
    assert store.verify_history() >= SWAPS
    assert AuditLog(home / "audit.jsonl").verify() >= SWAPS
    if SECONDS >= 300:  # shorter runs still warm up
        assert abs(growth) < 1.0, f"memory grows by {growth:.2f} MiB a minute"
