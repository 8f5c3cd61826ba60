"""Steady state: the patch of all that runs is folded into the weights, and nobody can tell."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.transformers.auto_fold import FOLD_AFTER, AutoFold
from tests.support.serve import PROMPTS, Reference, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

LONG = 2 * FOLD_AFTER


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


@pytest.fixture
def steps(tiny_llama: Path, patches: list[Patch]) -> tuple[PatchRuntime, AutoFold]:
    loaded = load_model(tiny_llama)
    runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
    for patch in patches:
        runtime.add(patch)
    return runtime, AutoFold(runtime, wanted=True)


def ask(server: Running, model: str, prompt: str, count: int) -> str | None:
    answer = server.client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=count
    )
    return answer.choices[0].message.content


def test_a_patch_alone_is_folded_after_a_while_and_taken_out_at_once(steps: tuple[PatchRuntime, AutoFold]) -> None:
    runtime, auto_fold = steps
    for _ in range(FOLD_AFTER):
        auto_fold.before_step({"v1"})
        assert runtime.mode is None
    auto_fold.before_step({"v1"})
    assert (runtime.active, runtime.mode, auto_fold.folded) == ("v1", "fold", "v1")
    auto_fold.before_step({"v1", None})
    assert (runtime.active, auto_fold.folded) == (None, None)
    for _ in range(LONG):
        auto_fold.before_step({"v1", "v2"})
        auto_fold.before_step({None})
    assert runtime.mode is None


def test_nothing_changes_while_the_runtime_is_busy(steps: tuple[PatchRuntime, AutoFold]) -> None:
    runtime, auto_fold = steps
    with auto_fold.hold():
        for _ in range(LONG):
            auto_fold.before_step({"v1"})
        assert runtime.mode is None
    auto_fold.before_step({"v1"})
    assert runtime.mode == "fold"
    with auto_fold.hold():
        auto_fold.before_step({"v2"})
        assert runtime.active == "v1"
    auto_fold.before_step({"v2"})
    assert runtime.mode is None


def test_weights_that_cannot_be_folded_are_left_alone(
    steps: tuple[PatchRuntime, AutoFold], caplog: pytest.LogCaptureFixture
) -> None:
    runtime, auto_fold = steps
    row = next(site for site in runtime.patches["v1"].sites if site.n_neurons)
    with torch.no_grad():
        runtime.model.get_parameter(f"{row.name}.weight")[row.neurons.tensor().long()] += 1
    for _ in range(LONG):
        auto_fold.before_step({"v1"})
    assert runtime.mode is None
    assert caplog.text.count("not folded in any more") == 1


def test_the_change_over_cannot_be_seen(
    config: ServeConfig, files: dict[str, str], reference: Reference, patches: list[Patch]
) -> None:
    """Long answers: hooks at first, then folded, then hooks again when others come, then folded again."""
    mixed = replace(config, expose=(files["v2"],), expose_base=True)
    with serving(mixed) as server, ThreadPoolExecutor(8) as pool:
        engine = server.server.service.engine
        expected = reference.chat(PROMPTS[0], "v1", 250)
        assert ask(server, server.name, PROMPTS[0], 250) == expected
        assert engine.folded
        assert "nest_patch_folded 1.0" in server.http("GET", "/metrics").text

        stop, seen = threading.Event(), set()

        def watch() -> None:
            while not stop.is_set():
                seen.add(engine.folded)

        watcher = pool.submit(watch)
        long = [pool.submit(ask, server, server.name, PROMPTS[0], 250) for _ in range(3)]
        for _ in range(3):
            assert eventually(lambda: engine.folded or long[0].done())
            assert ask(server, f"{server.name}@v2", PROMPTS[1], 8) == reference.chat(PROMPTS[1], "v2", 8)
            assert ask(server, f"{server.name}@base", PROMPTS[1], 8) == reference.chat(PROMPTS[1], None, 8)
        assert [one.result() for one in long] == [expected] * 3
        stop.set()
        watcher.result()
        assert seen == {True, False}


def test_a_folded_patch_can_be_left_loaded_beside_and_removed(
    server: Running, files: dict[str, str], reference: Reference
) -> None:
    engine = server.server.service.engine
    ask(server, server.name, PROMPTS[0], LONG)
    assert engine.folded
    loaded = server.admin("POST", "/v1/patches", json={"patch": files["v2"]})  # its rows are checked while v1 is folded
    assert loaded.status_code == 200, loaded.text
    assert engine.folded
    server.admin("POST", "/v1/patches/activate", json={"patch": "v2"})
    assert eventually(lambda: server.admin("DELETE", "/v1/patches/v1").status_code == 200)
    assert not engine.folded
    assert ask(server, server.name, PROMPTS[0], LONG) == reference.chat(PROMPTS[0], "v2", LONG)


def test_narrow_weights_are_not_folded(config: ServeConfig, patches: list[Patch], tmp_path: Path) -> None:
    """In bfloat16 folding would round small updates away: answers would change with the load."""
    with serving(replace(config, dtype="bfloat16")) as server:
        ask(server, server.name, PROMPTS[0], LONG)
        assert not server.server.service.engine.folded


def test_the_log_says_nothing_of_prompts_unless_asked(config: ServeConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="nest_runtime.serve")
    with serving(config) as server:
        ask(server, server.name, "a very secret loaf", 2)
    assert "secret" not in caplog.text
    with serving(replace(config, log_prompts=True)) as server:
        body: dict[str, Any] = {"model": server.name, "prompt": "a very secret loaf", "max_tokens": 1}
        server.http("POST", "/v1/completions", json=body, headers={"x-request-id": "loaf-7"})
    lines = [r.fields for r in caplog.records if r.name == "nest_runtime.serve.prompts"]  # type: ignore[attr-defined]
    assert json.loads(json.dumps(lines)) == [{"request_id": "loaf-7", "prompt": "a very secret loaf"}]
