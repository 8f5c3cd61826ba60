"""GGUF files as bases: what they load as, what names them, their ends, and what is said of unreadable ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nest_runtime as nest
from nest_runtime.errors import ModelError
from nest_runtime.fingerprint import hash_report
from nest_runtime.models import load_model, resolve_model
from tests.helpers_gguf import write_gguf

IDS = torch.tensor([[1, 40, 77, 120, 9, 200, 31, 6]])


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny GGUF files by name: llama and qwen in F32, q8 is llama in Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        "llama": write_gguf(tiny_llama, folder / "llama.gguf"),
        "qwen": write_gguf(tiny_qwen, folder / "qwen.gguf"),
        "q8": write_gguf(tiny_llama, folder / "llama-q8_0.gguf", quantized="Q8_0"),
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_float32_file_is_the_model_it_was_made_of(
    kind: str, files: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}")
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded = load_model(files[kind], device="cpu")
    assert (loaded.name, loaded.source) == (files[kind].name, files[kind])
    assert not loaded.model.training
    assert loaded.model.config.tie_word_embeddings == whole.config.tie_word_embeddings
    assert "quantization_config" not in loaded.model.config.to_dict()
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    assert torch.equal(logits(loaded.model), logits(whole))


def test_a_quantized_file_is_near_the_model(files: dict[str, Path], tiny_llama: Path) -> None:
    whole, loaded = load_model(tiny_llama, device="cpu"), load_model(files["q8"], device="cpu", dtype="float32")
    assert loaded.model.dtype == torch.float32
    assert 0 < float((logits(loaded.model) - logits(whole.model)).abs().max()) < 0.05
    half = load_model(files["q8"], device="cpu", dtype="bfloat16")
    rounded = {name: value.to(torch.bfloat16) for name, value in loaded.model.state_dict().items()}
    assert all(torch.equal(rounded[name], value) for name, value in half.model.state_dict().items())


def test_the_tokenizer_and_template_are_the_files(files: dict[str, Path], tiny_llama: Path) -> None:
    whole, loaded = load_model(tiny_llama, device="cpu").tokenizer, load_model(files["llama"], device="cpu").tokenizer
    text = "<s>How do I bake bread in 2024? é"
    assert loaded(text, add_special_tokens=False)["input_ids"] == whole(text, add_special_tokens=False)["input_ids"]
    talk = [{"role": "user", "content": "Hello"}]
    assert loaded.apply_chat_template(talk, tokenize=False) == whole.apply_chat_template(talk, tokenize=False)
    assert (loaded.padding_side, loaded.pad_token) == ("left", "<pad>")


def test_the_hash_is_over_tensors_and_settings_alone(files: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    known = nest.model_hash(files["q8"])
    assert hash_report(files["q8"])["tensors"] == 21

    def written(name: str, **changes: object) -> str:
        return nest.model_hash(write_gguf(tiny_llama, tmp_path / name, quantized="Q8_0", **changes))  # type: ignore[arg-type]

    assert written("order.gguf", order=lambda names: names[::-1]) == known
    assert written("template.gguf", template="{{ messages }}") == known
    assert written("note.gguf", extra=lambda writer: writer.add_description("edited")) == known
    assert written("settings.gguf", extra=lambda writer: writer.add_sliding_window(7)) != known
    doubled = {"blk.1.ffn_down.weight": lambda values: values * 2}
    assert written("numbers.gguf", numbers=doubled) != known
    assert nest.model_hash(files["llama"]) not in (known, nest.model_hash(tiny_llama))


def test_one_changed_byte_changes_the_hash(files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    data = bytearray(files["q8"].read_bytes())
    copy.write_bytes(data)
    assert nest.model_hash(copy) == nest.model_hash(files["q8"])
    data[-40] ^= 1
    copy.write_bytes(data)
    assert nest.model_hash(copy) != nest.model_hash(files["q8"])


def test_a_folder_that_holds_one_file_is_that_file(files: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "one" / "m.gguf"
    copy.parent.mkdir()
    copy.write_bytes(files["q8"].read_bytes())
    assert resolve_model(copy.parent) == ("m.gguf", copy)
    assert nest.model_hash(copy.parent) == nest.model_hash(files["q8"])
    (copy.parent / "mmproj-m.gguf").write_bytes(b"")
    assert resolve_model(copy.parent) == ("m.gguf", copy)
    (copy.parent / "n.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: m\.gguf, n\.gguf"):
        resolve_model(copy.parent)
    (tmp_path / "both").mkdir()
    for file in (*tiny_llama.iterdir(), copy):
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    assert resolve_model(tmp_path / "both") == ("both", tmp_path / "both")
