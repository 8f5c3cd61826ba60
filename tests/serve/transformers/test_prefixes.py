"""Keys and values of a shared beginning are found again under the same patch, and under no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.transformers.prefixes import patch_marks
from tests.support.serve import PROMPTS, Reference, Running, serving

pytest_plugins = ["tests.support.fixtures_serve"]

PREFIX = " ".join(PROMPTS)
PAGES = 5 * 32  # whole pages of its tokens
ENDS = [" And then?", " Why?", " Who says so?"]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


def same_as_alone(server: Running, files: dict[str, str], reference: Reference) -> None:
    """Long prompts that begin alike, through swaps and in mixed batches; every answer is its patch's alone."""
    client = server.client()

    def answer(model: str, end: str) -> str | None:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": PREFIX + end}], max_tokens=40
        )
        return answer.choices[0].message.content

    for version in ("v1", "v2", "v1", "v3", "v2"):
        server.admin("POST", "/v1/patches/activate", json={"patch": files[version]})
        for end in ENDS:
            assert answer(server.name, end) == reference.chat(PREFIX + end, version, 40), version
    names: list[tuple[str, str | None]] = [
        (server.name, "v2"),
        (f"{server.name}@v1", "v1"),
        (f"{server.name}@v3", "v3"),
        (f"{server.name}@base", None),
    ]
    asked = [(name, version, end) for end in ENDS for name, version in names]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: answer(one[0], one[2]), asked))
    assert found == [reference.chat(PREFIX + end, version, 40) for _, version, end in asked]


@pytest.fixture
def all_exposed(config: ServeConfig, files: dict[str, str]) -> ServeConfig:
    limits = Limits(cache_tokens=8192, batch_tokens=128)
    return replace(config, expose=(files["v1"], files["v3"]), expose_base=True, limits=limits)


def test_no_block_of_one_patch_is_read_under_another(
    all_exposed: ServeConfig, files: dict[str, str], reference: Reference
) -> None:
    with serving(all_exposed) as server:
        same_as_alone(server, files, reference)
        assert server.server.service.engine.reused_tokens >= 8 * PAGES  # and blocks were shared all the while


def test_without_the_guard_that_test_fails(
    all_exposed: ServeConfig, files: dict[str, str], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nest_runtime.serve.transformers.prefixes.patch_marks", lambda patch, count: (0,) * count)
    with serving(all_exposed) as server, pytest.raises(AssertionError):
        same_as_alone(server, files, reference)


def test_reuse_is_per_patch(all_exposed: ServeConfig, files: dict[str, str]) -> None:
    with serving(all_exposed) as server:
        client, engine = server.client(), server.server.service.engine

        def reused_for(model: str, end: str) -> int:
            before = engine.reused_tokens
            messages: list[Any] = [{"role": "user", "content": PREFIX + end}]
            client.chat.completions.create(model=model, messages=messages, max_tokens=2)
            return engine.reused_tokens - before

        for model in (server.name, f"{server.name}@v3", f"{server.name}@base"):
            assert [reused_for(model, end) for end in ENDS] == [0, PAGES, PAGES]
        server.admin("POST", "/v1/patches/activate", json={"patch": files["v2"]})
        assert reused_for(server.name, ENDS[0]) == 0
        server.admin("POST", "/v1/patches/rollback")
        assert reused_for(server.name, ENDS[0]) >= PAGES  # v1's are still there
        assert f"nest_prompt_tokens_reused {float(engine.reused_tokens)}" in server.http("GET", "/metrics").text


def test_marks_belong_to_one_patch() -> None:
    keys = [None, *(f"sha256:{n:064x}" for n in range(200))]
    marks = {patch_marks(key, 32) for key in keys}
    assert len(marks) == len(keys)
    assert patch_marks(None, 32) == (0,) * 32
    assert all(0 <= number < 2**31 for row in marks for number in row)
