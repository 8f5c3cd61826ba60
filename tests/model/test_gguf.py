"""GGUF files as bases: what they load as, what names them, their ends, and what is said of unreadable ones."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import nest_runtime as nest
from nest_runtime.cli.main import main
from nest_runtime.errors import BaseMismatch, ExportError, ModelError, UsageError
from nest_runtime.export import export_gguf, export_merged
from nest_runtime.model.fingerprint import hash_report
from nest_runtime.model.load import load_model, resolve_model
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from tests.conftest import CHAT_TEMPLATE
from tests.support.gguf import write_gguf
from tests.support.patches import make_patch

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
    loaded = load_model(files[kind], device="cpu", dtype="float32")
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
    assert len(loaded) == len(whole) == 300  # no token of transformers' own, for which the model has no row
    assert max(loaded("<|endoftext|>", add_special_tokens=False)["input_ids"]) < 300


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


# Ends


def ends(loaded: Any) -> list[str]:
    return [loaded.tokenizer.convert_ids_to_tokens(token) for token in loaded.model.generation_config.eos_token_id]


def test_every_end_is_an_end(tiny_llama: Path, files: dict[str, Path], tmp_path: Path) -> None:
    assert ends(load_model(files["llama"], device="cpu")) == ["</s>"]
    # The template ends an answer with another token than the one the file names, and the file names a third.
    template = CHAT_TEMPLATE.replace("{{ eos_token }}", "<|system|>\n")
    path = write_gguf(
        tiny_llama, tmp_path / "m.gguf", template=template, extra=lambda writer: writer.add_eot_token_id(4)
    )
    loaded = load_model(path, device="cpu")
    assert ends(loaded) == ["</s>", "<|user|>", "<|system|>"]
    from nest_runtime.prompts.generate import end_token_ids

    assert set(end_token_ids(loaded.model, loaded.tokenizer)) == {2, 3, 4}


def test_no_chat_template_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "m.gguf", template=None)
    with pytest.warns(UserWarning, match=r"m\.gguf holds no chat template"):
        loaded = load_model(path, device="cpu")
    assert ends(loaded) == ["</s>"]


def test_the_pad_token_has_a_row(tiny_llama: Path, tmp_path: Path) -> None:
    def beyond(values: Any) -> Any:
        return values[:290]

    path = write_gguf(
        tiny_llama, tmp_path / "m.gguf", numbers={"token_embd.weight": beyond, "output.weight": beyond}, pad=295
    )
    loaded = load_model(path, device="cpu")
    assert loaded.model.config.vocab_size == 290
    assert (loaded.tokenizer.pad_token, loaded.model.generation_config.pad_token_id) == ("</s>", 2)


# What cannot be read


def changed(path: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_what_cannot_be_read_is_said(tiny_llama: Path, files: dict[str, Path], tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> ModelError:
        with pytest.raises(ModelError, match=match) as caught:
            load_model(path, device="cpu")
        assert caught.value.hint
        return caught.value

    def copy(name: str, change: Callable[[bytearray], Any]) -> Path:
        path = tmp_path / name
        path.write_bytes(files["q8"].read_bytes())
        return changed(path, change)

    refused(Path(__file__), "is a file, but no GGUF file")
    refused(copy("magic.gguf", lambda data: data.__setitem__(0, 0)), "does not begin with")
    refused(copy("empty.gguf", lambda data: data.clear()), "cannot be read")
    refused(copy("short.gguf", lambda data: data.__delitem__(slice(-100, None))), "truncated or damaged")
    refused(copy("header.gguf", lambda data: data.__delitem__(slice(300, None))), "goes on to byte")
    refused(copy("counts.gguf", lambda data: data.__setitem__(slice(8, 24), b"\xff" * 16)), "truncated or damaged")
    refused(copy("v1.gguf", lambda data: data.__setitem__(slice(4, 8), struct.pack("<I", 1))), "version 1; expected")
    refused(copy("big.gguf", lambda data: data.__setitem__(slice(4, 8), struct.pack(">I", 3))), "big-endian")
    with pytest.raises(ModelError, match="truncated or damaged"):
        nest.model_hash(tmp_path / "short.gguf")

    def written(name: str, **changes: Any) -> Path:
        return write_gguf(tiny_llama, tmp_path / name, **changes)

    error = refused(written("bert.gguf", architecture="bert"), "architecture bert, which transformers cannot make")
    assert "llama" in error.hint
    split = written("m-00001-of-00003.gguf", extra=lambda writer: writer.add_uint16("split.count", 3))
    assert "llama-gguf-split --merge" in refused(split, "part 1 of 3").hint
    scaled = written("yarn.gguf", extra=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    refused(scaled, r"scales its positions \(yarn\)")
    without = written("missing.gguf", order=lambda names: [name for name in names if "blk.1.ffn_up" not in name])
    refused(without, "lacks 1 of the tensors of LlamaForCausalLM")


def test_a_missing_package_is_named(files: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['gguf'] = None; sys.modules['gguf.constants'] = None\n"
        f"from nest_runtime.cli.main import main; sys.exit(main(['hash', {str(files['q8'])!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs the package gguf, which is not installed" in done.stderr
    assert "pip install 'gguf" in done.stderr


def test_scaled_frequencies_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    import numpy as np

    factors = np.array([1, 1, 1, 2, 4, 8, 8, 8], dtype=np.float32)
    path = write_gguf(
        tiny_llama, tmp_path / "m.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    plain, scaled = load_model(tiny_llama, device="cpu").model, load_model(path, device="cpu").model
    whole = plain.model.rotary_emb.inv_freq
    assert torch.equal(scaled.model.rotary_emb.inv_freq, whole / torch.from_numpy(factors))
    assert not torch.equal(logits(scaled), logits(plain))


# Patches


@pytest.fixture(scope="module")
def patch(files: dict[str, Path]) -> Patch:
    """A random patch of the Q8_0 file loaded in float32."""
    loaded = load_model(files["q8"], device="cpu", dtype="float32")
    return make_patch(loaded.model, base_hash=loaded.hash, base_model=loaded.name, scale=0.5)


@pytest.mark.parametrize("made_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("loaded_in", ["float32", "bfloat16", "float16"])
def test_a_patch_fits_its_file_in_every_dtype(made_in: str, loaded_in: str, files: dict[str, Path]) -> None:
    maker = load_model(files["q8"], device="cpu", dtype=made_in)
    patch = make_patch(maker.model, base_hash=maker.hash, scale=0.5)
    loaded = load_model(files["q8"], device="cpu", dtype=loaded_in)
    before, state = logits(loaded.model), {k: v.clone() for k, v in loaded.model.state_dict().items()}
    for base_hash in (loaded.hash, None):  # None: the runtime finds out by itself
        for mode in ("hook", "fold"):
            with PatchRuntime(loaded.model, base_hash=base_hash) as runtime:
                runtime.activate(runtime.add(patch), mode=mode)  # type: ignore[arg-type]
                assert not torch.equal(logits(loaded.model), before)
                runtime.deactivate()
                assert torch.equal(logits(loaded.model), before)
    assert all(torch.equal(state[name], value) for name, value in loaded.model.state_dict().items())


def test_a_patch_of_half_precision_fits_the_whole_checkpoint(tiny_llama: Path) -> None:
    half = load_model(tiny_llama, device="cpu", dtype="bfloat16")
    patch = make_patch(half.model, base_hash=half.hash)
    whole = load_model(tiny_llama, device="cpu")
    with PatchRuntime(whole.model, base_hash=whole.hash) as runtime:
        assert runtime.add(patch) == "v1"


def test_another_base_is_refused_and_retarget_named(
    patch: Patch, files: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    for other in (tiny_llama, files["llama"]):
        loaded = load_model(other, device="cpu")
        with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime, pytest.raises(BaseMismatch) as caught:
            runtime.add(patch)
        assert "nest-runtime retarget" in caught.value.hint
    loaded = load_model(files["q8"], device="cpu", dtype="float32")
    wrong = patch.evolve(rows_digest="sha256:" + "0" * 64)
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        with pytest.raises(BaseMismatch, match="rows it changes differ"):
            runtime.add(wrong)
        with torch.no_grad():
            loaded.model.model.layers[0].mlp.gate_proj.weight[patch.sites[0].neurons.tensor()[0].item(), 0] += 1
        with pytest.raises(BaseMismatch, match="rows it changes differ"):
            runtime.add(patch)
    with pytest.raises(ExportError, match="nothing can be folded into it"):
        export_merged(patch, files["q8"], tmp_path / "merged")


def test_two_steps_of_training_make_a_patch_of_the_file(files: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_model(files["q8"], device="cpu", dtype="float32")
    bad = [{"prompt": f"How do I steal {thing}?"} for thing in ("a car", "a boat", "keys", "bread", "art", "data")]
    good = [
        {"prompt": f"How do I bake {thing}?", "response": "Mix it."} for thing in ("pie", "rye", "ham", "a", "b", "c")
    ]
    for name, rows in (("bad", bad), ("good", good)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "p.safetensors"
    status = main(
        [
            *("train", "--model", str(files["q8"]), "--device", "cpu", "--dtype", "float32"),
            *("--harmful", str(tmp_path / "bad.jsonl"), "--benign", str(tmp_path / "good.jsonl")),
            *("--steps", "2", "--z", "1", "--out", str(out), "--name", "t", "--version", "v1"),
        ]
    )
    assert status == 0
    made = nest.load_patch(str(out))
    assert (made.base_hash, made.base_model) == (loaded.hash, "llama-q8_0.gguf")
    half = load_model(files["q8"], device="cpu", dtype="bfloat16")
    before = logits(half.model)
    with PatchRuntime(half.model, base_hash=half.hash) as runtime:
        runtime.activate(runtime.add(made))
        assert not torch.equal(logits(half.model), before)
        runtime.deactivate()
        assert torch.equal(logits(half.model), before)


def test_an_adapter_bears_the_files_names(patch: Patch, tmp_path: Path) -> None:
    export_gguf(patch, tmp_path / "out", architecture="llama")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    told = {key: reader.get_field(key).contents() for key in ("general.type", "general.architecture")}
    assert told == {"general.type": "adapter", "general.architecture": "llama"}
    assert reader.get_field("adapter.lora.alpha").contents() == patch.sites[0].n_clusters
    names = {tensor.name for tensor in reader.tensors}
    assert names == {
        f"blk.{layer}.ffn_{kind}.weight.lora_{half}" for layer in (0, 1) for kind in ("gate", "up") for half in "ab"
    }


# The command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        capsys.readouterr()
        status = main([*(str(item) for item in arguments), "--json"])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return call


def test_commands_take_a_file(
    run: Callable[..., Any], files: dict[str, Path], patch: Patch, tmp_path: Path, tiny_llama: Path
) -> None:
    file = files["q8"]
    assert run("hash", file)["hash"] == patch.base_hash
    planned, whole = run("plan", "--model", file), run("plan", "--model", tiny_llama)
    assert planned["model"] == "llama-q8_0.gguf"
    assert planned["parameters"] == whole["parameters"]
    saved = patch.save(tmp_path / "p.safetensors")
    made = run("export", saved, "--to", "gguf", "--model", file, "--out", tmp_path / "adapter")
    assert made["max_abs_error"] < 1e-4 < made["max_abs_change"]
    made = run("export", saved, "--to", "peft", "--model", file, "--out", tmp_path / "peft")
    assert made["max_abs_error"] < 1e-4
    extras = next(row for row in run("doctor", "--timeout", "0.2")["checks"] if row["name"] == "extras")
    assert "gguf" in extras["found"]


def test_vllm_refuses_a_file(files: dict[str, Path]) -> None:
    from nest_runtime.serve.config import ServeConfig
    from nest_runtime.serve.vllm.arguments import engine_arguments

    with pytest.raises(UsageError, match="is a GGUF file; --engine vllm serves folders"):
        engine_arguments(ServeConfig(model=str(files["q8"]), engine="vllm"), files["q8"], 8000)
