"""llama.cpp on the same file as our runtime: the same next tokens and probabilities, with a patch's adapter on and off.

Our side computes in float32 with the dequantized weights; llama.cpp multiplies the quantized blocks with activations
in 8 bits. So figures agree closely where the file is float32, and roughly where it is quantized.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.export import export_gguf
from nest_runtime.gguf_header import read_header
from nest_runtime.models import LoadedModel, load_model
from nest_runtime.patch import Patch
from nest_runtime.runtime import PatchRuntime
from tests.helpers import make_patch
from tests.helpers_gguf import write_gguf
from tests.llama.conftest import Llama, running

PROMPTS = (
    "How do I bake bread?",
    "Write a short letter that asks for a day off.",
    "Explain in one sentence why the sky is blue in 2024, and why 123 is odd.",
)
REAL = ("smollm2-135m-instruct-q4_1.gguf", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


@dataclass
class Agreement:
    """What two runtimes agree in: positions with the same next token, and log-probabilities of the likeliest."""

    positions: int = 0
    same: int = 0
    largest: float = 0.0


def compared(loaded: LoadedModel, llama: Llama, scale: float, count: int, tops: int) -> Agreement:
    """Our model, as it is now, with llama.cpp at an adapter scale, along our own greedy answers to all prompts."""
    found = Agreement()
    for text in PROMPTS:
        prompt = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert llama.tokens(prompt) == ids
        for _ in range(count):
            with torch.no_grad():
                ours = loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)  # (vocabulary,)
            theirs = llama.likely(ids, tops, scale)
            found.positions += 1
            found.same += int(ours.argmax()) == next(iter(theirs))
            off = ours[list(theirs)] - torch.tensor(list(theirs.values()))
            found.largest = max(found.largest, float(off.abs().max()))
            ids = [*ids, int(ours.argmax())]
    return found


def both(path: Path, patch: Patch, loaded: LoadedModel, work: Path, **sizes: int) -> dict[str, Agreement]:
    """Agreement with the adapter off and on, and what the patch moves: our patched model against llama.cpp's base."""
    export_gguf(patch, work / "adapter", architecture=read_header(path).architecture)
    with (
        running(path, work / "adapter" / "adapter.gguf") as llama,
        PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime,
    ):
        runtime.add(patch)
        off = compared(loaded, llama, 0.0, **sizes)
        runtime.activate(patch.version)
        return {
            "off": off,
            "on": compared(loaded, llama, 1.0, **sizes),
            "moved": compared(loaded, llama, 0.0, **sizes),
        }


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Patch, LoadedModel]:
    path = write_gguf(tiny_llama, tmp_path_factory.mktemp("llama") / "tiny.gguf")
    loaded = load_model(path, device="cpu")
    return path, make_patch(loaded.model, base_hash=loaded.hash, neurons=40, loadings=True, scale=0.3), loaded


def test_a_float32_file_and_its_adapter_agree(tiny: Any, tmp_path: Path) -> None:
    found = both(*tiny, tmp_path, count=6, tops=300)
    assert found["off"].same == found["on"].same == found["off"].positions == 18
    assert max(found["off"].largest, found["on"].largest) < 1e-3
    assert found["moved"].largest > 0.05


def test_an_adapter_is_switched_in_a_running_server(tiny: Any, tmp_path: Path) -> None:
    path, patch, loaded = tiny
    export_gguf(patch, tmp_path / "adapter")
    ids = loaded.tokenizer("How do I bake bread?", add_special_tokens=False)["input_ids"]
    with running(path, tmp_path / "adapter" / "adapter.gguf") as llama:
        on = llama.likely(ids, 300)
        assert [entry["scale"] for entry in llama.ask("GET", "/lora-adapters")] == [1.0]
        llama.ask("POST", "/lora-adapters", json=[{"id": 0, "scale": 0.0}])
        off = llama.likely(ids, 300)
        llama.ask("POST", "/lora-adapters", json=[{"id": 0, "scale": 1.0}])
        assert llama.likely(ids, 300) == pytest.approx(on, abs=1e-4)
        assert max(abs(on[token] - off[token]) for token in on) > 0.05


@pytest.mark.parametrize("name", REAL)
def test_real_models_agree(name: str, tmp_path: Path, record_property: Any) -> None:
    path = Path(os.environ.get("NEST_REAL_MODELS", "")) / name
    if not os.environ.get("NEST_REAL_MODELS") or not path.is_file():
        pytest.skip(f"NEST_REAL_MODELS names no folder with {name}")
    loaded = load_model(path, device="cpu", dtype="float32")
    patch = make_patch(loaded.model, base_hash=loaded.hash, base_model=loaded.name, neurons=60, scale=0.05)
    found = both(path, patch, loaded, tmp_path, count=6, tops=1000)
    for state, figures in found.items():
        print(f"{name} {state}: {figures.same} of {figures.positions} next tokens, {figures.largest:.3f} at most")
    assert min(found["off"].same, found["on"].same) >= 0.9 * found["off"].positions
    assert found["moved"].largest > 2 * found["on"].largest
