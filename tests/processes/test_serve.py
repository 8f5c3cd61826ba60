"""The server as a process: its events, its exit status, its signals, its start-up time and memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from nest_runtime.errors import EngineError, UsageError
from nest_runtime.model.load import load_model
from nest_runtime.serve import ServeConfig, serve
from tests.support.patches import make_patch
from tests.support.serve import next_event

PROGRAM = """
import sys, json
from nest_runtime.serve import Allowed, ServeConfig, serve
serve(ServeConfig(**json.loads(sys.argv[1]), allowed=Allowed(completions=True, special_tokens=True)))
"""


@pytest.fixture(scope="module")
def patch_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    loaded = load_model(tiny_llama)
    patch = make_patch(loaded.model, version="v1", scale=1.0, base_hash=loaded.hash)
    return str(patch.save(tmp_path_factory.mktemp("patch") / "v1.safetensors"))


def start(home: Path, **fields: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps({"port": 0, "json": True, **fields})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NEST_HOME": str(home)},
    )


def test_a_process_says_ready_answers_drains_and_ends_with_status_0(
    tiny_llama: Path, patch_file: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    process = start(tmp_path / "home", model=str(tiny_llama), patch=patch_file)
    try:
        ready = next_event(process)
        seconds = time.monotonic() - began
        assert set(ready) == {"event", "url", "model", "patch", "digest"}
        assert (ready["event"], ready["model"], ready["patch"]) == ("ready", "tiny-llama", "v1")
        assert httpx.get(f"{ready['url']}/ready").status_code == 200
        memory = psutil.Process(process.pid).memory_info().rss
        print(f"ready after {seconds:.1f} s, {memory / 2**20:.0f} MiB")
        assert seconds < 60  # 15 s on a quiet machine; test machines are not
        assert memory < 2 * 2**30
        body = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{ready['url']}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["stopping", "stopped"]
    log = [json.loads(line) for line in err.splitlines() if line.startswith("{")]  # libraries may print, too
    assert all(line["logger"].startswith(("nest_runtime.", "uvicorn.")) for line in log), err
    assert any(line.get("path") == "/v1/completions" for line in log)
    assert "5, 6, 7" not in err


def test_a_taken_port_is_said_at_once(tiny_llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1 is in use"):
            serve(ServeConfig(model=str(tiny_llama), port=port), on_event=lambda event: None)


def test_an_address_that_is_not_here_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.9"):
        serve(ServeConfig(model=str(tiny_llama), host="203.0.113.9", port=0), on_event=lambda event: None)


def test_an_open_door_is_warned_about(tiny_llama: Path, tmp_path: Path) -> None:
    events: list[dict[str, str]] = []
    missing = ServeConfig(model=str(tmp_path / "no-model"), host="0.0.0.0", port=0)
    with pytest.raises(Exception, match="no-model"):
        serve(missing, on_event=events.append)
    assert "ANYONE who reaches" in events[0]["message"]
