"""Greedy answers: the same as transformers one at a time, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode
from nest_runtime.prompts.generate import end_token_ids, generate_answers

WORDS = ["bread", "cake", "a", "very", "long", "loaf", "of", "rye", "with", "caraway", "seeds", "|", "tea"]
CONVERSATIONS = [[{"role": "user", "content": " ".join(WORDS[: n + 1])}] for n in range(len(WORDS))]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def one_at_a_time(loaded: Any, messages: list[dict[str, str]], tokens: int) -> str:
    """An independent greedy loop without a cache."""
    ids = torch.tensor([encode(loaded.tokenizer, messages)])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            token = loaded.model(ids, use_cache=False).logits[0, -1].argmax()
            if int(token) == loaded.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return loaded.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_answers_equal_single_ones(loaded: Any, batch_size: int) -> None:
    wanted = [one_at_a_time(loaded, messages, 12) for messages in CONVERSATIONS]
    got = generate_answers(loaded.model, loaded.tokenizer, CONVERSATIONS, max_new_tokens=12, batch_size=batch_size)
    assert got == wanted


def test_sampling_settings_of_the_checkpoint_do_not_leak_in(loaded: Any) -> None:
    before = generate_answers(loaded.model, loaded.tokenizer, CONVERSATIONS, max_new_tokens=6)
    config = loaded.model.generation_config
    config.do_sample, config.temperature, config.max_length = True, 5.0, 3
    try:
        assert generate_answers(loaded.model, loaded.tokenizer, CONVERSATIONS, max_new_tokens=6) == before
    finally:
        config.do_sample, config.temperature, config.max_length = False, None, None


def test_the_answer_ends_at_the_end_token(loaded: Any) -> None:
    end = end_token_ids(loaded.model, loaded.tokenizer)[0]
    handle = loaded.model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([end]), 1e4)
    )
    try:
        assert generate_answers(loaded.model, loaded.tokenizer, CONVERSATIONS[:2], max_new_tokens=5) == ["", ""]
    finally:
        handle.remove()


def test_stop_texts_cut_the_answer(loaded: Any) -> None:
    whole = generate_answers(loaded.model, loaded.tokenizer, CONVERSATIONS[:1], max_new_tokens=16)[0]
    stop = whole[4]
    cut = generate_answers(loaded.model, loaded.tokenizer, CONVERSATIONS[:1], max_new_tokens=16, stop=[stop])[0]
    assert cut == whole[: whole.index(stop)].strip()


def test_batches_and_progress_are_reported(loaded: Any) -> None:
    seen: dict[int, str] = {}
    ticks: list[tuple[str, int, int]] = []
    answers = generate_answers(
        loaded.model,
        loaded.tokenizer,
        CONVERSATIONS,
        max_new_tokens=3,
        batch_size=5,
        on_batch=lambda positions, texts: seen.update(zip(positions, texts, strict=True)),
        progress=lambda *tick: ticks.append(tick),
    )
    assert [seen[index] for index in range(len(answers))] == answers
    assert ticks[-1] == ("generate", len(answers), len(answers))


def test_nothing_to_answer(loaded: Any) -> None:
    assert generate_answers(loaded.model, loaded.tokenizer, []) == []
