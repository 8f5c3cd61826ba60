"""Fixtures of the llama.cpp tests: its binding and its server, each in a process of its own.

Nothing here imports llama.cpp. It is in the environment that install.sh makes and NEST_LLAMACPP names.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

READY_SECONDS = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs llama.cpp: deselected by default, run with ``-m llamacpp``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.llamacpp)


def environment(*needed: str) -> Path:
    """The folder that install.sh made; skips where it, or a part of it, is not there."""
    named = os.environ.get("NEST_LLAMACPP")
    if not named:
        pytest.skip("NEST_LLAMACPP names no environment with llama.cpp: tests/llamacpp/install.sh DIR makes one")
    for part in needed:
        if not (Path(named) / part).exists():
            pytest.skip(f"{Path(named) / part} is not there: tests/llamacpp/install.sh {named} makes it")
    return Path(named)


def source() -> Path:
    """llama.cpp's source, as the source package brings it."""
    found = sorted(environment().glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        pytest.skip(f"{environment()} holds no source of llama.cpp: tests/llamacpp/install.sh makes it")
    return found[-1]


def real_model(name: str) -> Path:
    """A real model's file in the folder that NEST_REAL_MODELS names; skips where it is not there."""
    path = Path(os.environ.get("NEST_REAL_MODELS", "/nowhere")) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there: NEST_REAL_MODELS names the folder (tests/real/fetch.sh brings SmolLM2)")
    return path


class Binding:
    """llama.cpp over one model by its binding: binding.py in a process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._read()

    def tokens(self, text: str) -> list[int]:
        """A text's token ids, control tokens read as such."""
        return list(self._ask(tokens=text)["tokens"])

    def logits(self, ids: list[int], first: int, scale: float) -> torch.Tensor:
        """Logits (positions from ``first`` on, vocabulary) of a sequence, the adapter at a scale."""
        rows, columns = self._ask(logits=ids, first=first, scale=scale)["shape"]
        assert self.process.stdout is not None
        data = bytearray(self.process.stdout.read(4 * rows * columns))
        return torch.frombuffer(data, dtype=torch.float32).reshape(rows, columns)

    def answer(self, ids: list[int], count: int, ends: list[int], scale: float) -> list[int]:
        """The greedy answer to a prompt, without the token that ends it."""
        return list(self._ask(answer=ids, count=count, ends=ends, scale=scale)["tokens"])

    def _ask(self, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields).encode() + b"\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "llama.cpp ended; its words are above"
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def binding(model: Path, adapter: Path | None = None, *, float32: bool = False) -> Iterator[Binding]:
    """llama.cpp over a model and perhaps an adapter; ``float32`` for keys, values and attention too."""
    arguments = [str(path) for path in (model, adapter) if path is not None] + ["--float32"] * float32
    command = [str(environment("bin/python") / "bin/python"), str(Path(__file__).parent / "binding.py"), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Binding(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


class Server:
    """One running llama-server."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=600, trust_env=False)

    def ask(self, method: str, path: str, **fields: Any) -> Any:
        """The JSON of an answer, which must be a success."""
        response = self.client.request(method, path, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, prompt: str, count: int = 24, **fields: Any) -> str:
        """The greedy answer to one user's turn."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": count, "temperature": 0, **fields}
        answer = self.ask("POST", "/v1/chat/completions", json=body)
        return str(answer["choices"][0]["message"]["content"])

    def likely(self, prompt: str, **fields: Any) -> dict[int, float]:
        """Log-probabilities of the likeliest first tokens of an answer to one user's turn.

        The token generated is always the same one, because the server tells nothing of an end or of half a character;
        the probabilities are those before that.
        """
        messages = {"messages": [{"role": "user", "content": prompt}]}
        text = self.ask("POST", "/apply-template", json=messages)["prompt"]
        plain = self.ask("POST", "/tokenize", json={"content": "a"})["tokens"][0]
        body = {"prompt": text, "n_predict": 1, "n_probs": 200, "temperature": 0, "logit_bias": [[plain, 1000]]}
        step = self.ask("POST", "/completion", json=body | fields)["completion_probabilities"][0]
        return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}

    def adapters(self) -> list[dict[str, Any]]:
        """What ``GET /lora-adapters`` says."""
        return list(self.ask("GET", "/lora-adapters"))

    def scale(self, *scales: dict[str, float]) -> None:
        """``POST /lora-adapters``."""
        assert self.ask("POST", "/lora-adapters", json=list(scales)) == {"success": True}


@contextmanager
def server(model: Path, *options: str) -> Iterator[Server]:
    """llama-server over a model, on a free port, with one slot unless the options say otherwise."""
    program = environment("bin/llama-server") / "bin/llama-server"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "1024", "-np", "1"]
    process = subprocess.Popen(
        [*command, "-t", threads, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    running = Server(f"http://127.0.0.1:{port}")
    try:
        _wait(process, running.client)
        yield running
    finally:
        running.client.close()
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """Until the server has loaded its model."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"llama-server ended with status {process.returncode}"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"llama-server was not ready in {READY_SECONDS:.0f} s")


def converted(model: Path, out: Path, **older: Any) -> Path:
    """A folder's model as llama.cpp's own converter writes it, in float32; ``older`` settings as in convert.py."""
    program = str(Path(__file__).parent / "convert.py")
    command = [sys.executable, program, str(source()), str(model), str(out), json.dumps(older)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out
