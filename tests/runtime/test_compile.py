"""torch.compile: no graph break, no recompilation on a switch, and never silently the wrong patch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from nest_runtime.runtime import PatchRuntime
from tests.conftest import save_tiny
from tests.support.patches import make_patch

IDS = torch.tensor([[1, 7, 30, 45, 100, 9]])
KEYS = (None, "v1", "v2", "v3")


MODELS = {"llama": ("LlamaForCausalLM", "LlamaConfig"), "phi": ("Phi3ForCausalLM", "Phi3Config")}


def make_runtime(folder: Path, kind: str, layers: int = 1) -> PatchRuntime:
    save_tiny(folder, *MODELS[kind], num_hidden_layers=layers)
    torch.compiler.reset()
    runtime = PatchRuntime(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    for seed, version in enumerate(("v1", "v2", "v3")):
        # Of different sizes: padding must do nothing.
        patch = make_patch(runtime.model, version=version, seed=seed, neurons=9 - seed, scale=0.3, loadings=seed == 1)
        runtime.add(patch)
    return runtime


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[PatchRuntime]:
    """One layer: compiling takes a second or two for each."""
    with make_runtime(tmp_path / "tiny", "llama") as runtime:
        yield runtime


def run(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[operator]


def switch(runtime: PatchRuntime, key: str | None, mode: str = "hook") -> None:
    runtime.deactivate()
    if key:
        runtime.activate(key, mode=mode)  # type: ignore[arg-type]


def alone(runtime: PatchRuntime) -> dict[str | None, torch.Tensor]:
    found = {}
    for key in KEYS:
        with runtime.using(key):
            found[key] = run(runtime.model)
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", list(MODELS))
def test_one_graph_serves_every_patch(tmp_path: Path, kind: str) -> None:
    with make_runtime(tmp_path / "tiny", kind, layers=2) as runtime:
        expected = alone(runtime)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(runtime.model, backend=counter, fullgraph=True)  # raises at a graph break
        for key, mode in [(None, ""), ("v1", "hook"), ("v2", "hook"), ("v3", "fold"), (None, ""), ("v3", "hook")]:
            switch(runtime, key, mode)
            assert close(run(compiled), expected[key])
        runtime.remove("v1")
        runtime.add(make_patch(runtime.model, version="v4", seed=9, neurons=8))  # fits the bank
        switch(runtime, "v4")
        assert close(run(compiled), run(runtime.model))
        switch(runtime, "v3")
        assert close(run(compiled), expected["v3"])
        assert counter.frame_count == 1


def test_a_larger_patch_or_many_patches_grow_the_bank(runtime: PatchRuntime) -> None:
    expected = alone(runtime)
    compiled = torch.compile(runtime.model, backend="eager", fullgraph=True)
    switch(runtime, "v2")
    assert close(run(compiled), expected["v2"])
    runtime.add(make_patch(runtime.model, version="large", seed=50, neurons=70, clusters=5))
    for seed in range(10):
        runtime.add(make_patch(runtime.model, version=f"w{seed}", seed=60 + seed))
    for key in ("large", "w0", "w9", "v2"):
        switch(runtime, key)
        assert close(run(compiled), run(runtime.model))


def test_compiled_before_the_runtime_came_and_after_it_went(tmp_path: Path) -> None:
    torch.compiler.reset()
    folder = save_tiny(tmp_path / "tiny", *MODELS["llama"], num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    base = run(compiled)
    with PatchRuntime(compiled) as runtime:  # dynamo itself would go on with the graph without hooks
        runtime.add(make_patch(model))
        runtime.activate("v1")
        patched = run(compiled)
        assert close(patched, run(model))
        assert not close(patched, base)
    assert torch.equal(run(compiled), base)


def test_model_converted_after_compiling(runtime: PatchRuntime) -> None:
    compiled = torch.compile(runtime.model, backend="eager", fullgraph=True)
    switch(runtime, "v1")
    run(compiled)
    runtime.model.to(torch.bfloat16).to(torch.float32)
    assert close(run(compiled), run(runtime.model))
    runtime.model.to(torch.bfloat16)
    difference = run(compiled).float() - run(runtime.model).float()
    assert float(difference.abs().max()) < 0.05


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_using_with_a_compiled_model_is_right(runtime: PatchRuntime, mode: str) -> None:
    expected = alone(runtime)
    compiled = torch.compile(runtime.model, backend="eager")
    switch(runtime, "v1", mode)
    assert close(run(compiled), expected["v1"])
    for key in KEYS:
        with runtime.using(key):
            assert close(run(compiled), expected[key])
    with runtime.using_rows(KEYS), torch.no_grad():
        mixed = compiled(IDS.repeat(4, 1), use_cache=False).logits
    assert all(close(mixed[row], expected[key][0]) for row, key in enumerate(KEYS))
    assert close(run(compiled), expected["v1"])


def test_using_with_fullgraph_says_why_not(runtime: PatchRuntime) -> None:
    expected = alone(runtime)
    compiled = torch.compile(runtime.model, backend="eager", fullgraph=True)
    run(compiled)
    with runtime.using("v1"), pytest.raises(Unsupported, match=r"using\(\) context of nest-runtime"):
        run(compiled)
    assert close(run(compiled), expected[None])


def test_threads_share_a_compiled_model(runtime: PatchRuntime) -> None:
    expected = alone(runtime)
    compiled = torch.compile(runtime.model, backend="eager")
    run(compiled)
    with runtime.using("v1"):
        run(compiled)  # both graphs exist before the threads start: dynamo compiles under one lock
    barrier = threading.Barrier(3)

    def work(key: str) -> bool:
        barrier.wait()
        right = []
        for _ in range(5):
            with runtime.using(key):
                right.append(close(run(compiled), expected[key]))
        return all(right)

    def base() -> bool:
        barrier.wait()
        return all(close(run(compiled), expected[None]) for _ in range(15))

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(work, "v1"), pool.submit(work, "v2"), pool.submit(base)]
        assert all(future.result() for future in futures)


def test_layers_compiled_one_by_one(runtime: PatchRuntime) -> None:
    expected = alone(runtime)
    for layer in runtime.model.model.layers:  # type: ignore[union-attr]
        layer.compile(backend="eager", fullgraph=True)
    for key in ("v1", None, "v2"):
        switch(runtime, key)
        assert close(run(runtime.model), expected[key])


@pytest.mark.slow
def test_inductor(runtime: PatchRuntime) -> None:
    expected = alone(runtime)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(runtime.model, backend=counter, fullgraph=True)
    for key in KEYS:
        switch(runtime, key)
        assert close(run(compiled), expected[key])
    assert counter.frame_count == 1
