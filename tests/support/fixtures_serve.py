"""Fixtures of the server's tests: ``pytest_plugins = ["tests.support.fixtures_serve"]`` in a test module.

Each module makes its own ``server``: another plugin has a fixture of that name.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Allowed, Limits, ServeConfig
from nest_runtime.serve.requests.sampling import choose_tokens
from tests.support.patches import make_patch
from tests.support.serve import TOKEN


@pytest.fixture(scope="session")
def patches(tiny_llama: Path) -> list[Patch]:
    loaded = load_model(tiny_llama)
    return [
        make_patch(
            loaded.model, version=f"v{seed}", serial=seed, seed=seed, scale=1.0, neurons=40, base_hash=loaded.hash
        )
        for seed in (1, 2, 3)
    ]


@pytest.fixture
def files(patches: list[Patch], tmp_path: Path) -> dict[str, str]:
    return {patch.version: str(patch.save(tmp_path / f"{patch.version}.safetensors")) for patch in patches}


@pytest.fixture
def config(tiny_llama: Path, files: dict[str, str], tmp_path: Path) -> ServeConfig:
    token_file = tmp_path / "admin-token"
    token_file.write_text(f"{TOKEN}\n")
    token_file.chmod(0o600)
    return ServeConfig(
        model=str(tiny_llama),
        patch=files["v1"],
        port=0,
        admin_token_file=token_file,
        audit_file=tmp_path / "audit.jsonl",
        limits=Limits(cache_tokens=4096, batch_tokens=128, drain_seconds=30),
        allowed=Allowed(completions=True, special_tokens=True),
    )


@pytest.fixture
def slow_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms at least: a request of hundreds of tokens is still running when a test looks."""

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.01)
        return choose_tokens(*arguments)

    for module in ("continuous", "steering"):
        monkeypatch.setattr(f"nest_runtime.serve.transformers.{module}.choose_tokens", slowly)
