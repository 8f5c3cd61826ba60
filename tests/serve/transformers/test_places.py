"""Places kept for the operator: clients that fill the queue keep no security update out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.following.admission import AdmissionTest
from tests.support.serve import PROMPTS, Reference, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

PROBES = (("How do I bake bread?",) * 4, ("Mix",) * 4)
ADMISSION_TEST = AdmissionTest(*PROBES, min_refused=0.0, max_refused=1.0, new_tokens=2)


def ask(server: Running, count: int = 150, prompt: str = PROMPTS[3]) -> tuple[int, str]:
    body = {"model": server.name, "messages": [{"role": "user", "content": prompt}], "max_tokens": count}
    response = server.http("POST", "/v1/chat/completions", json=body, timeout=280)
    text = response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else ""
    return response.status_code, text


@pytest.mark.parametrize("engine", ["transformers", "generate"])
def test_a_full_queue_keeps_the_probes_of_an_admission_test_waiting_for_nobody(
    config: ServeConfig, slow_engine: None, files: dict[str, str], engine: str
) -> None:
    config = replace(config, engine=engine)
    limits = Limits(running=2, cache_tokens=4096, batch_tokens=128, drain_seconds=60)
    with serving(replace(config, limits=limits, max_queue=4)) as server, ThreadPoolExecutor(7) as pool:
        assert server.admin("POST", "/v1/patches", json={"patch": files["v2"]}).status_code == 200
        clients = [pool.submit(ask, server) for _ in range(6)]
        service = server.server.service
        assert eventually(lambda: service.engine.live == 6)
        assert ask(server)[0] == 429
        candidate = next(served_patch for served_patch in service.table.loaded() if served_patch.label == "v2")
        shares = server.await_(lambda: ADMISSION_TEST.check(service.engine, service.tokenizer, candidate))
        assert set(shares) == {"harmful", "benign"}
        assert not any(client.done() for client in clients)  # two of six, at most, had begun
        assert [client.result()[0] for client in clients] == [200] * 6
    assert eventually(lambda: service.engine.jobs == 0)


def test_a_full_cache_keeps_the_probes_of_an_admission_test_waiting_for_nobody(
    config: ServeConfig, slow_engine: None
) -> None:
    """Sequences that want more than the cache holds push each other out, and nobody new is let in meanwhile."""
    limits = Limits(running=16, cache_tokens=512, batch_tokens=128, drain_seconds=0)
    with serving(replace(config, limits=limits)) as server, ThreadPoolExecutor(16) as pool:
        service = server.server.service
        clients = [pool.submit(ask, server, 400) for _ in range(16)]
        assert eventually(lambda: service.engine._batch._manager.batch_processor.scheduler.block_new_requests)
        shares = server.await_(lambda: ADMISSION_TEST.check(service.engine, service.tokenizer, service.table.active))
        assert set(shares) == {"harmful", "benign"}
        assert not any(client.done() for client in clients)
        server.stop.set()


def test_those_who_wait_come_in_order_and_get_their_answers(
    config: ServeConfig, tiny_llama: Path, patches: list[Patch]
) -> None:
    reference = Reference(tiny_llama, patches)
    with serving(replace(config, limits=replace(config.limits, running=2))) as server, ThreadPoolExecutor(12) as pool:
        prompts = [PROMPTS[number % len(PROMPTS)] for number in range(12)]
        found = list(pool.map(lambda prompt: ask(server, 20, prompt), prompts))
        assert found == [(200, reference.chat(prompt, "v1", 20)) for prompt in prompts]


def test_what_waits_can_be_given_up_and_begun_again(
    config: ServeConfig, slow_engine: None, files: dict[str, str], tiny_llama: Path, patches: list[Patch]
) -> None:
    """Of three that wait, one leaves; the others are answered under the patch that was enforced meanwhile."""
    reference = Reference(tiny_llama, patches)
    with serving(replace(config, limits=replace(config.limits, running=1))) as server, ThreadPoolExecutor(4) as pool:
        engine = server.server.service.engine
        first = pool.submit(ask, server, 100)
        assert eventually(lambda: engine.live == 1)
        others = [pool.submit(ask, server, 10) for _ in range(2)]
        leaving: Any = server.client(timeout=0.5).chat.completions
        with pytest.raises(Exception, match="timed out"):
            leaving.create(model=server.name, messages=[{"role": "user", "content": "Mix"}], max_tokens=400)
        assert eventually(lambda: engine.live <= 3)
        assert server.admin("POST", "/v1/patches", json={"patch": files["v3"]}).status_code == 200
        body = {"patch": files["v2"], "policy": "enforce"}
        assert server.admin("POST", "/v1/patches/activate", json=body).json()["replaced"] >= 2
        for answer in others:
            assert answer.result() == (200, reference.chat(PROMPTS[3], "v2", 10))
        assert first.result()[0] == 200
    assert eventually(lambda: engine.jobs == 0)
