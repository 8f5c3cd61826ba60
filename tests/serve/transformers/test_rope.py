"""An answer does not depend on what is served beside it, or before it, for every kind of rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nest_runtime.errors import EngineError
from nest_runtime.model.load import load_model
from nest_runtime.serve import Limits
from nest_runtime.serve.transformers.rope import context_of, short_context
from tests.conftest import save_tiny
from tests.support.engine import alone, answers

ORIGINAL, MOST = 64, 256
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.1 * n for n in range(8)],
        "long_factor": [4.0 + 1.5 * n for n in range(8)],
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"factor": 4.0},
}
SHORT = [[10, 20, 30, 40], list(range(5, 40)), [7]]


def test_every_kind_that_transformers_knows_is_tried() -> None:
    assert set(KINDS) == {"default", *ROPE_INIT_FUNCTIONS}


def folder(kind: str, path: Path) -> Path:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]}
    return save_tiny(
        path / kind,
        "LlamaForCausalLM",
        "LlamaConfig",
        rope_parameters=parameters,
        max_position_embeddings=MOST,
        initializer_range=0.2,
    )


@pytest.mark.parametrize("engine", ["transformers", "generate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_answer_is_the_same_beside_and_after_long_ones(kind: str, engine: str, tmp_path: Path) -> None:
    loaded = load_model(folder(kind, tmp_path))
    reach = min(short_context(loaded.model) or MOST, MOST)
    assert context_of(loaded.model, None) == reach == (ORIGINAL if kind == "longrope" else MOST)
    truth = [alone(loaded.model, prompt, 8) for prompt in SHORT]
    long = [n % 290 + 6 for n in range(reach - 20)]
    beside = [(long, None, 20), *((prompt, None, 8) for prompt in SHORT), (SHORT[1] + long[: reach - 60], None, 20)]
    groups = [beside, [(prompt, None, 8) for prompt in SHORT], beside]
    found = answers(loaded.model, engine, groups)
    assert found[0][1:4] == found[1] == found[2][1:4] == truth


def test_a_longer_context_is_had_by_asking_and_has_one_set_of_frequencies(tmp_path: Path) -> None:
    loaded = load_model(folder("longrope", tmp_path))
    untouched = load_model(tmp_path / "longrope").model
    long = [n % 290 + 6 for n in range(180)]
    limits = Limits(cache_tokens=4096, batch_tokens=128, context=MOST)
    groups = [[(long, None, 8), (SHORT[1], None, 8)], [(SHORT[1], None, 8)], [(long, None, 8)]]
    found = answers(loaded.model, "transformers", groups, limits=limits)
    assert found[0][0] == found[2][0] == alone(untouched, long, 8)
    assert found[0][1] == found[1][0]
    with pytest.raises(EngineError, match="a context of 257 tokens was asked for; the model has 256 positions"):
        context_of(untouched, MOST + 1)
    assert [context_of(untouched, asked) for asked in (None, 30, ORIGINAL)] == [ORIGINAL, 30, ORIGINAL]
