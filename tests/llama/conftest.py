"""Fixtures of the llama.cpp tests: its server in a process of its own. Nothing here imports llama.cpp."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs llama.cpp: deselected by default, run with ``-m llama``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.llama)


class Llama:
    """One running llama.cpp server."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=600, trust_env=False)
        self.plain = self.tokens("a")[0]

    def ask(self, method: str, path: str, **fields: Any) -> Any:
        response = self.client.request(method, path, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    def tokens(self, text: str) -> list[int]:
        """A text's token ids, special tokens read as such."""
        fields = {"content": text, "add_special": False, "parse_special": True}
        return list(self.ask("POST", "/tokenize", json=fields)["tokens"])

    def likely(self, prompt: list[int], tops: int, scale: float | None = None) -> dict[int, float]:
        """Log-probabilities of the ``tops`` likeliest tokens behind a prompt, the likeliest first.

        ``scale`` is the adapter's for this request; None leaves what the server has. The one token generated is always
        the same: the server tells nothing of half a character, nor of an end. Probabilities are those before that.
        """
        fields: dict[str, Any] = {"prompt": prompt, "n_predict": 1, "n_probs": tops, "temperature": 0}
        fields["cache_prompt"] = False  # no keys and values of another scale
        fields["logit_bias"] = [[self.plain, 1000]]
        if scale is not None:
            fields["lora"] = [{"id": 0, "scale": scale}]
        step = self.ask("POST", "/completion", json=fields)["completion_probabilities"][0]
        return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


@contextmanager
def running(*arguments: Path) -> Iterator[Llama]:
    """llama.cpp's server over a model and perhaps an adapter."""
    python = os.environ.get("NEST_LLAMA_PYTHON")
    if not python:
        pytest.skip("NEST_LLAMA_PYTHON names no Python with llama.cpp: tests/llama/install.sh makes one")
    script = Path(__file__).parent / "serve.py"
    process = subprocess.Popen(
        [python, str(script), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http"), f"llama.cpp did not start: {url!r}"
        yield Llama(url)
    finally:
        process.terminate()
        process.wait(60)
