"""PatchRuntime.using*: one patch per context, per row, per run of tokens; and switches among running passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nest_runtime as nest
from nest_runtime.runtime import PatchRuntime
from tests.support.patches import make_patch

IDS = torch.tensor([[1, 7, 30, 45, 100, 9]])
KEYS = (None, "v1", "v2", "v3")
# What is on for everybody while contexts choose otherwise.
STATES = [(None, "hook"), ("v1", "hook"), ("v1", "fold")]


@pytest.fixture
def runtime(tiny_qwen: Path) -> Iterator[PatchRuntime]:
    """A Qwen2 (biases elsewhere in it, tied embeddings) with three patches that overlap in rows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    with PatchRuntime(model) as runtime:
        for seed, version in enumerate(("v1", "v2", "v3")):
            runtime.add(make_patch(model, version=version, seed=seed, neurons=40, scale=0.3, loadings=seed == 1))
        yield runtime


@pytest.fixture
def alone(runtime: PatchRuntime) -> dict[str | None, torch.Tensor]:
    """Logits [1, tokens, vocab] of each patch on its own, by hook."""
    found = {}
    for key in KEYS:
        if key:
            runtime.activate(key)
        found[key] = logits(runtime)
        runtime.deactivate()
    return found


def logits(runtime: PatchRuntime, ids: torch.Tensor = IDS, **options: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return runtime.model(ids, **options).logits


def switch(runtime: PatchRuntime, state: tuple[str | None, str]) -> None:
    runtime.deactivate()
    if state[0]:
        runtime.activate(state[0], mode=state[1])  # type: ignore[arg-type]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("state", STATES)
def test_using_is_that_patch_alone(
    runtime: PatchRuntime, alone: dict[str | None, torch.Tensor], state: tuple[str | None, str]
) -> None:
    switch(runtime, state)
    for key in KEYS:
        with runtime.using(key):
            assert runtime.current == (key,)
            assert runtime.active == state[0]
            assert close(logits(runtime), alone[key])
            with runtime.using(None):
                assert close(logits(runtime), alone[None])
            assert close(logits(runtime), alone[key])
    assert close(logits(runtime), alone[state[0]])


def test_folded_biases_are_kept(tmp_path: Path) -> None:
    """Undoing a folded patch computes rows anew, and must not forget their bias."""
    from tests.conftest import save_tiny

    folder = save_tiny(tmp_path / "m", "LlamaForCausalLM", "LlamaConfig", mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        base = model(IDS).logits
    with PatchRuntime(model) as runtime:
        runtime.add(make_patch(model))
        runtime.activate("v1", mode="fold")
        with runtime.using(None):
            assert close(logits(runtime), base)


@pytest.mark.parametrize("state", STATES)
def test_rows_of_a_batch_under_different_patches(
    runtime: PatchRuntime, alone: dict[str | None, torch.Tensor], state: tuple[str | None, str]
) -> None:
    switch(runtime, state)
    order = ["v2", None, "v1", "v3", "v1", None]
    with runtime.using_rows(order):
        assert runtime.current == tuple(order)
        mixed = logits(runtime, IDS.repeat(len(order), 1))
    for row, key in enumerate(order):
        assert close(mixed[row], alone[key][0])


def test_patches_of_unlike_sizes_in_batches_that_change(runtime: PatchRuntime) -> None:
    """Where a token's own numbers are is worked out for a batch: others come and go, long ones among them."""
    model = runtime.model
    names = [site.name for site in runtime.patches["v1"].sites]
    for seed, (neurons, empty) in enumerate(((3, ()), (17, names[:1]), (29, names[1:]))):
        runtime.add(make_patch(model, version=f"w{seed}", seed=seed, neurons=neurons, scale=0.3, empty=empty))
    keys = (*KEYS, "w0", "w1", "w2")
    single = {}
    for key in keys:
        with runtime.using(key):
            single[key] = logits(runtime, IDS)
    for turn in range(12):
        order = [keys[(turn * place + place) % len(keys)] for place in range(4 if turn % 3 else 60)]
        with runtime.using_rows(order):
            mixed = logits(runtime, IDS.repeat(len(order), 1))
        for row, key in enumerate(order):
            assert close(mixed[row], single[key][0])


def test_generate_with_rows_equals_each_alone(runtime: PatchRuntime) -> None:
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    single = {}
    for key in KEYS:
        with runtime.using(key):
            single[key] = runtime.model.generate(IDS, **options)  # type: ignore[operator]
    assert len({tuple(found[0].tolist()) for found in single.values()}) > 1
    with runtime.using_rows(KEYS):
        mixed = runtime.model.generate(IDS.repeat(4, 1), **options)  # type: ignore[operator]
    for row, key in enumerate(KEYS):
        assert mixed[row, : single[key].shape[1]].tolist() == single[key][0].tolist()


@pytest.mark.parametrize("state", STATES)
def test_tokens_of_a_flat_batch_under_different_patches(
    runtime: PatchRuntime, alone: dict[str | None, torch.Tensor], state: tuple[str | None, str]
) -> None:
    switch(runtime, state)
    order = ["v3", "v1", None, "v1", "v2"]
    length, count = IDS.shape[1], len(order)
    flat = IDS.repeat(1, count)
    owner = torch.arange(count).repeat_interleave(length)
    position = torch.arange(length).repeat(count)
    causal = (owner[:, None] == owner) & (position[:, None] >= position)
    mask = torch.where(causal, 0.0, torch.finfo(torch.float32).min)[None, None]  # (1, 1, tokens, tokens)
    with runtime.using_tokens([(key, length) for key in order] + [("v2", 0)]):
        mixed = logits(runtime, flat, attention_mask=mask, position_ids=position[None])
    for i, key in enumerate(order):
        assert close(mixed[0, i * length : (i + 1) * length], alone[key][0])


def test_wrong_counts_are_refused(runtime: PatchRuntime, alone: dict[str | None, torch.Tensor]) -> None:
    with runtime.using_rows(["v1", "v2"]), pytest.raises(nest.UsageError, match=r"2 rows, the forward pass has 1"):
        logits(runtime)
    with runtime.using_tokens([("v1", 3), (None, 4)]), pytest.raises(nest.UsageError, match=r"7 tokens.*has 6"):
        logits(runtime)
    with pytest.raises(nest.UsageError, match="negative"), runtime.using_tokens([("v1", -1)]):
        pass
    with pytest.raises(nest.PatchNotFound), runtime.using("v9"):
        pass
    assert runtime.current == (None,)
    runtime.activate("v1", mode="fold")  # the failed passes do not block it
    assert close(logits(runtime), alone["v1"])


def test_patches_in_use_stay(runtime: PatchRuntime) -> None:
    with runtime.using_rows(["v1", None]):
        with pytest.raises(nest.NestError, match="in use"):
            runtime.remove("v1")
        with pytest.raises(nest.NestError, match="open"):
            runtime.close()
        runtime.remove("v3")
    runtime.remove("v1")
    assert list(runtime.patches) == ["v2"]


@pytest.mark.parametrize("state", STATES)
def test_threads_do_not_see_each_other(
    runtime: PatchRuntime, alone: dict[str | None, torch.Tensor], state: tuple[str | None, str]
) -> None:
    switch(runtime, state)
    barrier = threading.Barrier(4)

    def work(key: str | None) -> list[bool]:
        barrier.wait()
        with runtime.using(key):
            return [close(logits(runtime), alone[key]) for _ in range(15)]

    with runtime.using("v3"), ThreadPoolExecutor(4) as pool:
        assert all(all(results) for results in pool.map(work, KEYS))
        assert pool.submit(lambda: runtime.current).result() == (state[0],)


def test_asyncio_tasks_do_not_see_each_other(runtime: PatchRuntime, alone: dict[str | None, torch.Tensor]) -> None:
    async def work(key: str | None) -> bool:
        with runtime.using(key):
            right = []
            for _ in range(5):
                await asyncio.sleep(0)
                right.append(close(logits(runtime), alone[key]))
                right.append(close(await asyncio.to_thread(logits, runtime), alone[key]))
            return all(right)

    async def everyone() -> list[bool]:
        return await asyncio.gather(*(work(key) for key in KEYS * 2))

    assert all(asyncio.run(everyone()))
    assert runtime.current == (None,)


@pytest.mark.parametrize("mode", ["hook", "fold", "mixed"])
def test_a_pass_sees_one_patch_while_another_thread_switches(
    runtime: PatchRuntime, alone: dict[str | None, torch.Tensor], mode: str
) -> None:
    over = threading.Event()
    failures: list[str] = []

    def serve() -> None:
        while not over.is_set():
            found = logits(runtime)
            if not any(close(found, expected) for expected in alone.values()):
                failures.append("a pass mixed patches")

    def pinned() -> None:
        with runtime.using("v3"):
            while not over.is_set():
                if not close(logits(runtime), alone["v3"]):
                    failures.append("a pinned pass changed")

    threads = [threading.Thread(target=target) for target in (serve, serve, pinned)]
    for thread in threads:
        thread.start()
    try:
        for step in range(40):
            key = KEYS[step % 4]
            how = ("hook", "fold")[step % 2] if mode == "mixed" else mode
            switch(runtime, (key, how))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failures


def pause_in_layer(runtime: PatchRuntime) -> tuple[threading.Event, threading.Event, Callable[[], None]]:
    """Make the next pass wait between the two layers: (it is there, let it go on, take the pause off)."""
    there, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        there.set()
        go_on.wait(10)

    handle = runtime.model.model.layers[1].register_forward_pre_hook(wait)  # type: ignore[union-attr, index]
    return there, go_on, handle.remove


def test_hook_switch_in_the_middle_of_a_pass(runtime: PatchRuntime, alone: dict[str | None, torch.Tensor]) -> None:
    runtime.activate("v1")
    there, go_on, remove = pause_in_layer(runtime)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, runtime)
        assert there.wait(10)
        runtime.activate("v2")  # does not wait
        go_on.set()
        assert close(running.result(), alone["v1"])
    remove()
    assert close(logits(runtime), alone["v2"])


def test_fold_switch_waits_for_the_pass(runtime: PatchRuntime, alone: dict[str | None, torch.Tensor]) -> None:
    runtime.activate("v1", mode="fold")
    there, go_on, remove = pause_in_layer(runtime)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(logits, runtime)
        assert there.wait(10)
        switching = pool.submit(runtime.activate, "v2", "fold")
        later = pool.submit(lambda: [switching.done() or threading.Event().wait(0.3), logits(runtime)][1])
        with pytest.raises(TimeoutError):
            switching.result(timeout=0.5)
        remove()
        go_on.set()
        assert close(running.result(), alone["v1"])
        switching.result(timeout=10)
        assert close(later.result(timeout=10), alone["v2"])


def test_abandoned_passes_do_not_block_a_fold(runtime: PatchRuntime) -> None:
    """KeyboardInterrupt skips forward hooks, so that the pass never ends officially."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = runtime.model.model.layers[1].register_forward_pre_hook(interrupt)  # type: ignore[union-attr, index]

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            logits(runtime)

    work()
    runtime.activate("v1", mode="fold")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
        runtime.activate("v2", mode="fold")  # that thread is alive and idle
        pool.submit(work).result()
    runtime.activate("v3", mode="fold")  # that thread is gone
    handle.remove()
    assert runtime.active == "v3"


def test_fold_inside_a_pass_is_refused(runtime: PatchRuntime, alone: dict[str | None, torch.Tensor]) -> None:
    def fold(*_: object) -> None:
        runtime.activate("v1", mode="fold")

    handle = runtime.model.model.layers[1].register_forward_pre_hook(fold)  # type: ignore[union-attr, index]
    with pytest.raises(nest.NestError, match="inside a forward pass"):
        logits(runtime)
    handle.remove()
    assert runtime.active is None
    assert close(logits(runtime), alone[None])
    runtime.activate("v1", mode="fold")


def test_two_runtimes_have_contexts_of_their_own(runtime: PatchRuntime, tiny_qwen: Path) -> None:
    other_model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    with PatchRuntime(other_model) as other:
        other.add(make_patch(other_model, version="v1", seed=7))
        with runtime.using("v2"):
            assert (runtime.current, other.current) == (("v2",), (None,))
            with other.using("v1"):
                assert (runtime.current, other.current) == (("v2",), ("v1",))


def test_a_layer_called_on_its_own(runtime: PatchRuntime) -> None:
    """Without a pass around it, a module follows the context of the moment."""
    runtime.model.requires_grad_(False)
    module = runtime.model.model.layers[0].mlp.gate_proj  # type: ignore[union-attr, index]
    x = torch.randn(3, 64)
    plain = module(x)
    with runtime.using("v1"):
        site = runtime.patches["v1"].site("model.layers.0.mlp.gate_proj")
        assert close(module(x), plain + x @ site.dense().T)
    assert torch.equal(module(x), plain)
