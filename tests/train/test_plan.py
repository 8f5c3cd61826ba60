"""Estimates from a configuration alone: exact sizes, counts that match what the code holds, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig

from nest_runtime.cli.main import main
from nest_runtime.model.load import load_model, skeleton
from nest_runtime.resolve import load_patch
from nest_runtime.train.activations import pooled_activations
from nest_runtime.train.plan import activations_disk, plan
from nest_runtime.train.recipe import RECIPES, Recipe
from nest_runtime.train.retarget import prompts_of
from nest_runtime.train.sizes import Load, Speed, load_of, shape_of
from tests.support.families import FAMILIES
from tests.support.train import QUICK, benign_examples, harmful_examples

REFERENCE = RECIPES["reference"]

SPEED = Speed(1e12, 1e11)


def folder_of(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of Llama-3.1-8B, and nothing else."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = LlamaConfig(
        **sizes, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, dtype="bfloat16"
    )
    return folder_of(config, tmp_path_factory.mktemp("8b") / "llama")


def test_sizes_of_an_8b_model_are_exact(llama_8b: Path) -> None:
    shape = shape_of(skeleton(llama_8b), "bfloat16", REFERENCE.evolve(depth_from=0.0, depth_to=1.0))
    assert shape.parameters == 8_030_261_248
    assert shape.active == shape.parameters - 128256 * 4096  # looked up, not multiplied with
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.widest) == (32, 4096, 128256, 14336)
    assert len(shape.projections) == 64
    assert shape.cache == 2 * 32 * 8 * 128 * 2
    assert activations_disk(shape, Load(5000, 5000)) == 10_000 * 917_504 * 2  # as activations.py says


def test_locating_in_an_8b_model_needs_under_4_gib_beyond_it(llama_8b: Path) -> None:
    shape = shape_of(skeleton(llama_8b), "bfloat16", REFERENCE)
    for prompts in (1000, 10_000):
        found = plan(shape, REFERENCE, Load(prompts // 2, prompts // 2, 256), SPEED)
        assert 2**28 < found["stages"]["locate"]["memory_bytes"] < 4 * 2**30


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_every_family_can_be_planned_from_its_configuration(family: Any, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, family.config_class)(**family.sizes)
    model = skeleton(folder_of(config, tmp_path / "model"))
    assert all(parameter.is_meta for parameter in model.parameters())
    shape = shape_of(model, "float32", REFERENCE.evolve(depth_from=0.0, depth_to=1.0))
    found = plan(shape, REFERENCE, Load(), SPEED)
    assert found["layers"] == 2 if "text_config" in family.sizes or "n_layer" in family.sizes else found["layers"] > 0
    assert all(stage["memory_bytes"] > 0 for stage in found["stages"].values())


def test_of_experts_a_token_is_multiplied_with_its_share(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8}
    config = GptOssConfig(**sizes, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = skeleton(folder_of(config, tmp_path / "moe"))
    shape = shape_of(model, "float32", REFERENCE.evolve(depth_from=0.0, depth_to=1.0))
    experts = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3)
    embedding = model.get_input_embeddings().weight.numel()
    assert shape.active == shape.parameters - embedding - experts + experts // 4
    assert shape.widest == 2 * 32


def test_disk_and_patch_are_what_training_makes(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_llama, device="cpu")
    harmful, benign = harmful_examples(), benign_examples()
    shape = shape_of(loaded.model, "float32", QUICK)
    found = pooled_activations(
        loaded.model, loaded.tokenizer, [e.messages for e in [*harmful, *benign]], shape.projections, workdir=tmp_path
    )
    written = sum(path.stat().st_size for path in found.folder.glob("*.bin"))
    assert written == activations_disk(shape, load_of(harmful, benign, QUICK))
    own = load_model("reference")
    v1 = load_patch("v1", model_hash=own.hash)
    recipe = Recipe.of_header(dict(v1.method["recipe"]))
    patch = plan(shape_of(own.model, "float32", recipe), recipe, Load(), SPEED)["patch"]
    assert patch["neurons"] == pytest.approx(v1.neurons, rel=0.35)  # 853 for 653
    assert patch["parameters"] == pytest.approx(v1.parameters, rel=0.15)


def test_prompt_files_decide_the_load() -> None:
    load = load_of(harmful_examples(4), benign_examples(6), QUICK)
    assert (load.harmful, load.benign, load.answers_given) == (4, 6, True)
    assert not load_of(harmful_examples(4), benign_examples(6, response=None), QUICK).answers_given
    own = load_model("reference")
    harmful, benign = prompts_of(load_patch("v3", model_hash=own.hash))
    guessed = load_of(harmful, benign, REFERENCE)
    longest = max(len(own.tokenizer(example.prompt)["input_ids"]) for example in [*harmful, *benign])
    assert 0.5 * longest < guessed.prompt_tokens < 3 * longest


def test_more_of_everything_takes_more(llama_8b: Path) -> None:
    model = skeleton(llama_8b)
    recipe = REFERENCE
    shape, wide = (
        shape_of(model, "bfloat16", recipe),
        shape_of(model, "bfloat16", REFERENCE.evolve(depth_from=0.0, depth_to=1.0)),
    )
    less, more = (plan(s, recipe, Load(), SPEED)["stages"] for s in (shape, wide))
    for stage in ("locate", "tune"):
        assert all(less[stage][key] < more[stage][key] for key in ("memory_bytes", "disk_bytes", "seconds"))
    slow = plan(shape, recipe, Load(), Speed(1e11, 1e10))["stages"]
    assert slow["tune"]["seconds"] == pytest.approx(10 * less["tune"]["seconds"])
    assert plan(shape, recipe, Load(answers_given=True), SPEED)["stages"]["answers"]["seconds"] == 0


def test_the_command_loads_no_weights(llama_8b: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "load", None)
    assert main(["plan", "--model", str(llama_8b), "--tflops", "400", "--gbps", "2000", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["parameters"], document["dtype"]) == (8_030_261_248, "bfloat16")
    assert document["weights_bytes"] == 2 * document["parameters"]
    assert document["peak_bytes"] > document["weights_bytes"]
    assert document["fits"] == (document["peak_bytes"] <= document["free_bytes"])
    assert document["assumptions"]["flops"] == 4e14
    assert main(["plan", "--model", str(llama_8b), "--tflops", "400", "--gbps", "2000", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "8,030,261,248 parameters, 32.1 GB in float32" in shown
    assert "assumes 100 steps of 16 rows" in shown


def test_the_command_measures_this_machine_and_reads_files(tmp_path: Path, capsys: Any) -> None:
    for name, examples in (("bad", harmful_examples(3)), ("good", benign_examples(4))):
        rows = [json.dumps({"prompt": item.prompt, "response": item.response}) for item in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    files = ["--harmful", str(tmp_path / "bad.jsonl"), "--benign", str(tmp_path / "good.jsonl")]
    assert main(["plan", *files, "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "reference"
    assert (document["assumptions"]["harmful"], document["assumptions"]["benign"]) == (3, 4)
    assert document["assumptions"]["speed"] == "measured here"
    assert document["assumptions"]["flops"] > 1e8
    for wrong, words in (
        (files[:2], "one of --harmful and --benign"),
        (["--tflops", "1"], "one of --tflops and --gbps"),
        (["--dtype", "int8"], "int8"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        assert main(["plan", *wrong]) != 0
        assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_of_locating_in_an_8b_shaped_model() -> None:
    """benchmarks/locate_memory.py, whole: true shapes, few layers, extrapolated; docs/results/locate-memory.md."""
    script = Path(__file__).parents[2] / "benchmarks" / "locate_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json"], capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_bytes"] < found["limit_bytes"] == 4 * 2**30
    for name, measured, counted, _ in found["rows"]:
        if counted is not None:
            assert 0.5 * counted < measured < 2.5 * counted, name
