"""Merged checkpoints: the base's bytes but for the patched rows, and the model that folding gives, to the bit."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nest_runtime as nest
from nest_runtime.errors import BaseMismatch, ExportError, ModelError
from nest_runtime.export import export_merged
from nest_runtime.export import merged as merged_module
from nest_runtime.model.checkpoint import Stored
from nest_runtime.model.weights import read_frame, weight_files
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from tests.conftest import make_tokenizer, save_tiny
from tests.support.patches import make_patch

IDS = torch.tensor([[1, 7, 30, 45, 100, 9]])


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def folded_logits(folder: Path, patch: Patch) -> torch.Tensor:
    model = load(folder)
    with PatchRuntime(model) as runtime, torch.no_grad():
        runtime.activate(runtime.add(patch), mode="fold")
        return model(IDS).logits


def sharded(folder: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(target, max_shard_size="40KB")
    make_tokenizer().save_pretrained(target)
    return target


def expected_bytes(base: Path, patch: Patch) -> dict[str, bytes]:
    """The weight files with the patched rows rewritten, by hand: no code of the exporter."""
    result = {}
    for path in weight_files(base):
        data, frame = bytearray(path.read_bytes()), read_frame(path)
        for entry in frame.entries:
            for site in patch.sites:
                if entry.name != site.name + ".weight":
                    continue
                dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry.dtype]
                size = site.d_in * dtype.itemsize
                for neuron, change in zip(site.neurons.tensor().tolist(), site.row_deltas(), strict=True):
                    at = frame.data_start + entry.start + neuron * size
                    row = torch.frombuffer(data[at : at + size], dtype=dtype).float() + change
                    data[at : at + size] = row.to(dtype).view(torch.uint8).numpy().tobytes()
        result[path.name] = bytes(data)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_only_the_patched_rows_differ(
    name: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = sharded(request.getfixturevalue(name), tmp_path / "base", dtype)
    patch = make_patch(load(base), loadings=True, scale=0.3)
    made = export_merged(patch, base, tmp_path / "merged")
    assert len(weight_files(base)) > 2
    for file, data in expected_bytes(base, patch).items():
        assert (tmp_path / "merged" / file).read_bytes() == data, file
    weights = {path.name for path in weight_files(base)}
    for path in base.iterdir():
        if path.name not in weights:
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path
    assert set(made.files) == {path.name for path in base.iterdir()} | {"nest_export.json"}
    assert set(made.tensors) == {site.name + ".weight" for site in patch.sites}
    assert made.exact == (dtype == torch.float32)
    assert made.hash == nest.model_hash(tmp_path / "merged") != patch.base_hash
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "merged")(IDS).logits, folded_logits(base, patch))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("How").input_ids
    note = json.loads((tmp_path / "merged" / "nest_export.json").read_text())
    assert (note["digest"], note["base_hash"], note["hash"]) == (patch.digest, patch.base_hash, made.hash)


def test_a_patch_does_not_fit_what_it_was_merged_into(tiny_llama: Path, tmp_path: Path) -> None:
    patch = make_patch(load(tiny_llama))
    export_merged(patch, tiny_llama, tmp_path / "merged")
    with pytest.raises(BaseMismatch, match=patch.base_hash):
        export_merged(patch, tmp_path / "merged", tmp_path / "twice")
    with pytest.raises(BaseMismatch), PatchRuntime(load(tmp_path / "merged")) as runtime:
        runtime.add(patch)
    with pytest.raises(BaseMismatch, match="have digest"):
        export_merged(patch.evolve(rows_digest="sha256:" + "0" * 64), tiny_llama, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("model_class", "config_class", "changes"),
    [
        ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2, "n_head": 4, "n_embd": 64}),
        ("Phi3ForCausalLM", "Phi3Config", {}),
        ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
        ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    ],
)
def test_other_layouts(model_class: str, config_class: str, changes: dict[str, int], tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", model_class, config_class, **changes)
    patch = make_patch(load(base), neurons=12, scale=0.3)
    export_merged(patch, base, tmp_path / "merged")
    with torch.no_grad():
        found = load(tmp_path / "merged")(IDS).logits
        assert torch.equal(found, folded_logits(base, patch))
        assert not torch.equal(found, load(base)(IDS).logits)


def test_a_checkpoint_saved_without_its_head(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    patch = make_patch(load(base), base_hash=nest.model_hash(base))
    export_merged(patch, base, tmp_path / "merged")
    model = load(base)
    with torch.no_grad(), PatchRuntime(model, base_hash=patch.base_hash) as runtime:
        runtime.activate(runtime.add(patch), mode="fold")
        assert torch.equal(load(tmp_path / "merged")(IDS).logits, model(IDS).logits)


def test_weights_in_other_forms_stay_behind(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".gitattributes", "LICENSE"):
        (base / name).write_bytes(b"x")
    (base / "onnx").mkdir()
    patch = make_patch(load(base))
    export_merged(patch, base, tmp_path / "merged")
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "LICENSE" in found
    assert not found & {"pytorch_model.bin", "consolidated.safetensors", ".gitattributes", "onnx"}


def test_nothing_is_left_after_a_failure(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = make_patch(load(tiny_llama))
    writes = []

    def full_disk(self: Stored, path: Path, values: torch.Tensor) -> None:
        writes.append(path)
        if len(writes) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Stored, "write", full_disk)
    with pytest.raises(ExportError, match="No space left"):
        export_merged(patch, tiny_llama, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["nest-home"]  # the cache of model hashes


def test_a_copy_that_went_wrong_is_noticed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = make_patch(load(tiny_llama))
    fold_rows = merged_module.fold_rows

    def bad(patch: Patch, layout: object, checkpoint: object, copy: Path) -> set[str]:
        changed = fold_rows(patch, layout, checkpoint, copy)  # type: ignore[arg-type]
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
        return changed

    monkeypatch.setattr(merged_module, "fold_rows", bad)
    with pytest.raises(ExportError, match="differ that should not"):
        export_merged(patch, tiny_llama, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["nest-home"]  # the cache of model hashes


def test_the_base_is_never_the_target(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    patch = make_patch(load(base))
    for target in (base, base / "inside"):
        with pytest.raises(ExportError, match="base's own folder"):
            export_merged(patch, base, target, overwrite=True)


def test_quantized_checkpoints_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    patch = make_patch(load(base))
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    patch = patch.evolve(base_hash=nest.model_hash(base))
    with pytest.raises(ModelError, match="quantized"):
        export_merged(patch, base, tmp_path / "merged")


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "LlamaForCausalLM", "LlamaConfig", vocab_size=60_000, intermediate_size=20_000)
    patch = make_patch(load(base))
    size = sum(path.stat().st_size for path in weight_files(base))
    assert size > 50e6
    tracemalloc.start()
    export_merged(patch, base, tmp_path / "merged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_what_the_patch_does_not_change_is_kept_and_what_is_left_out_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "with-folders"
    shutil.copytree(tiny_llama, base)
    patch = make_patch(load(base))
    kept = {
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "original/params.json": "{}",
        "original/deeper/notes.txt": "notes",
    }
    left = ("original/consolidated.00.pth", "onnx/model.onnx", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in (*kept, *left, ".cache/huggingface/lock"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(kept.get(name, "{}"))
    made = export_merged(patch, base, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in kept} == kept
    assert set(made.left_out) == set(left)
    assert not any((tmp_path / "out" / name).exists() for name in (*left, ".cache"))
    assert set(kept) <= set(made.files)
