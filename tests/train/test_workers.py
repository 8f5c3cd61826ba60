"""One patch trained by several processes: the same patch as by one, and what they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.errors import TrainingError
from nest_runtime.model.load import load_model
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch
from nest_runtime.train.batches import Row, make_batch
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.passes import Passes
from nest_runtime.train.pipeline import train_patch
from nest_runtime.train.tune import answer_counts, loss_of
from nest_runtime.train.warm_start import parent_sites, parent_values
from nest_runtime.train.workers import Workers
from tests.support.patches import make_patch
from tests.support.train import QUICK, benign_examples, harmful_examples

RECIPE = QUICK.evolve(kl_weight=0.5, delta_dtype="float32", steps=8, validate_every=4)


def same(first: Patch, second: Patch) -> None:
    """Neurons and clusters alike, rows within what adding in another order gives."""
    for a, b in zip(first.sites, second.sites, strict=True):
        assert (a.neurons, a.clusters, a.z) == (b.neurons, b.clusters, b.z)
        scale = float(a.deltas.tensor().abs().max())
        assert float((a.deltas.tensor() - b.deltas.tensor()).abs().max()) <= 1e-3 * scale
    assert first.metrics["validation"]["after"] == pytest.approx(second.metrics["validation"]["after"], rel=1e-4)


def train(folder: Path, out: Path, workdir: Path | None = None, prompts: int = 9) -> Workers:
    """What every process runs; each saves what it got."""
    team = Workers.current()
    loaded = load_model(folder, device="cpu")
    result = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(prompts),
        benign_examples(response=None),
        recipe=RECIPE,
        name="x",
        version="v1",
        base_hash=loaded.hash,
        workdir=workdir,
    )
    result.patch.save(out / f"{team.rank}of{team.count}.safetensors")
    return team


def test_two_processes_train_the_patch_of_one(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from accelerate import debug_launcher

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    together = tmp_path / "work"
    for workdir in (None, together):
        debug_launcher(train, (tiny_llama, tmp_path, workdir), num_processes=2)
        alike = [read_patch(tmp_path / f"{rank}of2.safetensors") for rank in (0, 1)]
        assert alike[0] == alike[1]
    assert not together.exists()
    assert train(tiny_llama, tmp_path) == Workers()
    same(read_patch(tmp_path / "0of1.safetensors"), alike[0])


def fail(folder: Path, out: Path) -> None:
    """One class has a single prompt, which the main process alone notices, in its probes."""
    try:
        train(folder, out, prompts=1)
    except TrainingError as error:
        (out / f"error-{Workers.current().rank}").write_text(error.message)


def test_an_error_of_the_main_process_is_everybodys(tiny_llama: Path, tmp_path: Path) -> None:
    from accelerate import debug_launcher

    debug_launcher(fail, (tiny_llama, tmp_path), num_processes=2)
    said = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "harmful prompts" in said[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shares_of_a_step_add_up_to_its_gradient(tiny_llama: Path, count: int) -> None:
    """Without processes: what each would compute, added up by hand. With more workers than rows some have none."""
    loaded = load_model(tiny_llama, device="cpu")
    rows = [
        Row((1, 7, 9 + index), tuple(range(20, 22 + index)), harmful=index % 3 != 0)
        for index in range(5)  # answers of different lengths: a mean of means would be wrong
    ]

    def gradients(shares: list[list[Row]]) -> tuple[float, dict[str, torch.Tensor]]:
        patch = make_patch(loaded.model, loadings=True)
        from nest_runtime.model.anatomy import find_projections

        projections = find_projections(loaded.model)
        deltas = Deltas(loaded.model, projections, parent_sites(patch, projections), "learned", parent_values(patch))
        loaded.model.requires_grad_(False)
        loss = 0.0
        with deltas.attached():
            passes = Passes(loaded.model, deltas, 0, RECIPE)
            for share in shares:
                batch = make_batch(share, 0, torch.device("cpu"))
                part = loss_of(passes, batch, answer_counts(rows, RECIPE) if len(shares) > 1 else None)
                part.backward()
                loss += float(part.detach())
        return loss, {name: tensor.grad for name, tensor in deltas.tensors.items()}  # type: ignore[misc]

    expected = gradients([rows])
    shares = [Workers(rank, count).share(rows) for rank in range(count)]
    assert sorted(row.prompt for share in shares for row in share) == [row.prompt for row in rows]
    found = gradients([share for share in shares if share])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_command_under_a_launcher(tiny_llama: Path, tmp_path: Path) -> None:
    """``accelerate launch`` as for several GPUs, told to use the CPU (and so gloo)."""
    for name, examples in (("bad", harmful_examples()), ("good", benign_examples(response=None))):
        lines = [json.dumps({"prompt": e.prompt, **({"response": e.response} if e.response else {})}) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE.to_json()), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "0", "ACCELERATE_USE_CPU": "true"}

    def run(out: str, *launcher: str) -> Patch:
        command = [sys.executable, *launcher, "-m", "nest_runtime", "train", "--model", str(tiny_llama), "--json"]
        files = ["--harmful", "bad.jsonl", "--benign", "good.jsonl", "--recipe", "recipe.json", "--out", out]
        done = subprocess.run(
            [*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["out"] == out  # one document: the other process says nothing
        return read_patch(tmp_path / out)

    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    same(run("one.safetensors"), run("two.safetensors", *launcher))
    assert not list(tmp_path.glob("*.work"))
