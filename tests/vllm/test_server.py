"""``serve --engine vllm`` over HTTP: answers equal to the transformers model's, token for token, under every patch.

In place and as adapters, on one rank and on two, and on two replicas.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from tests.support.patches import make_patch
from tests.support.serve import Process, eventually, spawn, when_ready

EAGER = "--enforce-eager --max-model-len 768"
RANKS = {1: "", 2: " --tensor-parallel-size 2"}


@contextmanager
def vllm_server(folder: Path, home: Path, *options: str, engine_args: str = "") -> Iterator[Process]:
    """A server process that answers; it must end by itself."""
    arguments = ["--engine", "vllm", "--model", str(folder), "--dtype", "float32", "--drain-timeout", "120"]
    arguments += ["--engine-args", f"{EAGER}{engine_args}", *options]
    popen = spawn(home, *arguments)
    try:
        yield when_ready(popen, home)
    finally:
        popen.send_signal(signal.SIGTERM)
        popen.wait(120)


@pytest.fixture(scope="module", params=[1, 2], ids=["TP=1", "TP=2"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def in_place(
    ranks: int, folder: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    with vllm_server(folder, tmp_path_factory.mktemp("home"), "--patch", files["v1"], engine_args=RANKS[ranks]) as it:
        yield it


@pytest.fixture(scope="module")
def choosing(
    ranks: int, folder: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    options = ["--patch", files["v1"], "--expose", files["v1"], "--expose", files["v2"], "--expose-base"]
    more = f"{RANKS[ranks]} --max-loras 4"  # three patches
    with vllm_server(folder, tmp_path_factory.mktemp("home"), *options, engine_args=more) as it:
        yield it


def activate(server: Process, ref: str, **more: str) -> dict[str, Any]:
    response = server.admin("POST", "/v1/patches/activate", json={"patch": ref, **more})
    assert response.status_code == 200, response.text
    return response.json()


def test_in_place_switches_and_rollback_equal_the_transformers_model(
    in_place: Process, patches: list[Patch], files: dict[str, str], prompts: Any, truth: Any, ask: Any
) -> None:
    digests = {patch.version: patch.digest for patch in patches}

    def check(version: str) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:  # all in one batch
            answers = list(pool.map(lambda prompt: ask(in_place, prompt), prompts))
        for number, answer in enumerate(answers):
            assert answer["choices"][0]["token_ids"] == truth(version, number)
            assert answer["headers"]["x-nest-patch"] == version
            assert answer["headers"]["x-nest-patch-digest"] == digests[version]
            assert answer["system_fingerprint"].endswith(f"patch={digests[version]}")
            assert answer["model"] == "tiny"

    check("v1")
    for version in ("v2", "v3"):
        assert activate(in_place, files[version])["active"] == version
        check(version)
    for version in ("v2", "v1"):
        rolled = in_place.admin("POST", "/v1/patches/rollback").json()
        assert rolled["active"] == version
        check(version)


def test_streams_and_chats_name_their_patch(in_place: Process, patches: list[Patch], truth: Any, prompts: Any) -> None:
    digest = patches[0].digest
    fields = {"model": "tiny", "prompt": prompts[0], "max_tokens": 24, "stream": True, "return_token_ids": True}
    tokens: list[int] = []
    with httpx.stream("POST", f"{in_place.url}/v1/completions", json=fields, timeout=60) as response:
        assert response.headers["x-nest-patch-digest"] == digest
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert chunk["model"] == "tiny"
        assert chunk["system_fingerprint"].endswith(digest)
        tokens += chunk["choices"][0]["token_ids"]
    assert tokens == truth("v1", 0)
    chat = in_place.http(
        "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "bread"}], "max_tokens": 3}
    )
    assert chat.json()["system_fingerprint"].endswith(digest)


def test_a_wrong_base_is_refused_and_nothing_changes(
    in_place: Process, folder: Path, tmp_path: Path, prompts: Any, truth: Any, ask: Any
) -> None:
    loaded = load_model(folder)
    wrong = make_patch(loaded.model, version="wrong", base_hash="sha256:" + "0" * 64)
    response = in_place.admin(
        "POST", "/v1/patches/activate", json={"patch": str(wrong.save(tmp_path / "w.safetensors"))}
    )
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "base_mismatch"
    changed = make_patch(loaded.model, version="rows", base_hash=loaded.hash).evolve(rows_digest="sha256:" + "1" * 64)
    response = in_place.admin("POST", "/v1/patches", json={"patch": str(changed.save(tmp_path / "r.safetensors"))})
    assert response.status_code == 403
    assert ask(in_place, prompts[0])["choices"][0]["token_ids"] == truth("v1", 0)


def test_what_could_answer_past_the_table_is_no_path_here(in_place: Process) -> None:
    for path in ("/v1/responses", "/v1/messages", "/invocations", "/inference/v1/generate", "/v1/load_lora_adapter"):
        assert in_place.http("POST", path, json={"model": "nest-base", "prompt": "x"}).status_code == 404
    for model in ("nest-base", "tiny@base", "tiny@v2", "other"):
        response = in_place.http("POST", "/v1/completions", json={"model": model, "prompt": "x"})
        assert response.json()["error"]["code"] == "model_not_found"
    for field in ("logit_bias", "allowed_token_ids", "bad_words"):
        response = in_place.http("POST", "/v1/completions", json={"model": "tiny", "prompt": "x", field: {"1": 5}})
        assert response.json()["error"] == response.json()["error"] | {"code": "unsupported_parameter", "param": field}
    assert in_place.http("GET", "/v1/patches").status_code == 401


def test_a_drain_waits_for_what_runs_and_enforce_begins_it_again(
    in_place: Process, files: dict[str, str], prompts: Any, ask: Any
) -> None:
    long = {"count": 700, "ignore_eos": True}

    def in_flight() -> bool:
        return any(row["in_flight"] for row in in_place.admin("GET", "/v1/patches").json()["patches"])

    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(lambda: ask(in_place, prompts[0], **long))
        assert eventually(in_flight)
        assert activate(in_place, files["v2"], policy="drain")["replaced"] == 0
        assert old.done()
        assert old.result()["headers"]["x-nest-patch"] == "v1"
        for version in ("v1", "v3", "v1", "v3"):  # a request may end before the switch comes to it
            again = pool.submit(lambda: ask(in_place, prompts[0], **long))
            assert eventually(in_flight)
            replaced = activate(in_place, files[version], policy="enforce")["replaced"]
            answer = again.result(120)
            if replaced:
                break
    assert replaced == 1
    assert answer["headers"]["x-nest-patch"] == version
    assert answer["choices"][0]["token_ids"] == ask(in_place, prompts[0], **long)["choices"][0]["token_ids"]
    activate(in_place, files["v1"])


def test_switches_under_load_never_mix_patches(
    in_place: Process, files: dict[str, str], prompts: Any, truth: Any, ask: Any
) -> None:
    stop, seen = threading.Event(), []

    def client(number: int) -> None:
        while not stop.is_set():
            answer = ask(in_place, prompts[number])
            seen.append((answer["headers"]["x-nest-patch"], number, answer["choices"][0]["token_ids"]))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in (0, 1, 2, 5)]
        for _ in range(4):
            for version in ("v2", "v3", "v1"):
                activate(in_place, files[version])
        stop.set()
        for done in clients:
            done.result(60)
    assert {version for version, _, _ in seen} == {"v1", "v2", "v3"}
    for version, number, tokens in seen:
        assert tokens == truth(version, number)


def test_clients_choose_adapters_and_the_base_in_one_batch(
    choosing: Process, prompts: Any, truth: Any, ask: Any, patches: list[Patch]
) -> None:
    versions = ["v1", "v2", "base", "active"]
    jobs = [(version, number) for number in range(len(prompts)) for version in versions]

    def one(job: tuple[str, int]) -> dict[str, Any]:
        return ask(choosing, prompts[job[1]], "tiny" if job[0] == "active" else f"tiny@{job[0]}")

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(one, jobs))
    digests = {patch.version: patch.digest for patch in patches} | {"base": "none"}
    for (asked, number), answer in zip(jobs, answers, strict=True):
        version = "v1" if asked == "active" else asked
        assert answer["choices"][0]["token_ids"] == truth(None if version == "base" else version, number)
        assert answer["headers"]["x-nest-patch"] == version
        assert answer["headers"]["x-nest-patch-digest"] == digests[version]


def test_the_number_of_adapters_is_bounded_and_a_removed_one_makes_room(
    choosing: Process, folder: Path, files: dict[str, str], tmp_path: Path, prompts: Any, truth: Any, ask: Any
) -> None:
    assert activate(choosing, files["v3"])["active"] == "v3"
    assert ask(choosing, prompts[1])["choices"][0]["token_ids"] == truth("v3", 1)
    loaded = load_model(folder)
    fourth = make_patch(loaded.model, version="v4", serial=4, seed=4, base_hash=loaded.hash)
    ref = str(fourth.save(tmp_path / "v4.safetensors"))
    response = choosing.admin("POST", "/v1/patches", json={"patch": ref})
    assert response.status_code == 409
    assert "as many as the engine has slots for" in response.json()["error"]["message"]
    assert choosing.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    assert choosing.admin("DELETE", "/v1/patches/v3").status_code == 200
    assert choosing.admin("POST", "/v1/patches", json={"patch": ref}).status_code == 200
    assert ask(choosing, prompts[1], "tiny@base")["choices"][0]["token_ids"] == truth(None, 1)
    assert choosing.admin("DELETE", "/v1/patches/v4").status_code == 200


def test_every_replica_is_switched(
    folder: Path, files: dict[str, str], tmp_path: Path, prompts: Any, truth: Any, ask: Callable[..., Any]
) -> None:
    with vllm_server(folder, tmp_path, "--patch", files["v1"], engine_args=" --data-parallel-size 2") as server:
        for version in ("v1", "v2", "v1"):
            activate(server, files[version])
            with ThreadPoolExecutor(12) as pool:  # the load balancer gives each replica some
                numbers = [number % len(prompts) for number in range(24)]
                answers = list(pool.map(lambda number: ask(server, prompts[number]), numbers))
            for number, answer in zip(numbers, answers, strict=True):
                assert answer["choices"][0]["token_ids"] == truth(version, number)
        text = server.http("GET", "/metrics").text
        used = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
        assert len(used) == 2, used
        assert all(float(line.split()[-1]) > 0 for line in used)
