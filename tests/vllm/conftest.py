"""Fixtures of the vLLM tests: a tiny model, three patches, and what each must answer. Nothing here imports vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from tests.conftest import save_tiny
from tests.support.patches import make_patch
from tests.support.serve import Reference

# A little memory for keys and values; threads left where the system puts them; nothing asked of the network.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENGINE_READY_TIMEOUT_S": "600",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs vLLM: deselected by default, run with ``-m vllm``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 LlamaForCausalLM with heads of a size that vLLM knows, even in number for two ranks."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(folder, "LlamaForCausalLM", "LlamaConfig", **sizes)


@pytest.fixture(scope="session")
def patches(folder: Path) -> list[Patch]:
    """Three patches that answer differently, v3 with loadings."""
    loaded = load_model(folder)
    return [
        make_patch(
            loaded.model,
            version=f"v{seed}",
            serial=seed,
            seed=seed,
            scale=0.5,
            neurons=40,
            loadings=seed == 3,
            base_hash=loaded.hash,
        )
        for seed in (1, 2, 3)
    ]


@pytest.fixture(scope="session")
def files(patches: list[Patch], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Version → patch file."""
    where = tmp_path_factory.mktemp("patches")
    return {patch.version: str(patch.save(where / f"{patch.version}.safetensors")) for patch in patches}


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids: short ones, and one long enough that whole blocks of its keys and values are kept."""
    short = [[1, 40 + k, 61, 7 + 3 * k, 90, 200 - k] for k in range(5)]
    return [*short, [1, *((17 * k) % 250 + 20 for k in range(300))]]


@pytest.fixture(scope="session")
def truth(folder: Path, patches: list[Patch], prompts: list[list[int]]) -> Callable[[str | None, int], list[int]]:
    """The tokens that the transformers model gives, greedily, for a prompt by number under a version or None."""
    reference, known = Reference(folder, patches), {}
    count = 24

    def tokens(version: str | None, number: int) -> list[int]:
        if (version, number) not in known:
            known[version, number] = reference.tokens(prompts[number], version, count)
        return known[version, number]

    return tokens


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """One completion of a prompt of token ids, greedy; its body with the headers under ``headers``."""

    def asked(server: Any, prompt: list[int], model: str = "tiny", count: int = 24, **more: Any) -> dict[str, Any]:
        fields = {"model": model, "prompt": prompt, "max_tokens": count, "return_token_ids": True, **more}
        response = server.http("POST", "/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        return {**response.json(), "headers": response.headers}

    return asked
