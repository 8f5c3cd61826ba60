"""The model hash and the rows digest: what they depend on, and what they must not depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nest_runtime.errors import ModelError, SiteMismatch
from nest_runtime.io import nest_home
from nest_runtime.model import hashcache
from nest_runtime.model.anatomy import find_projections, module_of, read_rows, write_rows
from nest_runtime.model.base_rows import rows_digest
from nest_runtime.model.fingerprint import hash_report, model_hash
from nest_runtime.model.weights import weight_files
from tests.conftest import save_tiny

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def by_the_book(tensors: dict[str, torch.Tensor]) -> str:
    """The hash as docs/reference/patch-format.md has it."""
    rows = [
        [name, NAMES[t.dtype], list(t.shape), hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest()]
        for name, t in sorted(tensors.items())
    ]
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path, **kwargs: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def copy_with(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder like ``folder`` with other tensors, in one file."""
    shutil.copytree(folder, target)
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_hash_is_that_of_the_specification(tiny_llama: Path) -> None:
    assert model_hash(tiny_llama) == by_the_book(stored(tiny_llama))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_folder_shards_and_model_agree(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    model = load(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert model_hash(model) == model_hash(folder) == model_hash(str(tmp_path / "shards"))


def test_order_in_the_file_does_not_matter(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = stored(tiny_llama)
    folder = copy_with(tiny_llama, tmp_path / "m", tensors)
    header: dict[str, Any] = {}
    area = b""
    for name in reversed(list(tensors)):
        raw = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(area), len(area) + len(raw)],
        }
        area += raw
    body = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(body).to_bytes(8, "little") + body + area)
    assert model_hash(folder) == model_hash(tiny_llama)


def test_dtype_is_part_of_the_hash_and_half_precision_agrees(tiny_llama: Path, tmp_path: Path) -> None:
    half = load(tiny_llama, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert model_hash(tmp_path / "half") == model_hash(half)
    assert model_hash(half) != model_hash(tiny_llama)


def test_every_tensor_counts(tiny_llama: Path, tmp_path: Path) -> None:
    tensors, seen = stored(tiny_llama), {model_hash(tiny_llama)}
    for i, name in enumerate(tensors):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1).view(torch.int32)[-1] ^= 1  # the last bit of the last number
        seen.add(model_hash(copy_with(tiny_llama, tmp_path / str(i), changed)))
    name = "model.norm.weight"
    for i, changed in enumerate(
        [
            {**{k: v for k, v in tensors.items() if k != name}, "model.norm.weights": tensors[name]},
            {k: v for k, v in tensors.items() if k != name},
            {**tensors, name: tensors[name].reshape(1, -1)},
            {**tensors, "more": torch.zeros(1)},
        ]
    ):
        seen.add(model_hash(copy_with(tiny_llama, tmp_path / f"other{i}", changed)))
    assert len(seen) == len(tensors) + 5


def test_an_output_embedding_stored_beside_its_equal_input_embedding(tiny_qwen: Path, tmp_path: Path) -> None:
    tensors = stored(tiny_qwen)
    assert "lm_head.weight" not in tensors
    twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    folder = copy_with(tiny_qwen, tmp_path / "twice", twice)
    assert model_hash(folder) == model_hash(tiny_qwen) == model_hash(load(folder))
    twice["lm_head.weight"][0, 0] += 1
    assert model_hash(copy_with(tiny_qwen, tmp_path / "differs", twice)) != model_hash(tiny_qwen)


def test_tables_of_old_checkpoints_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    old = {**stored(tiny_llama), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert model_hash(copy_with(tiny_llama, tmp_path / "old", old)) == model_hash(tiny_llama)


@pytest.mark.parametrize(
    ("model_class", "config_class", "changes"),
    [
        ("GPT2LMHeadModel", "GPT2Config", {}),
        ("Phi3ForCausalLM", "Phi3Config", {}),
        ("MixtralForCausalLM", "MixtralConfig", {}),  # its experts are fused on loading
        ("BloomForCausalLM", "BloomConfig", {"n_head": 4}),
    ],
)
def test_renamed_and_converted_weights(
    model_class: str, config_class: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "m", model_class, config_class, **changes)
    assert model_hash(load(folder)) == model_hash(folder)


def test_wrappers_and_adapters_do_not_change_it(tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(tiny_llama)
    assert model_hash(torch.compile(model)) == model_hash(tiny_llama)  # type: ignore[arg-type]
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], task_type="CAUSAL_LM")
    assert model_hash(peft.get_peft_model(model, config)) == model_hash(tiny_llama)


def test_a_changed_row_in_memory_changes_it(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    site, rows = find_projections(model)[1], torch.tensor([4])
    kept = read_rows(model, site, rows)
    write_rows(model, site, rows, kept + 1)
    assert model_hash(model) != model_hash(tiny_llama)
    write_rows(model, site, rows, kept)
    assert model_hash(model) == model_hash(tiny_llama)


def test_plain_modules_can_be_hashed_and_meta_ones_not(tiny_llama: Path) -> None:
    layer = nn.Linear(3, 2)
    assert model_hash(layer) == by_the_book({k: v.detach() for k, v in layer.named_parameters()})
    with pytest.raises(ModelError, match="not in memory"):
        model_hash(layer.to("meta"))


# Folders that cannot be hashed.


def test_pickles_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*expected \*\.safetensors"):
        model_hash(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="holds neither"):
        model_hash(folder)
    with pytest.raises(ModelError, match="no folder"):
        model_hash(tmp_path / "nowhere")


def test_incomplete_and_damaged_checkpoints(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    load(tiny_llama).save_pretrained(folder, max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ModelError, match="truncated"):
        model_hash(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=f"missing: {shard.name}"):
        model_hash(folder)
    index = folder / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ModelError):
            model_hash(folder)


def test_a_tensor_in_two_shards_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    )
    with pytest.raises(ModelError, match="x appears twice"):
        model_hash(tmp_path)


def test_weights_named_in_the_configuration_are_the_ones_hashed(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_llama, tmp_path / "m", stored(tiny_llama))
    other = {name: tensor + 1 for name, tensor in stored(tiny_llama).items()}
    safetensors.torch.save_file(other, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert [path.name for path in weight_files(folder)] == ["other.safetensors"]
    assert model_hash(folder) == by_the_book(other) == model_hash(load(folder))
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "pytorch_model.bin"}))
    with pytest.raises(ModelError, match="expected a safetensors file"):
        model_hash(folder)


# Report, cache, memory.


def test_report_and_progress(tiny_llama: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = hash_report(tiny_llama, progress=lambda *row: seen.append(row))
    assert set(report) == {"hash", "tensors", "bytes", "seconds", "cached"}
    size = sum(tensor.nbytes for tensor in stored(tiny_llama).values())
    assert (report["tensors"], report["bytes"]) == (len(stored(tiny_llama)), size)
    assert seen[-1] == ("hash", size, size)
    assert [row[1] for row in seen] == sorted(row[1] for row in seen)


def test_cache_follows_the_files(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashcache, "_SETTLED_NS", 0)
    folder = copy_with(tiny_llama, tmp_path / "m", stored(tiny_llama))
    first, second = hash_report(folder), hash_report(folder)
    assert (first["cached"], second["cached"]) == (False, True)
    assert {**first, "seconds": 0, "cached": True} == {**second, "seconds": 0}
    tensors = stored(tiny_llama)
    tensors["model.norm.weight"][0] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    third = hash_report(folder)
    assert not third["cached"]
    assert third["hash"] != first["hash"]
    assert hash_report(folder)["cached"]


def test_files_just_written_are_not_remembered(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_llama, tmp_path / "m", stored(tiny_llama))
    hash_report(folder)
    assert not hash_report(folder)["cached"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "entries": []}', '{"version": 9, "entries": {}}', "[" * 99_999],
)
def test_damaged_cache_is_ignored(tiny_llama: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashcache, "_SETTLED_NS", 0)
    path = nest_home() / "cache" / "model-hashes.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    first = hash_report(tiny_llama)
    assert not first["cached"]
    assert hash_report(tiny_llama)["cached"]


@pytest.mark.parametrize("entry", [None, {}, {"hash": "sha256:x", "tensors": 1, "bytes": 1}, {"hash": 1}, [1]])
def test_damaged_entries_are_ignored(tiny_llama: Path, entry: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashcache, "_SETTLED_NS", 0)
    good = hash_report(tiny_llama)
    path = nest_home() / "cache" / "model-hashes.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "entries": dict.fromkeys(content["entries"], entry)}))
    again = hash_report(tiny_llama)
    assert not again["cached"]
    assert again["hash"] == good["hash"]


def test_a_home_that_cannot_be_written_costs_only_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashcache, "_SETTLED_NS", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEST_HOME", str(tmp_path / "file"))
    assert hash_report(tiny_llama)["hash"] == hash_report(tiny_llama)["hash"]


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEST_HOME", str(tmp_path))
    assert nest_home() == tmp_path
    monkeypatch.setenv("NEST_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nest_home() == tmp_path / ".cache" / "nest-runtime"


def test_large_files_are_not_loaded(tmp_path: Path) -> None:
    size = 200 << 20
    body = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        file.truncate(8 + len(body) + size)
    tracemalloc.start()
    assert hash_report(tmp_path)["bytes"] == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20


# Rows.


def rows_by_the_book(model: nn.Module, neurons: dict[str, list[int]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(neurons):
        digest.update(name.encode() + b"\0" + len(neurons[name]).to_bytes(4, "little"))
        digest.update(b"".join(i.to_bytes(4, "little") for i in neurons[name]))
        weight = model.get_submodule(name).weight.detach().float()  # type: ignore[union-attr, operator]
        digest.update(weight[neurons[name]].numpy().astype("<f4").tobytes())
    return "sha256:" + digest.hexdigest()


def test_rows_digest(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    names = [projection.name for projection in find_projections(model)]
    neurons = {names[3]: [0, 95], names[0]: [1, 2, 3], names[1]: []}
    given = {name: torch.tensor(rows, dtype=torch.int32) for name, rows in neurons.items()}
    digest = rows_digest(model, given)
    assert digest == rows_by_the_book(model, neurons)
    assert digest == rows_digest(torch.compile(model), dict(reversed(given.items())))  # type: ignore[arg-type]
    assert digest != rows_digest(model, {key: given[key] for key in names if key in given and len(given[key])})
    weight = module_of(model, find_projections(model)[0]).weight
    weight.data[9] += 1  # type: ignore[union-attr, operator]
    assert rows_digest(model, given) == digest  # another row
    weight.data[2, 5] += 1e-3  # type: ignore[union-attr, operator]
    assert rows_digest(model, given) != digest


def test_rows_digest_of_a_half_precision_base_is_over_float32(tiny_llama: Path) -> None:
    half = load(tiny_llama, dtype=torch.bfloat16)
    given = {find_projections(half)[0].name: torch.tensor([1, 5])}
    assert rows_digest(half, given) == rows_digest(half.float(), given)


def test_rows_digest_refuses_what_the_model_lacks(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    name = find_projections(model)[0].name
    with pytest.raises(SiteMismatch, match="no site 'nope'"):
        rows_digest(model, {"nope": torch.tensor([0])})
    for rows in ([96], [-1]):
        with pytest.raises(SiteMismatch, match="out of range"):
            rows_digest(model, {name: torch.tensor(rows)})
