"""Activations, probes and clusters: against plain recomputations and planted neurons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest_runtime.errors import DataError, TrainingError
from nest_runtime.model.anatomy import find_projections, module_of
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode
from nest_runtime.train import activations as activations_module
from nest_runtime.train.activations import FLOAT16_MAX, PooledActivations, pool, pooled_activations
from nest_runtime.train.cluster import cluster, cluster_profiles
from nest_runtime.train.forward import length_batches
from nest_runtime.train.locate import fit_probe, locate, split_rows, standardize, z_scores
from nest_runtime.train.pipeline import locate_sites
from nest_runtime.train.recipe import RECIPES
from nest_runtime.train.sites import LocatedSite, SitesFile, read_sites
from tests.support.train import QUICK, benign_examples, harmful_examples

REFERENCE = RECIPES["reference"]

PROMPTS = [example.messages for example in [*harmful_examples(4), *benign_examples(5)]]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Any:
    return load_model(tiny_llama)


def plain_outputs(loaded: Any, projection: Any) -> list[torch.Tensor]:
    """Each prompt alone, without padding: that projection's raw output (tokens, d_out)."""
    rows: list[torch.Tensor] = []
    handle = module_of(loaded.model, projection).register_forward_hook(lambda _, __, output: rows.append(output[0]))
    try:
        with torch.no_grad():
            for messages in PROMPTS:
                loaded.model(torch.tensor([encode(loaded.tokenizer, messages)]))
    finally:
        handle.remove()
    start = projection.offset
    return [row[:, start : start + projection.d_out] for row in rows]


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
def test_pooling_equals_each_prompt_alone(loaded: Any, pooling: str, tmp_path: Path) -> None:
    projections = find_projections(loaded.model)
    how = {"max": lambda t: t.amax(0), "mean": lambda t: t.mean(0), "last": lambda t: t[-1]}[pooling]
    got = pooled_activations(
        loaded.model, loaded.tokenizer, PROMPTS, projections, pooling=pooling, batch_size=4, workdir=tmp_path
    )
    for projection in projections:
        wanted = torch.stack([how(row) for row in plain_outputs(loaded, projection)])
        np.testing.assert_allclose(got.read(projection.name), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_the_projections_of_a_fused_module(tmp_path: Path) -> None:
    from tests.conftest import save_tiny

    folder = save_tiny(tmp_path / "phi", "Phi3ForCausalLM", "Phi3Config", num_hidden_layers=1)
    phi = load_model(folder)
    projections = find_projections(phi.model)
    assert [projection.name.rpartition(":")[2] for projection in projections] == ["gate", "up"]
    got = pooled_activations(phi.model, phi.tokenizer, PROMPTS, projections)
    for projection in projections:
        wanted = torch.stack([row.amax(0) for row in plain_outputs(phi, projection)])
        np.testing.assert_allclose(got.read(projection.name), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_padding_never_counts() -> None:
    values = torch.tensor([[[-3.0], [-2.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert [pool(values, mask, how).item() for how in ("max", "mean", "last")] == [-2.0, -2.5, -2.0]


def test_half_precision_models_keep_float16_on_disk_within_range(loaded: Any, tmp_path: Path, tiny_llama: Path) -> None:
    half = load_model(tiny_llama, dtype="bfloat16")
    projection = find_projections(half.model)[0]
    with torch.no_grad():
        module_of(half.model, projection).weight.mul_(1e7)
    values = pooled_activations(half.model, half.tokenizer, PROMPTS, [projection], workdir=tmp_path).read(
        projection.name
    )
    assert values.dtype == np.float32
    assert values.max() == FLOAT16_MAX
    assert next(tmp_path.rglob("0000.bin")).stat().st_size == len(PROMPTS) * projection.d_out * 2


def test_an_interrupted_pass_is_taken_up(loaded: Any, tmp_path: Path) -> None:
    projections = find_projections(loaded.model)
    whole = pooled_activations(loaded.model, loaded.tokenizer, PROMPTS, projections, batch_size=2)
    ran: list[int] = []

    def interrupt(_: str, done: int, __: int) -> None:
        ran.append(done)
        if len(ran) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pooled_activations(
            loaded.model, loaded.tokenizer, PROMPTS, projections, batch_size=2, workdir=tmp_path, progress=interrupt
        )
    again = pooled_activations(
        loaded.model, loaded.tokenizer, PROMPTS, projections, batch_size=2, workdir=tmp_path, progress=interrupt
    )
    assert ran == [2, 4, 6, 8, 9]
    for projection in projections:
        np.testing.assert_array_equal(again.read(projection.name), whole.read(projection.name))


def test_a_full_disk_and_broken_numbers_are_said(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    projections = find_projections(loaded.model)
    with monkeypatch.context() as patch:
        patch.setattr(activations_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
        with pytest.raises(TrainingError, match="pooled activations need"):
            pooled_activations(loaded.model, loaded.tokenizer, PROMPTS, projections)
    module = module_of(loaded.model, projections[0])
    handle = module.register_forward_hook(lambda _, __, output: output * torch.nan)
    try:
        with pytest.raises(TrainingError, match="NaN"):
            pooled_activations(loaded.model, loaded.tokenizer, PROMPTS, projections)
    finally:
        handle.remove()


def test_batches_keep_to_both_limits() -> None:
    lengths = [5, 1, 9, 2, 2, 30, 3]
    batches = length_batches(lengths, batch_size=3, batch_tokens=10)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 10


def planted(tmp_path: Path, loaded: Any, seed: int = 0) -> tuple[PooledActivations, list[int]]:
    """Activations of one projection in which neurons 3 and 7 rise, and 11 falls, on harmful prompts."""
    projection = find_projections(loaded.model)[0]
    labels = [1] * 60 + [0] * 60
    values = np.random.default_rng(seed).normal(size=(120, projection.d_out)).astype(np.float32)
    signal = np.asarray(labels)[:, None] * 2.5
    values[:, [3, 7]] += signal
    values[:, [11]] -= signal
    values[:, 20] = 5.0  # constant
    values.tofile(tmp_path / "0000.bin")
    return PooledActivations(tmp_path, [projection], list(range(120)), "float32"), labels


@pytest.mark.parametrize("probe", ["lbfgs", "adam"])
def test_planted_neurons_are_found(tmp_path: Path, loaded: Any, probe: str) -> None:
    values, labels = planted(tmp_path, loaded)
    settings = REFERENCE.evolve(
        probe=probe, probe_steps=1000, probe_lr=1e-2, probe_weight_decay=0.1, z=3.0, sign="absolute"
    )
    both = locate(values, labels, settings)[0]
    assert both.neurons == (3, 7, 11)
    assert [value > 0 for value in both.z] == [True, True, False]
    assert both.probe_accuracy is not None
    assert both.probe_accuracy >= 0.8
    assert locate(values, labels, settings.evolve(sign="positive"))[0].neurons == (3, 7)
    assert locate(values, labels, settings.evolve(z=50.0))[0].neurons == ()
    assert locate(values, labels, settings.evolve(probe_holdout=0.0))[0].probe_accuracy is None


def test_the_two_probes_minimize_the_same_loss(tmp_path: Path, loaded: Any) -> None:
    values, labels = planted(tmp_path, loaded)
    x, y = standardize(values.read(values.projections[0].name)), np.asarray(labels)
    settings = REFERENCE.evolve(probe_weight_decay=0.05, probe_lr=1e-2, probe_steps=3000)
    exact, _ = fit_probe(x, y, settings)
    stepped, _ = fit_probe(x, y, settings.evolve(probe="adam"))
    assert np.corrcoef(exact, stepped)[0, 1] > 0.999
    np.testing.assert_allclose(stepped, exact, atol=0.02)


def test_standardizing_and_z_scores() -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0], [99.0, 5.0]], dtype=np.float32)
    np.testing.assert_allclose(standardize(values.copy(), np.array([0, 1])), [[-1, 0], [1, 0], [97, 0]])
    weights = [np.array([0.0, 1.0, 2.0, 3.0, 94.0]), np.array([0.0, 0.0, 0.0, 0.0, 0.0])]
    assert z_scores(weights, "projection")[0].std() == pytest.approx(1.0)
    assert z_scores(weights, "robust")[0][4] == pytest.approx(92 / 1.4826)
    assert np.concatenate(z_scores(weights, "model")).std() == pytest.approx(1.0)
    assert not z_scores(weights, "projection")[1].any()


def test_held_out_prompts_are_stratified_and_classes_checked() -> None:
    fit, held = split_rows(np.array([1] * 10 + [0] * 30), 0.2, 0)
    assert sorted([*fit, *held]) == list(range(40))
    assert (held < 10).sum() == 2
    assert (held >= 10).sum() == 6
    with pytest.raises(TrainingError, match="1 harmful prompts"):
        split_rows(np.array([1, 0, 0]), 0.2, 0)


def test_the_number_of_clusters_follows_the_silhouette() -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 40)) * 5
    profiles = np.concatenate([center + generator.normal(size=(6, 40)) for center in centers]).astype(np.float32)
    settings = REFERENCE.evolve(k_min=2, k_max=6)
    labels, silhouette = cluster_profiles(profiles, settings)
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert silhouette is not None
    assert silhouette > 0.5
    assert cluster_profiles(profiles, settings.evolve(k_max=2))[0].max() == 1
    assert cluster_profiles(profiles[:2], settings) == (pytest.approx([0, 0]), None)
    labels, silhouette = cluster_profiles(profiles, settings.evolve(k_min=1, min_silhouette=0.99))
    assert (labels.max(), silhouette) == (0, None)
    assert cluster_profiles(profiles[:4], settings)[0].max() <= 2  # k < neurons


def test_signs_can_be_aligned_before_clustering(tmp_path: Path, loaded: Any) -> None:
    projection = find_projections(loaded.model)[0]
    values = np.random.default_rng(0).normal(size=(50, projection.d_out)).astype(np.float32)
    values[:, 1], values[:, 2], values[:, 3] = -values[:, 0], values[:, 4], -values[:, 4]
    values.tofile(tmp_path / "0000.bin")
    pooled = PooledActivations(tmp_path, [projection], list(range(50)), "float32")
    place = {"layer": 0, "kind": "gate", "d_in": projection.d_in, "d_out": projection.d_out}
    found = LocatedSite(site=projection.name, neurons=(0, 1, 2, 3), z=(1.0, -1.0, 1.0, -1.0), **place)
    aligned = cluster(pooled, [found], REFERENCE.evolve(align_signs=True, k_max=2))[0]
    assert aligned.clusters == (0, 0, 1, 1)
    assert cluster(pooled, [found], REFERENCE.evolve(align_signs=False, k_max=2))[0].clusters != (0, 0, 1, 1)


def test_the_random_control_has_the_same_size(tmp_path: Path, loaded: Any) -> None:
    values, labels = planted(tmp_path, loaded)
    settings = REFERENCE.evolve(z=2.0, sign="absolute", k_max=2)
    found = locate(values, labels, settings)
    real = cluster(values, found, settings)[0]
    control = cluster(values, found, settings.evolve(control="random"))[0]
    assert len(control.neurons) == len(real.neurons)
    assert control.n_clusters == real.n_clusters
    assert control.neurons != real.neurons
    assert list(control.neurons) == sorted(set(control.neurons))
    assert cluster(values, found, settings.evolve(control="random"))[0] == control
    assert cluster(values, found, settings.evolve(control="random", seed=1))[0].neurons != control.neurons


def test_locating_from_prompts_and_the_sites_file(loaded: Any, tmp_path: Path) -> None:
    ticks: list[str] = []
    result = locate_sites(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(),
        benign_examples(),
        recipe=QUICK,
        base_hash="sha256:00",
        base_model="tiny",
        progress=lambda stage, *_: ticks.append(stage),
    )
    assert set(ticks) == {"activations", "locate", "cluster"}
    assert set(result.seconds) == {"locate", "cluster"}
    assert [site.site for site in result.file.sites] == [site.name for site in find_projections(loaded.model)]
    assert set(result.file.sites[0].summary()) == {"site", "neurons", "clusters", "silhouette", "probe_accuracy"}
    path = result.file.save(tmp_path / "sites.json")
    again = read_sites(path)
    assert again == result.file
    assert [item.name for item in tmp_path.iterdir() if item.name != "nest-home"] == ["sites.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a sites file"),
        ('{"format": 9}', "format 9; expected 1"),
        ("[]", "format None"),
        ('{"format": 1}', "'sites'"),
    ],
)
def test_broken_sites_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "sites.json"
    with pytest.raises(DataError, match="no such sites file"):
        read_sites(path)
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        read_sites(path)


def test_a_sites_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    site = LocatedSite("s", 0, "gate", 4, 8, (1, 2), (1.0, 2.0), (0, 0))
    broken = replace(site, z=(1.0,))
    with pytest.raises(DataError, match="2 neurons"):
        read_sites(SitesFile((broken,)).save(tmp_path / "sites.json"))
