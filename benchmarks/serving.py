"""Both servers of the benchmarks, started on the same weights, and a client that asks them over a bare socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

VERSIONS = ("v1", "v2", "v3")
TOKEN = "benchmark"
CACHE_TOKENS, BATCH_TOKENS, PAGE_TOKENS = 16384, 512, 32
START_SECONDS = 180


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    port: int
    process: int

    def processor_seconds(self) -> float:
        """What its process has used so far."""
        times = psutil.Process(self.process).cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True)
class Ask:
    """One streamed answer: when it began, when its chunks with text came (``perf_counter``), and its text."""

    began: float
    came: tuple[float, ...]
    text: str

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.came[0] - self.began

    @property
    def whole(self) -> float:
        """Seconds to the last text."""
        return self.came[-1] - self.began


def reference() -> tuple[Path, list[str]]:
    """The folder of the reference model, and its shipped patches."""
    from nest_runtime.model.load import REFERENCE_FOLDER

    return Path(REFERENCE_FOLDER), list(VERSIONS)


def random_model(folder: Path, seed: int) -> tuple[Path, list[str]]:
    """A random Llama that the reference tokenizer fits, and three random patches for it."""
    import torch
    from runtime import random_patch  # the benchmark beside this one
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, _ = reference()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, target = LlamaForCausalLM(config).eval(), folder / "random"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = [random_patch(model, v, seed + i).save(folder / f"{v}.safetensors") for i, v in enumerate(VERSIONS, 1)]
    return target, [str(file) for file in files]


@contextmanager
def theirs(model: Path, threads: int, folder: Path) -> Iterator[Server]:
    """``transformers serve`` on a free port, with the cache and the batch that ours has."""
    port = free_port()
    sizes = {"num-blocks": CACHE_TOKENS // PAGE_TOKENS, "block-size": PAGE_TOKENS, "max-batch-tokens": BATCH_TOKENS}
    command = ["transformers", "serve", str(model), "--continuous-batching", "--port", str(port), "--host", "127.0.0.1"]
    options = [word for name, size in sizes.items() for word in (f"--cb-{name}", str(size))]
    script = str(Path(sys.executable).with_name(command[0]))
    with running([script, *command[1:], *options], threads, folder / "theirs.log") as process:
        wait(process, f"http://127.0.0.1:{port}/health", folder / "theirs.log")
        yield Server(port, process.pid)


@contextmanager
def ours(
    model: Path, patches: Sequence[str], threads: int, folder: Path, dtype: str = "auto"
) -> Iterator[tuple[Server, str]]:
    """``nest-runtime serve`` under the last patch, all others and the base exposed; gives it and its model's name."""
    port, token = free_port(), folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    command = [sys.executable, "-m", "nest_runtime.cli.main", "serve", "--model", str(model), "--port", str(port)]
    command += ["--dtype", dtype]
    command += ["--patch", patches[-1], "--expose-base", *(word for patch in patches for word in ("--expose", patch))]
    command += ["--admin-token-file", str(token), "--audit-file", str(folder / "audit.jsonl")]
    command += ["--cache-tokens", str(CACHE_TOKENS), "--batch-tokens", str(BATCH_TOKENS)]
    with running(command, threads, folder / "ours.log") as process:
        ready = wait(process, f"http://127.0.0.1:{port}/ready", folder / "ours.log")
        yield Server(port, process.pid), ready["model"]


@contextmanager
def running(command: Sequence[str], threads: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, whose output goes into a log; ended afterwards."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "NEST_HOME": str(log) + ".home",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = START_SECONDS) -> Any:
    """What a server answers once it is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            response = httpx.get(url)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if response.status_code == 200:
            return response.json()
    raise SystemExit(f"{process.args} does not answer at {url}:\n{log.read_text(errors='replace')[-3000:]}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def whole_answer(port: int, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    """An answer that comes in one piece, and how many tokens it has."""
    body = request_body(model, prompt, tokens) | {"stream": False}
    response = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=120)
    answer = response.raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def request_body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A request for a stream."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}


async def ask(port: int, model: str, prompt: str, tokens: int) -> Ask:
    """One streamed answer over a bare socket. Raises RuntimeError where it is none."""
    body = json.dumps(request_body(model, prompt, tokens)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    began, came, text = time.perf_counter(), [], ""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{model}: {status.decode().strip()}")
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"{model}: {event['error']}")
        piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if piece:
            came.append(time.perf_counter())
            text += piece
    writer.close()
    return Ask(began, tuple(came), text)
