"""vLLM started the ordinary way, compiled and not eager, with the plugin named: patches come, are on, and go back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nest_runtime.patch.patch import Patch
from tests.support.serve import TOKEN, Process, eventually

PORT = 18473


@pytest.fixture(scope="module")
def ordinary(folder: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "nest-base", "--dtype", "float32", "--max-model-len", "768"]
    command += ["--host", "127.0.0.1", "--port", str(PORT), "--max-num-seqs", "8"]
    mine = {
        "VLLM_PLUGINS": "nest_runtime",
        "NEST_HOME": str(home),
        "NEST_PATCH": files["v1"],
        "NEST_ADMIN_TOKEN_FILE": str(token),
        "NEST_ALLOW": "completions,special-tokens",
        "OMP_NUM_THREADS": "1",
    }
    with (home / "log").open("w") as log:
        popen = subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, **mine})
    server = Process(popen, f"http://127.0.0.1:{PORT}", "tiny", home / "log")

    def ready() -> bool:
        assert popen.poll() is None, server.log.read_text()[-3000:]
        try:
            return server.http("GET", "/ready").status_code == 200
        except httpx.HTTPError:
            return False

    assert eventually(ready, 500), server.log.read_text()[-3000:]
    yield server
    popen.terminate()
    popen.wait(120)


def test_patches_come_and_go_in_compiled_code(
    ordinary: Process, patches: list[Patch], files: dict[str, str], prompts: Any, truth: Any, ask: Any
) -> None:
    assert "Enforce eager set" not in ordinary.log.read_text()

    def check(version: str) -> None:
        for number, prompt in enumerate(prompts):
            answer = ask(ordinary, prompt)
            assert answer["choices"][0]["token_ids"] == truth(version, number)
            assert answer["headers"]["x-nest-patch"] == version

    check("v1")
    assert ordinary.admin("POST", "/v1/patches", json={"patch": files["v2"]}).status_code == 200
    check("v1")
    assert ordinary.admin("POST", "/v1/patches/activate", json={"patch": "v2"}).json()["active"] == "v2"
    check("v2")
    assert ordinary.admin("POST", "/v1/patches/rollback").json()["active"] == "v1"
    check("v1")
    assert ordinary.http("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
