"""The three ways to get wrong answers out of vLLM, each with its guard on, and with the guard taken away.

1. Requests for the base that share a batch with adapters get the last slot's adapter (on CPUs): slots.py keeps that
   empty.
2. A new adapter under an old name reads keys and values of the old one: slots.py names adapters by content.
3. After rows have changed in place, keys and values of the old rows are read: inplace.py drops them at every switch.

Each test compares with the transformers model, and holds that without the guard the answer is wrong: were the guard
lost, or a hazard gone from vLLM, it would fail. On a running engine, without HTTP.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nest_runtime.errors import EngineError, StoreError
from nest_runtime.patch.patch import Patch
from nest_runtime.serve.requests.generation import EngineRequest
from nest_runtime.serve.requests.sampling import SamplingParams
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.vllm import adapters as adapters_module
from nest_runtime.serve.vllm import slots as slots_module
from nest_runtime.serve.vllm.adapters import Adapters
from nest_runtime.serve.vllm.base import CheckpointBase
from nest_runtime.serve.vllm.flow import Flow
from nest_runtime.serve.vllm.inplace import InPlace
from nest_runtime.serve.vllm.replicas import Replicas
from nest_runtime.serve.vllm.trial import Trial

LONG = 5  # the prompt with whole blocks


class Running:
    """An engine, on an event loop in a thread of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        pytest.importorskip("vllm")
        os.environ["VLLM_PLUGINS"] = "nest_runtime"
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = self.do(self._start(settings))
        self.cached = 0  # prompt tokens of the last request whose keys and values were there

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(600)

    async def _start(self, settings: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 768, "max_num_seqs": 16}
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(self.folder), **arguments, **settings))

    def ask(self, *requests: tuple[list[int], Any], count: int = 24) -> list[list[int]]:
        """Greedy tokens for prompts, each with its LoRARequest or None, all at once."""
        from vllm import SamplingParams

        async def one(number: int, prompt: list[int], adapter: Any) -> list[int]:
            params = SamplingParams(temperature=0, max_tokens=count)
            found: list[int] = []
            name = f"r{id(requests)}-{number}"
            async for output in self.client.generate({"prompt_token_ids": prompt}, params, name, lora_request=adapter):
                found = list(output.outputs[0].token_ids)
                self.cached = output.num_cached_tokens
            return found

        async def everyone() -> list[list[int]]:
            return await asyncio.gather(*(one(n, prompt, adapter) for n, (prompt, adapter) in enumerate(requests)))

        return self.do(everyone())

    def stop(self) -> None:
        self.client.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Running]:
    running = Running(folder)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def lora(folder: Path) -> Iterator[Running]:
    running = Running(folder, enable_lora=True, max_loras=2, max_lora_rank=8)
    yield running
    running.stop()


@pytest.fixture
def in_place(plain: Running) -> Iterator[InPlace]:
    import torch

    async def make() -> InPlace:
        return InPlace(Replicas(plain.client), CheckpointBase(plain.folder, torch.float32))

    patches = plain.do(make())
    yield patches
    plain.do(Replicas(plain.client).call("nest_apply", None))
    plain.do(Replicas(plain.client).forget_prefixes())


@pytest.fixture
def as_adapters(lora: Running, tmp_path: Path) -> Iterator[Callable[[], Adapters]]:
    import torch

    made: list[Adapters] = []

    async def make() -> Adapters:
        models = SimpleNamespace(lora_requests={})
        return Adapters(
            Replicas(lora.client), CheckpointBase(lora.folder, torch.float32), models, tmp_path / f"{len(made)}"
        )

    def fresh() -> Adapters:
        made.append(lora.do(make()))
        return made[-1]

    yield fresh
    for adapters in made:
        for digest in list(adapters._slots._ids):
            adapters.remove(digest)


def request_of(adapters: Adapters, patch: Patch) -> Any:
    return adapters._models.lora_requests[adapters_module.adapter_name(patch.digest)]


def test_base_requests_beside_adapters_stay_base(
    lora: Running, as_adapters: Any, patches: list[Patch], prompts: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = as_adapters()
    guarded.add(patches[0])
    with pytest.raises(StoreError, match="as many as the engine has slots for"):
        guarded.add(patches[1])
    found = lora.ask((prompts[0], None), (prompts[1], request_of(guarded, patches[0])), (prompts[2], None))
    assert found == [truth(None, 0), truth("v1", 1), truth(None, 2)]
    guarded.remove(patches[0].digest)

    monkeypatch.setattr(slots_module, "SPARE", 0)  # the guard taken away: the last slot is used
    monkeypatch.setattr(slots_module.Slots, "check", lambda self, reports: None)
    unguarded = as_adapters()
    unguarded.add(patches[0])
    unguarded.add(patches[1])
    found = lora.ask((prompts[0], None), (prompts[1], request_of(unguarded, patches[0])), (prompts[2], None))
    assert found[1] == truth("v1", 1)
    assert [found[0], found[2]] != [truth(None, 0), truth(None, 2)]


def test_an_adapter_in_the_last_slot_is_found_out(as_adapters: Any, patches: list[Patch], monkeypatch: Any) -> None:
    unaware = as_adapters()
    monkeypatch.setattr(unaware._slots, "capacity", 2)
    unaware.add(patches[0])
    with pytest.raises(EngineError, match="in its last slot, which must stay empty"):
        unaware.add(patches[1])
    assert len(unaware._slots) == 1


def test_another_content_is_another_name(
    lora: Running, as_adapters: Any, patches: list[Patch], prompts: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_one_another(adapters: Adapters) -> list[list[int]]:
        found = []
        for patch in patches:
            adapters.add(patch)
            found += lora.ask((prompts[LONG], request_of(adapters, patch)))
            cached.append(lora.cached)
            adapters.remove(patch.digest)
        return found

    cached: list[int] = []
    wanted = [truth(patch.version, LONG) for patch in patches]
    assert after_one_another(as_adapters()) == wanted
    assert cached == [0, 0, 0]

    monkeypatch.setattr(adapters_module, "adapter_name", lambda digest: "safety")  # the guard taken away
    found = after_one_another(as_adapters())
    assert cached[3] == 0
    assert min(cached[4:]) > 0  # keys and values of another patch
    assert found[0] == wanted[0]
    assert found[1:] != wanted[1:]


def test_no_key_or_value_outlives_a_switch(
    plain: Running, in_place: InPlace, patches: list[Patch], prompts: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_switches() -> list[list[int]]:
        found = []
        for digest in (*(patch.digest for patch in patches), None):
            plain.do(in_place.switch(digest))
            found += plain.ask((prompts[LONG], None))
            cached.append(plain.cached)
        return found

    cached: list[int] = []

    for patch in patches:
        in_place.add(patch)
    wanted = [truth(version, LONG) for version in ("v1", "v2", "v3", None)]
    assert after_switches() == wanted
    assert cached == [0, 0, 0, 0]

    async def keep() -> None:
        return None

    plain.do(in_place._replicas.forget_prefixes())
    monkeypatch.setattr(in_place._replicas, "forget_prefixes", keep)  # the guard taken away
    found = after_switches()
    assert cached[4] == 0
    assert min(cached[5:]) > 0  # keys and values of another patch
    assert found[0] == wanted[0]
    assert found[1:] != wanted[1:]


def test_a_rank_with_other_rows_is_found_out_and_all_go_back(
    plain: Running, in_place: InPlace, patches: list[Patch], prompts: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patch in patches[:2]:
        in_place.add(patch)
    plain.do(in_place.switch(patches[0].digest))
    true = in_place._prepared[patches[1].digest]
    in_place._prepared[patches[1].digest] = (true[0], dict.fromkeys(true[1], "sha256:other"))
    with pytest.raises(EngineError, match="other patched rows than it must have"):
        plain.do(in_place.switch(patches[1].digest))
    assert in_place.on == patches[0].digest
    assert in_place.broken is None
    plain.do(in_place.verify())
    assert plain.ask((prompts[0], None)) == [truth("v1", 0)]

    in_place._prepared[patches[0].digest] = true  # nor can the way back be verified: nothing may be answered
    with pytest.raises(EngineError):
        plain.do(in_place.switch(patches[1].digest))
    assert in_place.broken is not None


def test_a_trial_answers_under_its_patch_and_leaves_everything_as_it_was(
    plain: Running, lora: Running, in_place: InPlace, as_adapters: Any, patches: list[Patch], prompts: Any, truth: Any
) -> None:
    adapters = as_adapters()
    adapters.add(patches[1])
    for patch in patches[:2]:
        in_place.add(patch)
    plain.do(in_place.switch(patches[0].digest))
    served_patch = ServedPatch(patches[1].digest, "v2", patches[1].digest, patches[1])
    work = EngineRequest(tuple(map(tuple, prompts)), (24,) * len(prompts), 1, SamplingParams(), served_patch)

    async def answers(running: Running, way: Any) -> list[list[int]]:
        trial = Trial(running.client, way, Flow(8, 8), work, 5)
        return [list(event.tokens) async for event in trial.events()]

    wanted = [truth("v2", number) for number in range(len(prompts))]
    assert lora.do(answers(lora, adapters)) == wanted
    assert plain.do(answers(plain, in_place)) == wanted
    assert in_place.on == patches[0].digest
    assert plain.ask((prompts[LONG], None)) == [truth("v1", LONG)]
