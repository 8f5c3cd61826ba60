"""Patches on a running server: pinning, activation, rollback, exposure, the admin API, the audit log, worker death."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from nest_runtime.errors import BaseMismatch, PatchNotFound, StoreError
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.store.store import Store
from tests.conftest import save_tiny
from tests.support.patches import make_patch
from tests.support.serve import PROMPTS, TOKEN, Reference, Running, eventually, serving

USER: list[Any] = [{"role": "user", "content": PROMPTS[3]}]


pytest_plugins = ["tests.support.fixtures_serve"]


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


def test_admin_calls_need_the_token(server: Running) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        for method, path in (("GET", "/v1/patches"), ("POST", "/v1/patches/rollback"), ("GET", "/v1/audit")):
            response = server.http(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    denied = [entry for entry in server.admin("GET", "/v1/audit").json()["entries"] if entry["what"] == "denied"]
    assert len(denied) == 1  # one line for a burst: strangers must not fill the disk
    assert denied[0]["path"] == "GET /v1/patches"


def test_load_activate_roll_back_remove(server: Running, files: dict[str, str], patches: list[Patch]) -> None:
    client = server.client()

    def patch_of_answer() -> str:
        raw = client.chat.completions.with_raw_response.create(model=server.name, messages=USER, max_tokens=1)
        return raw.headers["x-nest-patch"]

    row = server.admin("POST", "/v1/patches", json={"patch": files["v2"]}).json()
    assert (row["version"], row["digest"], row["active"]) == ("v2", patches[1].digest, False)
    assert patch_of_answer() == "v1"
    switch = server.admin("POST", "/v1/patches/activate", json={"patch": "v2"}).json()
    assert (switch["active"], switch["previous"], switch["digest"]) == ("v2", "v1", patches[1].digest)
    assert patch_of_answer() == "v2"
    assert server.admin("POST", "/v1/patches/activate", json={"patch": files["v3"]}).json()["active"] == "v3"
    listed = server.admin("GET", "/v1/patches").json()
    assert listed["active"] == "v3"
    assert [(r["version"], r["active"], r["exposed"]) for r in listed["patches"]] == [
        ("v1", False, False),
        ("v2", False, False),
        ("v3", True, False),
    ]
    assert server.admin("DELETE", "/v1/patches/v3").status_code == 409
    assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v2"
    assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    last = server.admin("POST", "/v1/patches/rollback")
    assert last.status_code == 409
    assert "nothing to roll back to" in last.json()["error"]["message"]
    assert patch_of_answer() == "v1"
    assert server.admin("DELETE", "/v1/patches/v2").json() == {"removed": "v2", "digest": patches[1].digest}
    assert server.admin("DELETE", "/v1/patches/v2").status_code == 404
    assert [r["version"] for r in server.admin("GET", "/v1/patches").json()["patches"]] == ["v1", "v3"]
    assert 'nest_swaps_total{what="rollback"} 2.0' in server.http("GET", "/metrics").text
    # What was unloaded since is loaded again, if it is still to be had: it did answer before.
    assert server.admin("POST", "/v1/patches/activate", json={"patch": "v3"}).json()["active"] == "v3"
    assert server.admin("DELETE", "/v1/patches/v1").status_code == 200
    gone = server.admin("POST", "/v1/patches/rollback")
    assert gone.status_code == 409
    assert "v1, which answered before, was unloaded since" in gone.json()["error"]["message"]
    Store().add(patches[0])
    assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    assert patch_of_answer() == "v1"


def test_every_change_and_refusal_is_audited(server: Running, files: dict[str, str], config: ServeConfig) -> None:
    server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]})
    server.admin("POST", "/v1/patches/activate", json={"patch": "v9"})
    server.admin("POST", "/v1/patches/rollback")
    audit = server.admin("GET", "/v1/audit").json()
    assert audit["verified"] is True
    entries = [entry for entry in audit["entries"] if entry["what"] != "intent"]
    assert [(entry["what"], entry["done"]) for entry in entries] == [
        ("activate", True),
        ("activate", True),
        ("activate", False),
        ("rollback", True),
    ]
    assert entries[0]["who"].startswith("server start by ")
    assert entries[1]["who"].startswith("admin ")
    assert TOKEN not in json.dumps(audit)
    assert entries[2]["error"] == "PatchNotFound"
    assert len(server.admin("GET", "/v1/audit?limit=2").json()["entries"]) == 2
    path = config.audit_file
    assert path is not None
    path.write_text(path.read_text().replace('"v2"', '"v7"'))
    assert server.admin("GET", "/v1/audit").json()["verified"] is False
    with pytest.raises(StoreError, match=r"line \d was edited"):
        AuditLog(path).verify()


def test_a_bad_patch_leaves_the_old_one_on(
    server: Running, files: dict[str, str], patches: list[Patch], tmp_path: Path
) -> None:
    flipped = tmp_path / "flipped.safetensors"
    data = bytearray(Path(files["v2"]).read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(bytes(data))
    other_base = patches[1].evolve(base_hash="sha256:" + "0" * 64).save(tmp_path / "other.safetensors")
    same_name = patches[0].evolve(created="2026-01-01T00:00:00Z").save(tmp_path / "same.safetensors")
    expected = {str(flipped): 403, str(other_base): 403, str(same_name): 422, str(tmp_path / "no.safetensors"): 404}
    for ref, status in expected.items():
        response = server.admin("POST", "/v1/patches/activate", json={"patch": ref})
        assert response.status_code == status, response.text
        assert response.headers["x-nest-patch"] == "v1"
    assert [row["version"] for row in server.admin("GET", "/v1/patches").json()["patches"]] == ["v1"]
    assert server.client().chat.completions.create(model=server.name, messages=USER, max_tokens=2).choices
    assert 'nest_patch_failures_total{error="BaseMismatch"} 1.0' in server.http("GET", "/metrics").text


def test_no_change_without_an_audit_entry(
    server: Running, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nest_runtime.serve.switching.audit.atomic_write", full)
    response = server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]})
    assert response.status_code == 409
    assert "No space left" in response.json()["error"]["message"]
    monkeypatch.undo()
    assert server.http("GET", "/ready").json()["patch"] == "v1"


def test_an_activation_does_not_touch_running_answers(
    server: Running, slow_engine: None, tiny_llama: Path, patches: list[Patch], files: dict[str, str]
) -> None:
    client, reference = server.client(), Reference(tiny_llama, patches)
    first = client.chat.completions.with_raw_response
    begun = threading.Event()

    def stream() -> tuple[str, str]:
        with client.chat.completions.with_streaming_response.create(
            model=server.name, messages=USER, max_tokens=80, stream=True
        ) as response:
            text = ""
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    text += delta.get("content", "")
                    if text:
                        begun.set()
            return text, response.headers["x-nest-patch"]

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream)
        assert begun.wait(10)
        for version in ("v2", "v3"):
            assert server.admin("POST", "/v1/patches/activate", json={"patch": files[version]}).status_code == 200
        assert not running.done()
        after = first.create(model=server.name, messages=USER, max_tokens=12)
        assert running.result() == (reference.chat(PROMPTS[3], "v1", 80), "v1")
    assert after.headers["x-nest-patch"] == "v3"
    assert after.parse().choices[0].message.content == reference.chat(PROMPTS[3], "v3", 12)


def test_a_patch_that_still_answers_cannot_be_removed(
    server: Running, slow_engine: None, files: dict[str, str]
) -> None:
    client = server.client()
    stream = client.chat.completions.create(model=server.name, messages=USER, max_tokens=300, stream=True)
    next(stream)
    server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]})
    rows = server.admin("GET", "/v1/patches").json()["patches"]
    assert [(row["version"], row["in_flight"]) for row in rows] == [("v1", 1), ("v2", 0)]
    refused = server.admin("DELETE", "/v1/patches/v1")
    assert refused.status_code == 409
    assert "still answers" in refused.json()["error"]["message"]
    stream.close()
    assert eventually(lambda: server.admin("DELETE", "/v1/patches/v1").status_code == 200)


def test_swaps_under_load_never_mix_patches(
    server: Running, tiny_llama: Path, patches: list[Patch], files: dict[str, str]
) -> None:
    client, reference = server.client(), Reference(tiny_llama, patches)
    expected = {(p, v): reference.chat(p, v, 20) for p in PROMPTS for v in ("v1", "v2", "v3")}
    stop = threading.Event()
    seen: set[str] = set()

    def ask(worker: int) -> int:
        count = 0
        while not stop.is_set():
            prompt = PROMPTS[(worker + count) % len(PROMPTS)]
            raw = client.chat.completions.with_raw_response.create(
                model=server.name, messages=[{"role": "user", "content": prompt}], max_tokens=20
            )
            seen.add(raw.headers["x-nest-patch"])
            assert raw.parse().choices[0].message.content == expected[prompt, raw.headers["x-nest-patch"]]
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(ask, worker) for worker in range(6)]
        try:
            for swap in range(15):
                version = f"v{swap % 3 + 1}"
                assert server.admin("POST", "/v1/patches/activate", json={"patch": files[version]}).status_code == 200
                assert eventually(lambda: version in seen)  # noqa: B023
                time.sleep(0.02)
        finally:
            stop.set()
        assert sum(worker.result() for worker in workers) > 20
    assert seen == {"v1", "v2", "v3"}


def test_a_server_without_patch_follows_the_store(
    config: ServeConfig, tiny_llama: Path, patches: list[Patch], files: dict[str, str]
) -> None:
    store, model_hash = Store(), load_model(tiny_llama).hash
    for version in ("v1", "v2"):
        store.activate(store.add(files[version]).digest)
    following = ServeConfig(**{**config.__dict__, "patch": None})
    with serving(following) as server:
        assert server.http("GET", "/ready").json()["patch"] == "v2"
        assert server.admin("POST", "/v1/patches/activate", json={"patch": files["v3"]}).json()["active"] == "v3"
        active = store.active(model_hash)
        assert active is not None
        assert active.version == "v3"
    with serving(following) as server:  # what was activated over HTTP outlives the process
        assert server.http("GET", "/ready").json()["patch"] == "v3"
        assert server.admin("POST", "/v1/patches/rollback").json()["active"] == "v2"
    active = store.active(model_hash)
    assert active is not None
    assert active.version == "v2"
    changes = [(line["what"], line["version"]) for line in store.history()]
    assert changes[-3:] == [("add", "v3"), ("activate", "v3"), ("rollback", "v2")]  # a restart is no change
    assert store.verify_history() == len(changes)


def test_without_any_patch_the_base_is_served_with_a_warning(config: ServeConfig) -> None:
    with serving(ServeConfig(**{**config.__dict__, "patch": None})) as server:
        assert any("bare base" in event.get("message", "") for event in server.events)
        response = server.http("GET", "/ready")
        assert (response.json()["patch"], response.headers["x-nest-patch"]) == ("base", "base")


def test_a_server_asked_for_a_patch_never_starts_without(
    config: ServeConfig, patches: list[Patch], tmp_path: Path
) -> None:
    wrong = patches[1].evolve(base_hash="sha256:" + "0" * 64).save(tmp_path / "wrong.safetensors")
    for ref, error in ((str(wrong), BaseMismatch), ("v77", PatchNotFound)):
        with pytest.raises(error), serving(ServeConfig(**{**config.__dict__, "patch": ref})):
            pass
    with pytest.raises(PatchNotFound), serving(ServeConfig(**{**config.__dict__, "expose": ("v77",)})):
        pass


def test_api_keys_open_v1_and_only_that(config: ServeConfig, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    keys.chmod(0o600)
    with serving(ServeConfig(**{**config.__dict__, "api_key_file": keys})) as server:
        assert server.client(api_key="two").models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="three").chat.completions.create(model=server.name, messages=USER)
        assert server.http("GET", "/v1/models").status_code == 401
        assert server.http("GET", "/health").status_code == 200
        assert server.admin("GET", "/v1/patches").status_code == 200
        assert server.http("GET", "/v1/patches", headers={"authorization": "Bearer one"}).status_code == 401
        keys.write_text("three\n")
        server.await_(server.server.reread)
        assert server.client(api_key="three").models.list().data


def test_a_dead_engine_answers_503(server: Running, monkeypatch: pytest.MonkeyPatch, slow_engine: None) -> None:
    client = server.client()
    stream = client.chat.completions.create(model=server.name, messages=USER, max_tokens=300, stream=True)
    next(stream)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("injected fault")

    monkeypatch.setattr("nest_runtime.serve.transformers.continuous.choose_tokens", broken)
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=server.name, messages=USER)
    assert caught.value.status_code == 503
    assert caught.value.code == "engine_unavailable"
    assert "injected fault" in caught.value.message
    for path in ("/ready", "/health"):
        assert server.http("GET", path).status_code == 503
    assert server.http("GET", "/v1/models").status_code == 200
    assert "nest_engine_alive 0.0" in server.http("GET", "/metrics").text
    assert server.server.service.engine.live == 0


def test_shutting_down_finishes_what_runs(config: ServeConfig, slow_engine: None) -> None:
    with serving(config) as server, ThreadPoolExecutor(1) as pool:
        client = server.client()
        answer = pool.submit(
            client.chat.completions.create, model=server.name, messages=USER, max_tokens=60, stream=False
        )
        assert eventually(lambda: server.server.service.engine.live == 1)
        server.stop.set()
        assert answer.result().choices[0].finish_reason == "length"
        server.thread.join(60)
        assert not server.thread.is_alive()
    assert [event["event"] for event in server.events][-1] == "stopping"


def test_a_small_cache_still_answers_everyone(
    config: ServeConfig, tiny_llama: Path, patches: list[Patch], files: dict[str, str]
) -> None:
    """Sequences that do not fit are put off and recomputed; they keep their patch and their dice."""
    limits = Limits(cache_tokens=320, batch_tokens=64, running=16)
    small = ServeConfig(**{**config.__dict__, "limits": limits, "expose": (files["v2"],), "expose_base": True})
    reference = Reference(tiny_llama, patches)
    with serving(small) as server:
        client = server.client()
        names = [(server.name, "v1"), (f"{server.name}@v2", "v2"), (f"{server.name}@base", None)]

        def ask(number: int) -> tuple[str | None, str | None]:
            (name, version), prompt = names[number % 3], PROMPTS[number % len(PROMPTS)]
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": prompt}], max_tokens=50
            )
            return answer.choices[0].message.content, reference.chat(prompt, version, 50)

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(ask, range(12)))
        assert [got for got, _ in found] == [expected for _, expected in found]
        with pytest.raises(openai.BadRequestError, match="320 tokens"):
            client.completions.create(model=server.name, prompt=[5] * 400)


def test_bases_of_other_families_are_served(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny-phi3", "Phi3ForCausalLM", "Phi3Config", sliding_window=None)
    loaded = load_model(folder)
    patch = make_patch(loaded.model, version="v1", scale=1.0, neurons=30, base_hash=loaded.hash)
    path = str(patch.save(tmp_path / "v1.safetensors"))
    reference = Reference(folder, [patch])
    with serving(ServeConfig(model=str(folder), patch=path, expose_base=True, port=0)) as server:
        client = server.client()
        for name, version in ((server.name, "v1"), (f"{server.name}@base", None)):
            answer = client.chat.completions.create(model=name, messages=USER, max_tokens=10)
            assert answer.choices[0].message.content == reference.chat(PROMPTS[3], version, 10)
