"""One request, or one patch, hurts nobody else: passes that raise, and passes that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nest_runtime.errors import PatchNotFinite
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.app import SELFCHECK_TEXT
from nest_runtime.serve.requests.sampling import NotFinite, choose_tokens
from nest_runtime.serve.transformers.tryout import PROMPTS as TRIED
from tests.conftest import save_tiny
from tests.support.patches import make_patch
from tests.support.serve import PROMPTS, Reference, Running, eventually, serving

pytest_plugins = ["tests.support.fixtures_serve"]

POISON = 666  # the seed of a request that a step cannot compute


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


@pytest.fixture
def server(config: ServeConfig, files: dict[str, str]) -> Iterator[Running]:
    limits = Limits(cache_tokens=8192, batch_tokens=128)
    with serving(replace(config, expose=(files["v2"],), expose_base=True, limits=limits)) as running:
        yield running


@pytest.fixture
def raise_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let steps raise while a condition over the samplers of their rows holds."""

    def arm(condition: Callable[[list[Any]], bool], error: Exception | None = None) -> None:
        def choose(logits: Any, samplers: list[Any]) -> Any:
            if condition(samplers):
                raise error or RuntimeError("injected fault")
            return choose_tokens(logits, samplers)

        for module in ("continuous", "steering"):
            monkeypatch.setattr(f"nest_runtime.serve.transformers.{module}.choose_tokens", choose)

    return arm


def ask_all(server: Running, extra: list[dict[str, Any]] = []) -> tuple[list[tuple[str, str]], list[Any]]:  # noqa: B006
    """Thirty long and short requests under v1, v2 and the base at once, and others beside them; their answers."""
    names = [server.name, f"{server.name}@v2", f"{server.name}@base"]
    good = [
        {
            "model": names[i % 3],
            "messages": [{"role": "user", "content": PROMPTS[i % 6] * (1 + i % 2)}],
            "max_tokens": 8 + i,
        }
        for i in range(30)
    ]
    bodies = [*good[:15], *extra, *good[15:]]
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: server.http("POST", "/v1/chat/completions", json=body), bodies))
    others = [answer for answer, body in zip(found, bodies, strict=True) if body in extra]
    answers = [answer for answer, body in zip(found, bodies, strict=True) if body not in extra]
    assert {answer.status_code for answer in answers} == {200}
    return [
        (answer.json()["choices"][0]["message"]["content"], answer.headers["x-nest-patch"]) for answer in answers
    ], others


def alone(reference: Reference) -> list[tuple[str, str]]:
    """What ``ask_all`` should give."""
    versions = ["v1", "v2", None]
    return [
        (reference.chat(PROMPTS[i % 6] * (1 + i % 2), versions[i % 3], 8 + i), versions[i % 3] or "base")
        for i in range(30)
    ]


def test_a_step_that_raises_ends_nobody(
    server: Running, reference: Reference, raise_in_step: Callable[[Any], None]
) -> None:
    passes = iter(range(10**6))
    raise_in_step(lambda samplers: next(passes) in (5, 20, 21, 22, 50))
    assert ask_all(server)[0] == alone(reference)
    assert next(passes) > 50
    assert server.http("GET", "/health").status_code == 200
    assert server.server.service.engine.jobs == server.server.service.engine.live == 0


def test_a_request_that_breaks_every_step_it_is_in_fails_alone(
    server: Running, reference: Reference, raise_in_step: Callable[[Any], None]
) -> None:
    raise_in_step(lambda samplers: any(sampler.params.seed == POISON for sampler in samplers))
    poison = {"model": server.name, "messages": [{"role": "user", "content": "x"}], "seed": POISON, "temperature": 1}
    answers, others = ask_all(server, [{**poison, "n": 2}, {**poison, "model": f"{server.name}@v2"}])
    assert answers == alone(reference)
    for other in others:
        assert (other.status_code, other.json()["error"]["code"]) == (503, "engine_unavailable")
        assert "injected fault" in other.json()["error"]["message"]
    assert server.http("GET", "/ready").status_code == 200
    assert ask_all(server)[0] == alone(reference)
    assert server.server.service.engine.jobs == 0


def test_seeded_answers_are_the_same_through_a_failed_step(
    server: Running, raise_in_step: Callable[[Any], None]
) -> None:
    body = {"model": server.name, "prompt": "Mix", "max_tokens": 60, "temperature": 1.5, "seed": 3, "n": 2}
    undisturbed = server.http("POST", "/v1/completions", json=body).json()["choices"]
    passes = iter(range(10**6))
    raise_in_step(lambda samplers: next(passes) in (3, 30))
    assert server.http("POST", "/v1/completions", json=body).json()["choices"] == undisturbed


def test_a_client_that_leaves_while_others_are_tried_is_forgotten(
    server: Running, slow_engine: None, raise_in_step: Callable[[Any], None]
) -> None:
    with server.client().completions.create(model=server.name, prompt="Mix", max_tokens=200, stream=True) as stream:
        next(iter(stream))
        raise_in_step(lambda samplers: any(sampler.params.seed == POISON for sampler in samplers))
        server.http(
            "POST",
            "/v1/completions",
            json={"model": server.name, "prompt": "x", "seed": POISON, "temperature": 1, "max_tokens": 9},
        )
    assert server.http("GET", "/ready").status_code == 200
    assert eventually(lambda: server.server.service.engine.jobs == 0)


@pytest.mark.parametrize("engine", ["transformers", "generate"])
@pytest.mark.parametrize("error", [RuntimeError("injected fault"), NotFinite("injected values", (0,))], ids=type)
def test_a_lone_request_is_not_to_blame_for_what_happens_once(
    config: ServeConfig, reference: Reference, raise_in_step: Callable[..., None], error: Exception, engine: str
) -> None:
    with serving(replace(config, engine=engine)) as server:
        passes = iter(range(10**6))
        raise_in_step(lambda samplers: next(passes) in (0, 4, 9), error)
        body = {"model": server.name, "messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 12}
        answer = server.http("POST", "/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == reference.chat(PROMPTS[1], "v1", 12)
        assert server.server.service.engine.failed_passes == 3
        assert server.http("GET", "/ready").json()["patch"] == "v1"
        assert "nest_failed_requests_total{" not in server.http("GET", "/metrics").text


@pytest.mark.parametrize("engine", ["transformers", "generate"])
def test_a_prompt_that_the_base_cannot_bear_takes_no_patch_off(
    config: ServeConfig, tmp_path: Path, engine: str
) -> None:
    """A row of the embedding that nobody trained may hold anything; any client can ask for it."""
    folder = save_tiny(tmp_path / "model", "LlamaForCausalLM", "LlamaConfig")
    tokenizer = load_model(folder).tokenizer
    known = {token for text in (*TRIED, SELFCHECK_TEXT, "userassistant") for token in tokenizer(text)["input_ids"]}
    rare = max(set(range(6, 300)) - known)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][rare] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder)
    paths = [
        str(
            make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, base_hash=loaded.hash).save(
                tmp_path / f"v{n}.safetensors"
            )
        )
        for n in (1, 2)
    ]
    with serving(replace(config, model=str(folder), patch=paths[0], expose=(paths[1],), engine=engine)) as server:
        for name in (server.name, f"{server.name}@v2", server.name):
            body = {"model": name, "prompt": [5, rare, 6], "max_tokens": 3}
            refused = server.http("POST", "/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
            answered = server.http("POST", "/v1/completions", json={**body, "prompt": [5, 6]})
            assert answered.status_code == 200
        assert server.http("GET", "/ready").json()["patch"] == "v1"
        assert 'nest_failed_requests_total{patch="base",reason="not finite"} 3.0' in server.http("GET", "/metrics").text


def test_the_plain_engine_finds_who_is_to_blame(
    config: ServeConfig,
    reference: Reference,
    raise_in_step: Callable[..., None],
    files: dict[str, str],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    with serving(replace(config, engine="generate", expose=(files["v2"],), expose_base=True)) as server:
        table = server.server.service.table
        table.loader.tryout = lambda patch: None
        bad = huge(tiny_llama, "float32", 1e20)
        server.admin("POST", "/v1/patches", json={"patch": str(bad.save(tmp_path / "v9.safetensors"))})
        table.expose(next(served_patch for served_patch in table.loaded() if served_patch.label == "v9"))
        raise_in_step(lambda samplers: any(sampler.params.seed == POISON for sampler in samplers))
        body = {"model": server.name, "messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 9}
        extra = [{**body, "seed": POISON, "temperature": 1}, {**body, "model": f"{server.name}@v9"}]
        answers, others = ask_all(server, extra)
        assert answers == alone(reference)
        assert {other.status_code for other in others} == {503}
        assert eventually(lambda: table.withdrawn() == ["v9"])
        assert server.http("GET", "/ready").json()["patch"] == "v1"
        assert server.server.service.engine.jobs == 0


def huge(folder: Path, dtype: str, scale: float) -> Patch:
    """A patch of finite numbers whose sums are not: ``v9``."""
    loaded = load_model(folder, dtype=dtype)
    return make_patch(loaded.model, version="v9", serial=9, seed=9, scale=scale, neurons=40, base_hash=loaded.hash)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 1e20), ("float32", 1e37), ("bfloat16", 1e20), ("float16", 3e3), ("float16", 3e5)]
)
def test_a_patch_that_overflows_is_refused_before_it_meets_anyone(
    config: ServeConfig, tiny_llama: Path, dtype: str, scale: float, tmp_path: Path
) -> None:
    bad = str(huge(tiny_llama, "float32", scale).save(tmp_path / "v9.safetensors"))
    with serving(replace(config, patch=None, dtype=dtype)) as server:
        for path in ("/v1/patches", "/v1/patches/activate"):
            refused = server.admin("POST", path, json={"patch": bad})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "patch_not_finite")
            assert "v9" in refused.json()["error"]["message"]
            assert dtype in refused.json()["error"]["message"]
        assert server.admin("GET", "/v1/patches").json()["patches"] == []
        assert server.server.service.engine.failed_passes == 0
    with pytest.raises(PatchNotFinite), serving(replace(config, patch=bad, dtype=dtype)):
        pass


def test_values_that_are_not_finite_stay_in_their_row(
    server: Running, files: dict[str, str], tiny_llama: Path, reference: Reference, tmp_path: Path
) -> None:
    """A patch that only the engine finds out: its rows fail or begin again, nobody else sees a thing."""
    table, engine = server.server.service.table, server.server.service.engine
    table.loader.tryout = lambda patch: None
    bad = huge(tiny_llama, "float32", 1e20)
    server.admin("POST", "/v1/patches", json={"patch": str(bad.save(tmp_path / "v9.safetensors"))})
    table.expose(next(served_patch for served_patch in table.loaded() if served_patch.label == "v9"))
    body = {"model": f"{server.name}@v9", "messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 9}
    answers, others = ask_all(server, [body, {**body, "n": 3}])
    assert answers == alone(reference)
    for other in others:
        assert (other.status_code, other.json()["error"]["code"]) in (
            (503, "engine_unavailable"),
            (422, "patch_not_finite"),
        )
    assert ask_all(server)[0] == alone(reference)  # and no page of it is left
    assert engine.failed_passes > 0
    metrics = server.http("GET", "/metrics").text
    assert 'nest_failed_requests_total{patch="v9",reason="not finite"}' in metrics
    assert f"nest_failed_passes {float(engine.failed_passes)}" in metrics
    gone = server.http("POST", "/v1/chat/completions", json=body)
    assert (gone.status_code, gone.json()["error"]["code"]) == (422, "patch_not_finite")
    assert server.admin("POST", "/v1/patches/activate", json={"patch": "v9"}).status_code == 422
    assert server.http("GET", "/ready").json()["patch"] == "v1"


def test_a_broken_patch_that_is_active_gives_way_to_the_one_before(
    server: Running, tiny_llama: Path, reference: Reference, tmp_path: Path
) -> None:
    table = server.server.service.table
    table.loader.tryout = lambda patch: None
    bad = str(huge(tiny_llama, "float32", 1e20).save(tmp_path / "v9.safetensors"))
    assert server.admin("POST", "/v1/patches/activate", json={"patch": bad}).status_code == 200
    body = {"model": server.name, "messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 9}
    first = server.http("POST", "/v1/chat/completions", json=body)
    assert first.status_code in (200, 503)
    assert eventually(lambda: server.http("GET", "/ready").json()["patch"] == "v1")
    after = server.http("POST", "/v1/chat/completions", json=body)
    assert after.json()["choices"][0]["message"]["content"] == reference.chat(PROMPTS[1], "v1", 9)
    assert after.headers["x-nest-patch"] == "v1"
    entries = server.admin("GET", "/v1/audit").json()["entries"]
    assert [(e["what"], e["who"], e["version"]) for e in entries if e["what"] == "rollback"] == [
        ("rollback", "the engine", "v1")
    ]


def test_a_broken_patch_with_none_before_it_stops_the_server(
    config: ServeConfig, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nest_runtime.serve.transformers.tryout.PROMPTS", ())
    bad = str(huge(tiny_llama, "float32", 1e20).save(tmp_path / "v9.safetensors"))
    with serving(replace(config, patch=bad)) as server:
        body = {"model": server.name, "prompt": [5, 6], "max_tokens": 3}
        assert server.http("POST", "/v1/completions", json=body).status_code == 503
        assert eventually(lambda: server.http("GET", "/ready").status_code == 503)
        refused = server.http("POST", "/v1/completions", json=body)
        assert (refused.status_code, "there is no way back" in refused.text) == (503, True)
        assert server.http("GET", "/health").status_code == 200
