"""Two replicas on Ray Serve: a switch reaches both, or neither, and nobody is answered in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from tests.support.patches import make_patch
from tests.support.serve import TOKEN, eventually


@dataclass
class Fleet:
    """What tests ask: the address that Ray Serve's proxy listens on."""

    url: str

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=120, **arguments)

    def activate(self, ref: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {TOKEN}"}
        return self.http("POST", "/v1/patches/activate", json={"patch": ref}, headers=headers)

    def ready(self) -> bool:
        return self.http("GET", "/ready").status_code == 200


@pytest.fixture(scope="module")
def fleet(folder: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    ray = pytest.importorskip("ray")
    from ray import serve

    from nest_runtime.serve.fleet.ray_app import build

    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    options = ["--allow-completions", "--allow-special-tokens", "--dtype", "float32"]
    options += ["--engine-args", "--enforce-eager --max-model-len 768"]
    arguments = {"model": str(folder), "patch": files["v1"], "replicas": 2, "options": options, "num_cpus": 0.5}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"NEST_HOME": str(home)}})
    serve.start(http_options={"port": 18471})
    serve.run(build({**arguments, "admin_token_file": str(token)}), name="nest", route_prefix="/", blocking=False)
    running = Fleet("http://127.0.0.1:18471")
    assert eventually(running.ready, 400)
    yield running
    serve.shutdown()
    ray.shutdown()


def test_a_switch_reaches_both_replicas_and_no_answer_is_of_two_patches(
    fleet: Fleet, patches: list[Patch], files: dict[str, str], prompts: Any, truth: Any, ask: Any
) -> None:
    stop, seen = threading.Event(), []

    def client(number: int) -> None:
        while not stop.is_set():
            began = time.monotonic()
            answer = ask(fleet, prompts[number])
            seen.append((began, time.monotonic(), answer["headers"], number, answer["choices"][0]["token_ids"]))

    def replicas_since(when: float) -> set[str]:
        return {row[2]["x-nest-replica"] for row in list(seen) if row[0] > when}

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, number) for number in range(6)]
        for version in ("v2", "v3", "v1"):
            switched = fleet.activate(files[version])
            assert switched.status_code == 200, switched.text
            assert switched.json()["members"] == 2
            print(f"switched to {version}, held for {switched.json()['held_seconds']} s")
            after = time.monotonic()
            assert eventually(lambda: len(replicas_since(after)) == 2, 90), fleet.http("GET", "/fleet").text  # noqa: B023
            assert {row[2]["x-nest-patch"] for row in seen if row[0] > after} == {version}
        stop.set()
        for done in clients:
            done.result(120)
    for _, _, headers, number, tokens in seen:
        assert tokens == truth(headers["x-nest-patch"], number)
    first = {v: min(row[1] for row in seen if row[2]["x-nest-patch"] == v) for v in ("v2", "v3")}
    last_v1 = max(row[0] for row in seen if row[2]["x-nest-patch"] == "v1" and row[0] < first["v2"])
    assert last_v1 < first["v2"] < first["v3"]


def test_a_patch_that_a_replica_refuses_leaves_both_on_the_old_one(
    fleet: Fleet, folder: Path, tmp_path: Path, prompts: Any, truth: Any, ask: Any
) -> None:
    wrong = make_patch(load_model(folder).model, version="wrong", base_hash="sha256:" + "0" * 64)
    refused = fleet.activate(str(wrong.save(tmp_path / "wrong.safetensors")))
    assert refused.status_code == 503
    assert "cannot be prepared everywhere" in refused.json()["error"]["message"]
    assert eventually(fleet.ready, 20)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(fleet, prompts[0]), range(16)))
    assert {answer["headers"]["x-nest-patch"] for answer in answers} == {"v1"}
    assert all(answer["choices"][0]["token_ids"] == truth("v1", 0) for answer in answers)
    assert fleet.http("POST", "/v1/patches/activate", json={"patch": "x"}).status_code == 401
    assert fleet.http("POST", "/v1/patches/rollback").status_code == 404
