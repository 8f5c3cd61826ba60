"""llama.cpp with an exported adapter, and our runtime with the patch, on the same GGUF files of real models.

llama.cpp multiplies quantized weights with activations that it rounds to 8 bits; our runtime computes with the same
weights dequantized. So the two differ on the base already, and only what the patched model differs more is the
export's. Where the file's numbers stand in float32, llama.cpp rounds nothing, and the two must be the same.

    NEST_REAL_MODELS=FOLDER tests/llamacpp/install.sh DIR --test       also prints the figures of docs/guide/models.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import render
from nest_runtime.resolve import load_patch
from tests.llamacpp.agreement import (
    BASE,
    PATCHED,
    STATES,
    TOKENS,
    Agreement,
    Logits,
    Subject,
    compared,
    greedy,
    logits_of,
    ours,
    prompts,
    subject,
)
from tests.llamacpp.conftest import Binding, binding, environment, real_model
from tests.support.gguf import dequantized_copy

PATCHES = Path(__file__).parents[2] / "patches"
FILES = {
    "smollm2-135m-instruct": "smollm2-135m-instruct-q4_1.gguf",
    "qwen2.5-coder-0.5b-instruct": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
}


@pytest.fixture(scope="module", params=FILES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    environment("bin/python")
    path = real_model(FILES[request.param])
    patch = load_patch(PATCHES / request.param / "v1.safetensors")
    return subject(path, patch, tmp_path_factory.mktemp("llamacpp"))


@pytest.fixture(scope="module")
def llama(model: Subject) -> Iterator[Binding]:
    """llama.cpp on the file with the adapter, as it computes by default."""
    with binding(model.path, model.adapter) as running:
        yield running


def test_prompts_are_the_same_tokens(model: Subject, llama: Binding) -> None:
    harmful, harmless = prompts()
    for example, row in zip([*harmful, *harmless], model.rows, strict=True):
        assert llama.tokens(render(model.loaded.tokenizer, example.messages)) == row


def test_the_patch_adds_nothing_to_the_difference(model: Subject, llama: Binding) -> None:
    half = load_model(model.path, device="cpu", dtype="bfloat16")
    found: dict[tuple[str, str], Agreement] = {}
    for state, scale in STATES.items():
        theirs = logits_in(llama, scale)
        with ours(model.loaded, model.patch, state), ours(half, model.patch, state):
            float32, bfloat16 = logits_of(model.loaded.model), logits_of(half.model)
            found["llama.cpp, ours in float32", state] = compared(model, state, float32, theirs)
            found["llama.cpp, ours in bfloat16", state] = compared(model, state, bfloat16, theirs)
            found["ours in bfloat16 and float32", state] = compared(model, state, float32, bfloat16)
    with ours(model.loaded, model.patch, PATCHED):
        moved = compared(model, PATCHED, logits_of(model.loaded.model), logits_in(llama, STATES[BASE]))
    report(model, found | {("ours patched, llama.cpp's base", PATCHED): moved})
    base, patched = (found["llama.cpp, ours in float32", state] for state in STATES)
    assert base.rate > 0.9
    assert patched.rate >= base.rate - 0.02
    assert patched.largest <= 1.5 * base.largest
    assert patched.mean <= 1.2 * base.mean
    assert moved.mean > 2 * patched.mean
    assert moved.rate < patched.rate - 0.1


def test_in_float32_nothing_is_left_of_the_difference(model: Subject, tmp_path: Path) -> None:
    path = dequantized_copy(model.path, tmp_path / "float32.gguf")
    found: dict[tuple[str, str], Agreement] = {}
    with binding(path, model.adapter, float32=True) as llama:
        for state, scale in STATES.items():
            with ours(model.loaded, model.patch, state):
                mine, theirs = logits_of(model.loaded.model), logits_in(llama, scale)
                found["the file in float32", state] = compared(model, state, mine, theirs)
    path.unlink()
    report(model, found)
    for agreement in found.values():
        assert agreement.largest < 0.01
        assert agreement.margin < 0.01


def test_whole_answers_refuse_alike(model: Subject, llama: Binding) -> None:
    half, refused = load_model(model.path, device="cpu", dtype="bfloat16"), {}
    for state, scale in STATES.items():
        answers = [llama.answer(row, TOKENS, model.ends, scale) for row in model.rows]
        with ours(half, model.patch, state):
            in_half = greedy(half, model.rows, model.ends)
        verdicts = {
            "ours in float32": model.refused(model.answers[state]),
            "ours in bfloat16": model.refused(in_half),
            "llama.cpp": model.refused(answers),
        }
        whole = sum(one == other for one, other in zip(answers, model.answers[state], strict=True))
        whole_half = sum(one == other for one, other in zip(in_half, model.answers[state], strict=True))
        print(f"\n{model.path.name}, {state}, refusals of {model.harmful} harmful and the harmless prompts:")
        for name, verdict in verdicts.items():
            print(f"| {name} | {sum(verdict[: model.harmful])} | {sum(verdict[model.harmful :])} |")
        print(f"whole answers as ours in float32: llama.cpp {whole}, ours in bfloat16 {whole_half} of {len(answers)}")
        mine, theirs = verdicts["ours in float32"], verdicts["llama.cpp"]
        same = sum(one == other for one, other in zip(mine, theirs, strict=True))
        print(f"the same verdict: {same} of {len(mine)}")
        assert same >= 0.9 * len(mine)
        refused[state] = sum(theirs[: model.harmful])
    assert refused[PATCHED] - refused[BASE] > 0.25 * model.harmful  # the adapter acts; a base refuses some by itself


def logits_in(llama: Binding, scale: float) -> Logits:
    """llama.cpp's logits, the adapter at a scale."""
    return lambda ids, first: llama.logits(ids, first, scale)


def report(model: Subject, found: dict[tuple[str, str], Agreement]) -> None:
    """Print the figures, one row a comparison."""
    print(f"\n| {model.path.name} | | same next token | largest | mean | lead where not the same |")
    for (name, state), agreement in found.items():
        print(f"| {name} | {state} | {agreement} |")
