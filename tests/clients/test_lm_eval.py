"""lm-eval, a client that nobody here wrote, through its ``local-completions`` and ``local-chat-completions`` models.

Its data are made here, nothing is downloaded: prompts, and what ``model.generate`` answers under the
patch that the server has on. The harness must find every answer equal to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.patch.patch import Patch
from nest_runtime.serve import ServeConfig
from tests.support.serve import PROMPTS, Reference, Running, serving

lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
pytest_plugins = ["tests.support.fixtures_serve"]

NEW_TOKENS = 12


@pytest.fixture
def server(config: ServeConfig, files: dict[str, str]) -> Iterator[Running]:
    with serving(replace(config, expose=(files["v2"],), expose_base=True)) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


def _compared(document: dict[str, str], answers: list[str]) -> dict[str, float]:
    return {"same": float(answers[0] == document["answer"])}


def score(server: Running, model: str, task: str, answers: dict[str, str], folder: Path, **options: Any) -> float:
    """The share of prompts whose answer, over the API, is the expected one."""
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in answers.items()))
    chat = "chat" in task
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["never said"], "max_gen_toks": NEW_TOKENS, "temperature": 0},
        "process_results": _compared,
        "metric_list": [{"metric": "same", "aggregation": "mean", "higher_is_better": True}],
    }
    path = "chat/completions" if chat else "completions"
    arguments = {"model": model, "base_url": f"{server.url}/v1/{path}", "tokenized_requests": False, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model=f"local-{'chat-' if chat else ''}completions",
        model_args={**arguments, "tokenizer_backend": None, **options},
        tasks=[config],
        task_manager=TaskManager(include_defaults=False),  # thousands of files otherwise
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    return float(found["results"][task]["same,none"])


@pytest.mark.parametrize("version", ["v1", "v2", None])
def test_completions(server: Running, reference: Reference, tmp_path: Path, version: str | None) -> None:
    tokenizer = reference.loaded.tokenizer
    answers = {
        prompt: tokenizer.decode(
            reference.tokens(tokenizer(prompt)["input_ids"], version, NEW_TOKENS), skip_special_tokens=True
        )
        for prompt in PROMPTS
    }
    model = server.name if version == "v1" else f"{server.name}@{version or 'base'}"
    assert score(server, model, "completions", answers, tmp_path) == 1.0
    wrong = {prompt: answer + "!" for prompt, answer in answers.items()}
    assert score(server, model, "completions_wrong", wrong, tmp_path) == 0.0


def test_chat_with_several_requests_at_once(server: Running, reference: Reference, tmp_path: Path) -> None:
    answers = {prompt: reference.chat(prompt, "v1", NEW_TOKENS) for prompt in PROMPTS}
    assert score(server, server.name, "chat", answers, tmp_path, num_concurrent=3) == 1.0
