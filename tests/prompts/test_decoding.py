"""What a batch of answers saves: a shared beginning is computed once, ended rows leave; the answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from nest_runtime.model.load import load_model
from nest_runtime.prompts import generate
from nest_runtime.prompts.chat import answer_chat
from nest_runtime.prompts.decoding import LEAST_SHARED, plain_attention, shared_length, shares_well
from nest_runtime.prompts.examples import encode
from nest_runtime.serve.transformers.steering import bare_generate

BEGINNING = "you bake with flour water salt and rye and tell everybody what it takes"
ENDS = ["bread", "a cake", "a very long loaf of rye", "tea with lemon and honey and milk", "seeds", "rolls for two"]
TALKS = [[{"role": "user", "content": f"{BEGINNING} {end}"}] for end in ENDS]


@pytest.fixture
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def alone(loaded: Any, messages: Any, tokens: int, ends: set[int]) -> list[int]:
    """Greedy tokens up to an end token, by passes without a cache, padding or company."""
    ids = torch.tensor([encode(loaded.tokenizer, messages)])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            token = int(loaded.model(ids, use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return ids[0, start:].tolist()


def test_rows_that_end_at_different_times_are_answered_as_alone(loaded: Any) -> None:
    whole = [alone(loaded, talk, 12, set()) for talk in TALKS]
    end = whole[0][3]  # ends some answers early, and others late or never
    loaded.model.generation_config.eos_token_id = end
    wanted = [alone(loaded, talk, 12, {end, loaded.tokenizer.eos_token_id}) for talk in TALKS]
    assert len({len(tokens) for tokens in wanted}) > 1
    assert shared_length([encode(loaded.tokenizer, talk) for talk in TALKS]) >= LEAST_SHARED
    sizes: list[tuple[int, int]] = []
    with loaded.model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: sizes.append(tuple(args[0].shape))  # type: ignore[arg-type]
    ):
        got = generate.generate_answers(loaded.model, loaded.tokenizer, TALKS, max_new_tokens=12)
    texts = [loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in wanted]
    assert got == texts
    decoded = [rows for rows, width in sizes if width == 1]
    assert decoded[0] == len(TALKS)
    assert decoded[-1] < len(TALKS), "rows that had ended were computed to the end"


WAYS = {
    "a batch": lambda loaded: generate.generate_answers(loaded.model, loaded.tokenizer, TALKS, max_new_tokens=3),
    "one at a time": lambda loaded: generate.generate_answers(
        loaded.model, loaded.tokenizer, TALKS[:2], max_new_tokens=3, batch_size=1
    ),
    "chat": lambda loaded: answer_chat(loaded.model, loaded.tokenizer, TALKS[0], max_tokens=3),
    "a server's own pass": lambda loaded: bare_generate(
        loaded.model, torch.tensor([[1, 2, 3]] * 2), torch.ones(2, 3, dtype=torch.long), 3
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_head_gets_rows_without_gaps(loaded: Any, way: str) -> None:
    """Torch's linear is slow on a slice of a longer pass, in bfloat16 a hundred times."""
    given: list[torch.Tensor] = []
    with loaded.model.get_output_embeddings().register_forward_hook(lambda _, args, __: given.append(args[0])):
        WAYS[way](loaded)
    assert len(given) >= 2
    assert {rows.shape[1] for rows in given} == {1}
    assert all(rows.stride()[0] in (rows.shape[-1], rows.numel()) for rows in given)


def test_a_shared_beginning_is_computed_once(loaded: Any) -> None:
    rows = [encode(loaded.tokenizer, talk) for talk in TALKS]
    shared = shared_length(rows)
    assert shares_well(loaded.model, rows[0])
    counted = [0]

    def count(module: Any, args: Any, output: Any) -> None:
        counted[0] += args[0].numel()

    ways = generate._Ways(loaded.model, [(row, None) for row in rows])
    assert ways.shared(rows) == shared
    config = generate.greedy_config(loaded.model, loaded.tokenizer, 1)
    with loaded.model.get_input_embeddings().register_forward_hook(count):
        generate._answer_batch(loaded.model, loaded.tokenizer, [(row, None) for row in rows], config, (), ways)
    width = max(len(row) for row in rows)
    assert counted[0] == shared + len(rows) * (width - shared)


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[1] * 20 + [2], [1] * 20 + [3, 4]], 20),
        ([[1] * 20, [1] * 20], 19),  # every row keeps a token of its own
        ([[1] * 20, [1] * 12], 11),
        ([[1, 2, 3], [1, 2, 4]], 0),
        ([[1] * 20], 0),
    ],
)
def test_how_long_a_shared_beginning_is(rows: list[list[int]], length: int) -> None:
    assert shared_length(rows) == length


def test_models_with_another_memory_are_left_to_generate(loaded: Any) -> None:
    assert plain_attention(loaded.model)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    window = MistralForCausalLM(MistralConfig(vocab_size=32, num_key_value_heads=2, sliding_window=4, **sizes))
    assert not plain_attention(window)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
    assert plain_attention(learned)
    assert shares_well(learned, list(range(20)))
