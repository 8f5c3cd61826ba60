"""Sampling at its edges, and what the model's own generation config asks for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode
from nest_runtime.prompts.generate import generate_answers
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.requests.sampling import Sampler, SamplingParams, choose_tokens
from nest_runtime.serve.transformers.own_rules import not_honoured, own_rules
from tests.support.serve import PROMPTS, serving

pytest_plugins = ["tests.support.fixtures_serve"]

OWN: dict[str, Any] = {
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[40], [41, 42]],
    "min_new_tokens": 6,
    "suppress_tokens": [43, 44],
    "begin_suppress_tokens": [45],
    "sequence_bias": [[[50], 1.5], [[51, 52], 3.0]],
    "exponential_decay_length_penalty": [8, 1.1],
}


@pytest.mark.parametrize("temperature", [5e-324, 1e-307, 1e-40, 1e-12, 9e-6])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(SamplingParams(temperature=temperature, top_p=0.9, seed=row)) for row in range(4)]
    assert choose_tokens(logits, samplers).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-2])
def test_small_temperatures_above_that_draw_from_what_is_likely(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -3.0]])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1))
    assert {int(choose_tokens(logits, [sampler])) for _ in range(60)} == {1, 2}


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0]])  # probabilities 0.70, 0.26, 0.03, 0.01
    for min_p, allowed in ((0.5, {0}), (0.2, {0, 1}), (0.03, {0, 1, 2})):
        sampler = Sampler(SamplingParams(temperature=1.0, min_p=min_p, seed=0))
        assert {int(choose_tokens(logits, [sampler])) for _ in range(400)} == allowed


def test_rules_of_one_row_leave_the_others_alone() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    config = GenerationConfig(suppress_tokens=[int(logits[1].argmax())])
    rules = own_rules(config, (2,), logits.device)(1, 5)
    kept = logits.clone()
    found = choose_tokens(
        logits, [Sampler(SamplingParams()), Sampler(SamplingParams(), 0, rules, (7,)), Sampler(SamplingParams())]
    )
    best = logits.topk(2).indices
    assert found.tolist() == [int(best[0, 0]), int(best[1, 1]), int(best[2, 0])]
    assert torch.equal(logits, kept)


def test_what_is_not_honoured_is_named() -> None:
    assert not_honoured(None) == not_honoured(GenerationConfig()) == []
    assert not_honoured(GenerationConfig(num_beams=4, typical_p=0.5, repetition_penalty=2.0)) == [
        "typical_p",
        "num_beams",
    ]


@pytest.fixture(scope="module")
def willful(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation config has an opinion about everything."""
    folder = tmp_path_factory.mktemp("willful") / "model"
    shutil.copytree(tiny_llama, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **OWN}))
    return folder


@pytest.mark.parametrize("engine", ["transformers", "generate"])
def test_the_models_own_config_decides(config: ServeConfig, willful: Path, tiny_llama: Path, engine: str) -> None:
    """Served answers are those of ``model.generate`` with the model's own config, and of evaluation."""
    loaded, plain = load_model(willful), load_model(tiny_llama)
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    truth = generate_answers(loaded.model, loaded.tokenizer, messages, max_new_tokens=24, batch_size=1)
    assert truth != generate_answers(plain.model, plain.tokenizer, messages, max_new_tokens=24)
    ids = torch.tensor([encode(loaded.tokenizer, messages[0])])
    with torch.no_grad():
        rows = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24)
    assert loaded.tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True).strip() == truth[0]
    with serving(replace(config, model=str(willful), patch=None, engine=engine)) as server:
        for prompt, expected in zip(PROMPTS, truth, strict=True):
            body = {"model": server.name, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24}
            answer = server.http("POST", "/v1/chat/completions", json=body)
            assert answer.json()["choices"][0]["message"]["content"].strip() == expected
        tiny = server.http("POST", "/v1/chat/completions", json={**body, "temperature": 1e-307})
        assert tiny.json()["choices"][0]["message"]["content"].strip() == expected
