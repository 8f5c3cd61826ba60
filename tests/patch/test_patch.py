"""The Patch value: immutability, validation, and an algebra that agrees with dense matrices."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_runtime.errors import PatchFormatError, SiteMismatch, UsageError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.load import load_model
from nest_runtime.patch.algebra import compose, diff, scale
from nest_runtime.patch.patch import FrozenTensor, Patch, Site, check_sites
from tests.support.patches import make_patch, random_site
from tests.support.patchfile import ONE_HASH, ZERO_HASH, golden_patch

NAMES = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"]
D_OUT, D_IN = 9, 4


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def patch_of(*sites: Site, **fields: Any) -> Patch:
    return Patch(
        **{
            "name": "p",
            "version": "v1",
            "base_hash": ZERO_HASH,
            "rows_digest": ONE_HASH,
            "architecture": "LlamaForCausalLM",
            "sites": sites,
            **fields,
        }
    )


def dense(patch: Patch, name: str) -> torch.Tensor:
    """ΔW written independently, neuron by neuron."""
    full = torch.zeros(D_OUT, D_IN)
    for site in patch.sites:
        if site.name == name:
            rows, loads = site.deltas.tensor().float(), site.loadings
            for i, (neuron, cluster) in enumerate(
                zip(site.neurons.tensor().tolist(), site.clusters.tensor().tolist(), strict=True)
            ):
                full[neuron] = rows[cluster] * (1.0 if loads is None else loads.tensor()[i])
    return full


@st.composite
def patches(draw: st.DrawFn, version: str = "v1") -> Patch:
    sites = [
        random_site(
            name,
            D_OUT,
            D_IN,
            neurons=draw(st.integers(0, D_OUT)),
            clusters=draw(st.integers(1, 3)),
            loadings=draw(st.booleans()),
            dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
            seed=draw(st.integers(0, 10**6)),
        )
        for name in NAMES
        if draw(st.booleans())
    ]
    return patch_of(*sites, version=version)


@settings(max_examples=100, deadline=None)
@given(patches())
def test_dense_rows_and_membership_agree(patch: Patch) -> None:
    for site in patch.sites:
        expected = dense(patch, site.name)
        assert torch.equal(site.dense(), expected)
        assert torch.equal(site.row_deltas(), expected[site.neurons.tensor().long()])
        product = site.membership() @ site.deltas.tensor().float()
        assert torch.allclose(product, expected, atol=1e-6)
        assert site.parameters == site.n_clusters * D_IN + (site.n_neurons if site.loadings is not None else 0)


@settings(max_examples=150, deadline=None)
@given(patches("v1"), patches("v2"))
def test_compose_adds_up(first: Patch, second: Patch) -> None:
    both = compose(first, second, name="both", version="v3")
    for name in NAMES:
        assert torch.equal(dense(both, name), dense(first, name) + dense(second, name))
    assert {site.name for site in both.sites} == {site.name for patch in (first, second) for site in patch.sites}
    assert both.method["composed"] == (first.digest, second.digest)
    other = compose(second, first, name="both", version="v3")
    for name in NAMES:
        assert torch.equal(dense(other, name), dense(both, name))


@settings(max_examples=100, deadline=None)
@given(patches("v1"), patches("v2"))
def test_diff_counts_what_changed(old: Patch, new: Patch) -> None:
    rows = {row["site"]: row for row in diff(old, new)["sites"]}
    for name in NAMES:
        was = next((set(s.neurons.tensor().tolist()) for s in old.sites if s.name == name), set())
        now = next((set(s.neurons.tensor().tolist()) for s in new.sites if s.name == name), set())
        if name not in rows:
            assert was == now
            assert torch.equal(dense(old, name), dense(new, name))
            continue
        row = rows[name]
        assert was | now  # a site without neurons is the same as one that is not listed
        assert (row["added"], row["removed"], row["kept"]) == (len(now - was), len(was - now), len(was & now))
        if was & now:
            kept = torch.tensor(sorted(was & now))
            change = dense(new, name)[kept] - dense(old, name)[kept]
            assert row["change_norm"] == pytest.approx(float(change.norm()), rel=1e-5, abs=1e-7)
    same = diff(old, old)
    assert same["sites"] == []
    assert same["header"] == {}


def test_diff_names_header_changes_and_parents() -> None:
    old = golden_patch()
    new = old.evolve(version="v2", parent=old.digest, metrics={"asr": 0.5})
    result = diff(old, new)
    assert result["is_child"]
    assert result["same_base"]
    assert set(result["header"]) == {"version", "parent", "metrics"}
    assert result["header"]["version"] == {"old": "v1", "new": "v2"}


def test_compose_refuses_other_bases_and_shapes() -> None:
    a = patch_of(random_site(NAMES[0], D_OUT, D_IN))
    with pytest.raises(SiteMismatch, match="base"):
        compose(a, a.evolve(base_hash=ONE_HASH), name="x", version="v1")
    with pytest.raises(SiteMismatch, match="in one patch"):
        compose(a, patch_of(random_site(NAMES[0], D_OUT + 1, D_IN)), name="x", version="v1")


@settings(max_examples=100, deadline=None)
@given(patches("v1"), st.sampled_from([0.5, 1.0, 2.0]))
def test_scale_multiplies_every_row(patch: Patch, factor: float) -> None:
    other = scale(patch, factor, version="v2")
    for name in NAMES:
        assert torch.equal(dense(other, name), factor * dense(patch, name))  # powers of two are exact
    assert (other.parent, other.serial, other.version) == (patch.digest, patch.serial + 1, "v2")
    assert check_same_shape(other, patch)


def check_same_shape(one: Patch, other: Patch) -> bool:
    return [(s.name, s.neurons, s.clusters, s.deltas.dtype_name, s.deltas.shape) for s in one.sites] == [
        (s.name, s.neurons, s.clusters, s.deltas.dtype_name, s.deltas.shape) for s in other.sites
    ]


def test_scale_states_the_strength_and_claims_nothing_of_its_parent() -> None:
    patch = golden_patch().evolve(method={"name": "NeST", "recipe": {"strength": 1.5}}, metrics={"asr": 0.5})
    other = scale(patch, 0.5, version="v2", name="milder")
    assert other.method["recipe"]["strength"] == 0.75
    assert dict(other.method["scaled"]) == {"from": patch.digest, "factor": 0.5}
    assert (other.name, dict(other.metrics), other.claims) == ("milder", {}, None)
    assert scale(golden_patch(), 2.0, version="v2").method.get("recipe") == golden_patch().method.get("recipe")


@pytest.mark.parametrize("factor", [0.0, -1.0, 101.0, float("nan"), float("inf")])
def test_scale_refuses_factors_that_are_none(factor: float) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 100"):
        scale(golden_patch(), factor, version="v2")


# Immutability.


def test_nothing_can_be_changed() -> None:
    source = torch.ones(1, 3)
    site = Site("a", 4, source, ints(1), ints(0), stats={"x": [1, {"y": 2}]})  # type: ignore[arg-type]
    patch = patch_of(site, method={"z": {"deep": [1]}})
    digest = patch.digest
    source.zero_()
    site.deltas.tensor().zero_()
    patch.header()["method"]["z"]["deep"].append(2)
    with pytest.raises(FrozenInstanceError):
        patch.name = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        site.d_out = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        site.deltas.data = b""
    with pytest.raises(AttributeError):
        del site.deltas.data
    with pytest.raises(TypeError):
        patch.method["z"]["deep"] = 1
    assert bool((site.deltas.tensor() == 1).all())
    assert patch.evolve().digest == digest


def test_changes_of_any_content_change_the_digest() -> None:
    patch = golden_patch()
    site = patch.sites[0]
    deltas = site.deltas.tensor()
    deltas[0, 0] += 1
    changed = Site(site.name, site.d_out, deltas, site.neurons, site.clusters, site.loadings, site.z, site.stats)  # type: ignore[arg-type]
    variants = [
        patch.evolve(sites=(changed, *patch.sites[1:])),
        patch.evolve(sites=patch.sites[::-1]),
        patch.evolve(version="v2"),
        patch.evolve(serial=8),
        patch.evolve(parent=None),
        patch.evolve(method={}),
        patch.evolve(created=""),
    ]
    assert len({patch.digest, *(variant.digest for variant in variants)}) == len(variants) + 1


def test_copies_pickles_and_sets() -> None:
    patch = golden_patch()
    assert copy.deepcopy(patch) is patch
    again = pickle.loads(pickle.dumps(patch))
    assert again == patch
    assert again.digest == patch.digest
    assert len({patch, again, golden_patch()}) == 1
    assert pickle.loads(pickle.dumps(patch.sites[0])) == patch.sites[0]


# Validation.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons": ints(1, 9)}, r"neuron 9 is out of range \[0, 9\)"),
        ({"neurons": ints(-1, 1)}, "out of range"),
        ({"neurons": ints(2, 2)}, "twice"),
        ({"neurons": ints(2, 1)}, "not sorted"),
        ({"clusters": ints(0, 1)}, "cluster number 1"),
        ({"clusters": ints(0)}, "clusters is"),
        ({"neurons": torch.tensor([1, 2])}, "neurons is"),
        ({"deltas": torch.zeros(1, 4, dtype=torch.float64)}, "deltas are"),
        ({"deltas": torch.zeros(4)}, "deltas are"),
        ({"deltas": torch.full((1, 4), float("inf"))}, "NaN or infinity"),
        ({"loadings": torch.tensor([1.0, float("nan")])}, "NaN or infinity"),
        ({"loadings": torch.ones(3)}, "loadings is"),
        ({"z": torch.ones(2, dtype=torch.float64)}, "z is"),
        ({"d_out": 0}, "d_out"),
        ({"name": "a b"}, "site name"),
        ({"stats": {"x": float("nan")}}, "JSON cannot"),
        ({"stats": {"x": torch.zeros(1)}}, "Tensor"),
        ({"stats": {1: 2}}, "string keys"),
        ({"stats": {"x": 2**60}}, "2\\^53"),
    ],
)
def test_bad_sites(changes: dict[str, Any], message: str) -> None:
    good = {"name": "a", "d_out": 9, "deltas": torch.zeros(1, 4), "neurons": ints(1, 2), "clusters": ints(0, 0)}
    Site(**good)
    with pytest.raises(PatchFormatError, match=message):
        Site(**{**good, **changes})


def test_bad_patches() -> None:
    site = random_site("a", D_OUT, D_IN)
    with pytest.raises(PatchFormatError, match="sites appear twice: a"):
        patch_of(site, site)
    with pytest.raises(PatchFormatError, match="base_hash"):
        patch_of(site, base_hash="abc")
    with pytest.raises(PatchFormatError, match="means no patch"):
        patch_of(site, version="base")
    with pytest.raises(PatchFormatError, match="no JSON object"):
        patch_of(site, method=[1])
    with pytest.raises(PatchFormatError, match="takes 8 bytes"):
        FrozenTensor(b"1234", "F32", (2,))
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(PatchFormatError, match="nested deeper"):
        patch_of(site, method=deep)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_finiteness_is_that_of_torch(data: bytes, dtype: torch.dtype) -> None:
    count = len(data) // dtype.itemsize
    frozen = FrozenTensor(
        data[: count * dtype.itemsize], FrozenTensor.of(torch.empty(0, dtype=dtype)).dtype_name, (count,)
    )
    assert frozen.is_finite() == bool(torch.isfinite(frozen.tensor()).all())
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not FrozenTensor.of(torch.tensor([0.0, value], dtype=dtype)).is_finite()
    assert FrozenTensor.of(torch.tensor([torch.finfo(dtype).max, -0.0], dtype=dtype)).is_finite()


def test_an_empty_patch_and_an_empty_site_are_legal() -> None:
    assert patch_of().parameters == 0
    empty = random_site("a", D_OUT, D_IN, neurons=0)
    assert (empty.n_neurons, empty.n_clusters, empty.d_in) == (0, 0, D_IN)
    assert torch.equal(empty.dense(), torch.zeros(D_OUT, D_IN))


def test_unknown_site_is_named() -> None:
    with pytest.raises(SiteMismatch, match="no site 'b'"):
        golden_patch().site("b")
    assert golden_patch().site(NAMES[0]).n_neurons == 3


# Against a model.


def test_check_sites(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu").model
    patch, projections = make_patch(model), find_projections(model)
    check_sites(patch, projections)
    assert [site.name for site in patch.sites] == [p.name for p in projections]
    with pytest.raises(SiteMismatch, match=r"layers\.9\.mlp\.up_proj, which the model lacks; the model has 4 sites"):
        check_sites(patch.evolve(sites=(random_site("model.layers.9.mlp.up_proj", 96, 64),)), projections)
    with pytest.raises(SiteMismatch, match=r"d_in 32 in patch .* 64 in the model"):
        check_sites(patch.evolve(sites=(random_site(projections[0].name, 96, 32),)), projections)
    with pytest.raises(SiteMismatch, match=r"d_out 95 in patch .* 96 in the model"):
        check_sites(patch.evolve(sites=(random_site(projections[0].name, 95, 64),)), projections)
