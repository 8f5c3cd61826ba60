"""The patch file: golden bytes, round trips, and a refusal of its own for every way to break one."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nest_runtime.errors import DigestMismatch, NestError, PatchFormatError, PatchNotFound
from nest_runtime.patch import file as patchfile
from nest_runtime.patch.file import from_bytes, read_patch
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.patch.write import save_patch, to_bytes
from tests.support.patchfile import (
    ONE_HASH,
    golden_patch,
    put_together,
    seal,
    take_apart,
    with_header,
    with_tensor,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden_v1.safetensors"
GOLDEN_DIGEST = "sha256:18c8e5b7bfa75a109f29f6a17bbc3903946993edfd65a857ad94572da1aa117c"
GOLDEN_FILE_SHA256 = "9dc12877c1086fbe03a25c7b05101ae0e551b0f3820e9e74c8f218ab6ffe1f4b"

GATE = "model.layers.0.mlp.gate_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def data() -> bytes:
    return to_bytes(golden_patch())


def refused(data: bytes, *words: str, error: type[NestError] = PatchFormatError) -> None:
    with pytest.raises(error) as caught:
        from_bytes(data, "bad.safetensors")
    assert type(caught.value) is error
    for word in ("bad.safetensors", *words):
        assert word in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == (3 if error is DigestMismatch else 1)


# What must stay as it is for ever.


def test_golden_bytes_are_written_again() -> None:
    import hashlib

    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_FILE_SHA256
    assert to_bytes(golden_patch()) == GOLDEN.read_bytes()
    assert golden_patch().digest == GOLDEN_DIGEST


def test_golden_file_still_loads() -> None:
    patch = read_patch(GOLDEN)
    assert patch == golden_patch()
    assert patch.digest == GOLDEN_DIGEST
    assert patch.method["nested"]["b"] == (1, None, True)
    assert to_bytes(patch) == GOLDEN.read_bytes()


def test_digest_follows_the_specification(data: bytes) -> None:
    assert seal(*take_apart(data)) == data


def test_bytes_are_those_of_the_safetensors_package(data: bytes) -> None:
    patch = golden_patch()
    tensors = {name: value.tensor() for name, value in patch.tensors.items()}
    metadata = take_apart(data)[0]["__metadata__"]
    assert safetensors.torch.save(tensors, metadata) == data
    assert safetensors.torch.save(dict(reversed(tensors.items())), metadata) == data
    for name, value in safetensors.torch.load(data).items():
        assert torch.equal(value, tensors[name])


def test_another_layout_of_the_same_content_is_the_same_patch(data: bytes) -> None:
    tensor = golden_patch().tensors[f"{GATE}.deltas"].tensor()
    moved = with_tensor(data, f"{GATE}.deltas", tensor)  # now the last in the file
    assert moved != data
    assert from_bytes(moved).digest == GOLDEN_DIGEST
    assert to_bytes(from_bytes(moved)) == data


# Saving and reading.


def test_save_is_atomic_and_makes_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_patch(golden_patch(), tmp_path / "new" / "p.safetensors")
    assert read_patch(path) == golden_patch()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patchfile.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        golden_patch().evolve(version="v2").save(path)
    assert [item.name for item in path.parent.iterdir()] == ["p.safetensors"]
    assert read_patch(path).version == "v1"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NestError, match="cannot be written"):
        save_patch(golden_patch(), tmp_path / "file" / "p.safetensors")


def test_missing_file_folder_and_device_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PatchNotFound, match="there is no patch file"):
        read_patch(tmp_path / "none.safetensors")
    with pytest.raises(PatchFormatError, match="no regular file"):
        read_patch(tmp_path)
    with pytest.raises(PatchFormatError, match="no regular file"):
        read_patch("/dev/zero")


def test_a_patch_without_rows_digest_is_not_written(data: bytes) -> None:
    with pytest.raises(PatchFormatError, match="rows_digest"):
        to_bytes(golden_patch().evolve(rows_digest=""))
    refused(with_header(data, rows_digest=""), "rows_digest")


def test_a_header_over_the_limit_is_not_written() -> None:
    with pytest.raises(PatchFormatError, match="limits"):
        to_bytes(golden_patch().evolve(method={"notes": "x" * (1 << 20)}))


# Each malformed file has its own message.


@pytest.mark.parametrize("version", [0, 3, "1", 1.0, True, None])
def test_unknown_format_version(data: bytes, version: object) -> None:
    refused(with_header(data, format_version=version), "format version", repr(version), "reads 1")


def test_missing_format_version(data: bytes) -> None:
    refused(with_header(data, format_version=...), "format version")


@pytest.mark.parametrize("part", ["deltas", "neurons", "clusters"])
def test_missing_tensor(data: bytes, part: str) -> None:
    refused(with_tensor(data, f"{UP}.{part}", None), f"missing tensor {UP}.{part}")


@pytest.mark.parametrize("name", [f"{UP}.bias", "other", "other.deltas", f"{UP}x.deltas"])
def test_extra_tensor(data: bytes, name: str) -> None:
    refused(with_tensor(data, name, torch.zeros(1)), f"extra tensor '{name}'")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("deltas", torch.zeros(2, 3, dtype=torch.float64)),
        ("deltas", torch.zeros(2, 3, dtype=torch.int32)),
        ("neurons", torch.tensor([0, 3, 5])),
        ("clusters", torch.tensor([1, 0, 1], dtype=torch.int8)),
        ("loadings", torch.zeros(3, dtype=torch.float16)),
        ("z", torch.zeros(3, dtype=torch.float64)),
    ],
)
def test_wrong_dtype(data: bytes, part: str, value: torch.Tensor) -> None:
    refused(with_tensor(data, f"{GATE}.{part}", value), f"site {GATE}: {part}", "expected")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("deltas", torch.zeros(6)),
        ("deltas", torch.zeros(1, 2, 3)),
        ("neurons", torch.tensor([[0, 3, 5]], dtype=torch.int32)),
        ("neurons", torch.tensor(0, dtype=torch.int32)),
        ("neurons", torch.tensor([0, 3], dtype=torch.int32)),
        ("clusters", torch.tensor([1, 0], dtype=torch.int32)),
        ("loadings", torch.zeros(4)),
        ("z", torch.zeros(3, 1)),
    ],
)
def test_wrong_rank_or_length(data: bytes, part: str, value: torch.Tensor) -> None:
    refused(with_tensor(data, f"{GATE}.{part}", value), f"site {GATE}", "expected")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 3, 6], "neuron 6 is out of range [0, 6)"),
        ([-1, 3, 5], "neuron -1 is out of range"),
        ([0, 3, 2**31 - 1], "out of range"),
        ([0, 3, 3], "neuron 3 is listed twice"),
        ([3, 0, 5], "not sorted"),
    ],
)
def test_bad_neuron_indices(data: bytes, rows: list[int], message: str) -> None:
    refused(with_tensor(data, f"{GATE}.neurons", torch.tensor(rows, dtype=torch.int32)), message)


@pytest.mark.parametrize("numbers", [[1, 0, 2], [-1, 0, 1], [2**31 - 1, 0, 1]])
def test_cluster_number_out_of_range(data: bytes, numbers: list[int]) -> None:
    changed = with_tensor(data, f"{GATE}.clusters", torch.tensor(numbers, dtype=torch.int32))
    refused(changed, "cluster number", "out of range [0, 2)")


def test_clusters_without_neurons(data: bytes) -> None:
    changed = with_tensor(data, "model.layers.1.mlp.up_proj.deltas", torch.zeros(1, 3))
    refused(changed, "1 clusters but no neurons")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["deltas", "loadings", "z"])
def test_nan_and_infinity(data: bytes, part: str, value: float) -> None:
    tensor = golden_patch().tensors[f"{GATE}.{part}"].tensor()
    tensor.view(-1)[1] = value
    refused(with_tensor(data, f"{GATE}.{part}", tensor), f"{part} holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_in_half_precision(data: bytes, dtype: torch.dtype) -> None:
    refused(with_tensor(data, f"{UP}.deltas", torch.full((1, 3), float("nan"), dtype=dtype)), "NaN or infinity")


@pytest.mark.parametrize("d_out", [0, -1, 2**31, "6", 6.0, True, None])
def test_bad_d_out(data: bytes, d_out: object) -> None:
    sites = take_apart(data)[1]["sites"]
    sites[0]["d_out"] = d_out
    refused(with_header(data, sites=sites), "d_out")


def test_header_is_not_json(data: bytes) -> None:
    outer, _, area = take_apart(data)
    refused(put_together(outer, "{broken", area), "patch header is not JSON")
    refused(data[:8] + b"x" + data[9:], "header is not JSON")
    refused(data[:9] + b"\xff" + data[10:], "not UTF-8")


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"'])
def test_header_is_no_object(data: bytes, text: str) -> None:
    outer, _, area = take_apart(data)
    refused(put_together(outer, text, area), "patch header is a JSON", "expected an object")


def test_header_over_one_mebibyte(data: bytes) -> None:
    outer, header, area = take_apart(data)
    refused(seal(outer, {**header, "method": {"notes": "x" * (1 << 20)}}, area), "over the limit of 1048576")


@pytest.mark.parametrize("field", [*patchfile._FIELDS])
def test_missing_header_field(data: bytes, field: str) -> None:
    outer, header, area = take_apart(data)
    del header[field]
    words = "format version" if field == "format_version" else f"missing field '{field}'"
    refused(put_together(outer, header, area), words)


def test_unknown_header_field(data: bytes) -> None:
    refused(with_header(data, extra=1), "unknown field 'extra'")
    sites = take_apart(data)[1]["sites"]
    refused(with_header(data, sites=[{**sites[0], "more": 1}, *sites[1:]]), "unknown field 'more'")
    refused(with_header(data, sites=[{"name": GATE}, *sites[1:]]), "missing field")


@pytest.mark.parametrize("field", [f for f in patchfile._FIELDS if f not in {"format_version", "digest"}])
@pytest.mark.parametrize("value", [1.5, True, [[]], {"a": 1}, "\n"])
def test_wrong_type_or_form_of_a_header_field(data: bytes, field: str, value: object) -> None:
    if field in {"method", "data", "metrics"} and isinstance(value, dict):
        return
    refused(with_header(data, **{field: value}), field.rstrip("s"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "base"),
        ("version", "../v1"),
        ("name", "a/b"),
        ("name", "a@b"),
        ("name", ""),
        ("base_hash", "sha256:" + "0" * 63),
        ("base_hash", "md5:" + "0" * 64),
        ("rows_digest", "SHA256:" + "0" * 64),
        ("parent", ""),
        ("serial", -1),
        ("serial", 2**53 + 1),
        ("created", "yesterday"),
        ("created", "2026-02-18T12:00:00+01:00"),
    ],
)
def test_bad_value_of_a_header_field(data: bytes, field: str, value: object) -> None:
    refused(with_header(data, **{field: value}), field)


def test_key_twice(data: bytes) -> None:
    outer, header, area = take_apart(data)
    text = json.dumps(header)
    refused(put_together(outer, text[:-1] + ',"name":"other"}', area), "'name' twice")
    length = int.from_bytes(data[:8], "little")
    body = data[8 : 8 + length].rstrip()[:-1] + b',"__metadata__":{"nest_patch":"{}"}}'
    refused(len(body).to_bytes(8, "little") + body + area, "'__metadata__' twice")


def test_site_twice(data: bytes) -> None:
    sites = take_apart(data)[1]["sites"]
    refused(with_header(data, sites=[*sites, sites[0]]), "missing tensor")


def test_sites_in_another_order_are_another_patch(data: bytes) -> None:
    sites = take_apart(data)[1]["sites"]
    assert from_bytes(with_header(data, sites=sites[::-1])).digest != GOLDEN_DIGEST


@pytest.mark.parametrize("name", ["../x", "a b", "", "a\n", "é", "x" * 257])
def test_bad_site_name(data: bytes, name: str) -> None:
    outer, header, area = take_apart(data)
    header["sites"][1]["name"] = name
    renamed = {key.replace(UP, name, 1) if key.startswith(UP) else key: value for key, value in outer.items()}
    refused(seal(renamed, header, area), "site name")


def test_metadata_of_other_files(data: bytes) -> None:
    outer, _, area = take_apart(data)
    del outer["__metadata__"]
    refused(put_together(outer, None, area), "no nest-runtime patch")
    refused(put_together({**outer, "__metadata__": {"format": "pt"}}, None, area), "no nest-runtime patch", "format")
    refused(put_together({**outer, "__metadata__": []}, None, area), "__metadata__")
    refused(put_together({**outer, "__metadata__": {"nest_patch": 1}}, None, area), "__metadata__")


def test_not_canonical_header(data: bytes) -> None:
    outer, header, area = take_apart(data)
    refused(put_together(outer, json.dumps(header), area), "canonical")
    refused(put_together(outer, json.dumps(header, sort_keys=True, separators=(",", ":")), area), "canonical")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1, -20])
def test_truncated_file(data: bytes, keep: int) -> None:
    refused(data[:keep], "truncated")


def test_trailing_bytes(data: bytes) -> None:
    refused(data + b"\0", "1 trailing bytes")


def test_oversized_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(data)
        file.truncate((1 << 30) + 1)
    with pytest.raises(PatchFormatError, match="over the limit of 1073741824"):
        read_patch(path)
    with path.open("rb+") as file:
        file.truncate(1 << 30)
    with pytest.raises(PatchFormatError, match="trailing bytes"):
        read_patch(path)


def test_gaps_and_overlaps(data: bytes) -> None:
    outer, header, area = take_apart(data)
    start, stop = outer[f"{UP}.neurons"]["data_offsets"]
    shifted = {**outer, f"{UP}.neurons": {**outer[f"{UP}.neurons"], "data_offsets": [start - 4, stop - 4]}}
    refused(put_together(shifted, header, area), "overlap")
    gap = {
        key: {**entry, "data_offsets": [offset + 4 for offset in entry["data_offsets"]]}
        if key != "__metadata__"
        else {}
        for key, entry in outer.items()
    }
    refused(put_together(gap, header, b"\0\0\0\0" + area), "gap")
    behind = {**outer, f"{UP}.neurons": {**outer[f"{UP}.neurons"], "data_offsets": [len(area), len(area) + 4]}}
    refused(put_together(behind, header, area), "gap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F99"}, "unknown dtype"),
        ({"dtype": 1}, "unknown dtype"),
        ({"shape": [2]}, "takes 8 bytes"),
        ({"shape": [-1]}, "shape"),
        ({"shape": [1.0]}, "shape"),
        ({"shape": [True]}, "shape"),
        ({"shape": "1"}, "shape"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": [10**17, 10**17]}, "takes"),
        ({"data_offsets": [4, 0]}, "data_offsets"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [-4, 0]}, "data_offsets"),
        ({"data_offsets": None}, "data_offsets"),
        ({"more": 1}, "exactly dtype, shape and data_offsets"),
    ],
)
def test_bad_entry_of_the_frame(data: bytes, change: dict[str, object], message: str) -> None:
    outer, header, area = take_apart(data)
    entry = {**outer[f"{UP}.neurons"], **change}
    refused(put_together({**outer, f"{UP}.neurons": entry}, header, area), message)


def test_digest_mismatch_in_tensors_and_header(data: bytes) -> None:
    refused(data[:-1] + bytes([data[-1] ^ 1]), "digest", error=DigestMismatch)
    outer, header, area = take_apart(data)
    for change in ({"version": "v2"}, {"rows_digest": ONE_HASH[:-1] + "2"}, {"digest": ONE_HASH}, {"digest": "x"}):
        refused(put_together(outer, {**header, **change}, area), "digest", error=DigestMismatch)
    gone = put_together({k: v for k, v in outer.items() if not k.endswith(".z")}, header, area)
    refused(gone, "gap")


# Hostile files: nothing but an error, at once, in little memory.

HOSTILE_HEADERS = {
    "deep list": "[" * 500_000,
    "deep object": '{"a":' * 150_000,
    "deep method": None,
    "giant whole number": '{"serial":' + "9" * 900_000 + "}",
    "giant exponent": '{"serial":1e999999}',
    "NaN": '{"serial":NaN}',
    "minus infinity": '{"serial":-Infinity}',
    "lone surrogate": '{"name":"\\ud800"}',
    "many keys": "{" + ",".join(f'"{i}":0' for i in range(100_000)) + "}",
    "the same key": "{" + ",".join('"a":0' for _ in range(170_000)) + "}",
}


@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
def test_hostile_headers(data: bytes, kind: str) -> None:
    outer, header, area = take_apart(data)
    deep: object = 1
    for _ in range(400):
        deep = [deep]
    text = HOSTILE_HEADERS[kind]
    files = [seal(outer, {**header, "method": {"deep": deep}}, area)]
    if text is not None:
        body = text.encode("utf-8", "surrogatepass")
        files = [len(body).to_bytes(8, "little") + body, put_together(outer, text, area)]
        names = '{"__metadata__":' + text + "}"
        files.append(len(names).to_bytes(8, "little") + names.encode("utf-8", "surrogatepass"))
    for file in files:
        began = time.thread_time()
        with pytest.raises(PatchFormatError):
            from_bytes(file)
        assert time.thread_time() - began < 1
        tracemalloc.start()
        with pytest.raises(PatchFormatError):
            from_bytes(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 << 20


def test_lone_surrogate_in_an_allowed_place(data: bytes) -> None:
    outer, header, area = take_apart(data)
    text = json.dumps({**header, "method": {"a": "X"}}).replace('"X"', '"\\ud800"')
    refused(put_together(outer, text, area), "canonical")


@pytest.mark.parametrize("length", [2**20 + 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_length_that_lies(data: bytes, length: int) -> None:
    refused(length.to_bytes(8, "little") + data[8:], "over the limit")


def test_header_length_beyond_the_file(data: bytes) -> None:
    refused((len(data)).to_bytes(8, "little") + data[8:], "truncated")


def test_many_small_sites_are_refused_or_read_in_a_second() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    sites = tuple(Site(f"s{i}", 1, torch.empty(0, 1), empty, empty) for i in range(2500))
    data = to_bytes(golden_patch().evolve(sites=sites))
    began = time.thread_time()
    assert len(from_bytes(data).sites) == 2500
    assert time.thread_time() - began < 1.5


# Mutations.


def test_one_flipped_bit_anywhere_is_noticed(data: bytes) -> None:
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises((PatchFormatError, DigestMismatch)):
                from_bytes(changed)


def _mutate(rng: random.Random, data: bytes) -> bytes:
    """One file changed in one of many ways; some are sealed again, so that the digest does not save us."""
    outer, header, area = take_apart(data)
    names = [key for key in outer if key != "__metadata__"]
    name, kind = rng.choice(names), rng.randrange(10)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(2, 8)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        at, length = rng.randrange(len(data)), rng.randint(1, 40)
        return data[:at] + rng.randbytes(rng.randint(0, 40)) + data[at + length :]
    if kind == 3:
        at = rng.randrange(len(area) - 4)
        return seal(outer, header, area[:at] + rng.randbytes(4) + area[at + 4 :])
    if kind == 4:
        ints = [n for n in names if n.endswith(("neurons", "clusters")) and outer[n]["shape"][0]]
        target = rng.choice(ints)
        values = torch.tensor([rng.choice([-1, 0, 1, 2, 3, 5, 6, 7]) for _ in range(outer[target]["shape"][0])])
        return with_tensor(data, target, values.int())
    if kind == 5:
        return with_tensor(data, name, None)
    if kind == 6:
        dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
        return with_tensor(data, name, torch.ones([rng.randint(0, 3) for _ in range(rng.randint(0, 3))]).to(dtype))
    if kind == 7:
        value = rng.choice([None, 0, -1, 1.5, "", "v9", [], {}, True, "sha256:" + "f" * 64, 2**60, [{}], "a" * 300])
        return with_header(data, **{rng.choice([*header, "new"]): value})
    if kind == 8:
        entry = dict(outer[name])
        entry[rng.choice(list(entry))] = rng.choice([[0, 4], [4, 8], [1], [0], "F32", "I32", "BF16", [2, 3], -1, None])
        try:
            return seal({**outer, name: entry}, header, area)
        except (TypeError, ValueError):
            return put_together({**outer, name: entry}, header, area)
    site = dict(rng.choice(header["sites"]))
    site[rng.choice(list(site))] = rng.choice([0, 1, 5, 2**31, "x", {}, {"a": 1}, None, [1]])
    return with_header(data, sites=[site if s["name"] == site.get("name") else s for s in header["sites"]])


def test_thousands_of_mutations_never_crash_and_never_lie(data: bytes) -> None:
    rng, loaded, errors = random.Random(20260218), 0, set()
    for _ in range(4000):
        changed = _mutate(rng, data)
        try:
            patch = from_bytes(changed)
        except NestError as error:
            errors.add(error.message[:30])
            continue
        loaded += 1
        _, header, _ = take_apart(changed)
        assert {**patch.header(), "digest": patch.digest} == header
        stored = safetensors.torch.load(changed)
        assert stored.keys() == patch.tensors.keys()
        for name, tensor in patch.tensors.items():
            assert tensor.tensor().dtype == stored[name].dtype
            assert torch.equal(tensor.tensor(), stored[name])
    assert loaded  # sealed again with other legal content: a patch of its own, and read as what it says
    assert len(errors) > 10


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(noise=st.binary(max_size=300), prefix=st.booleans())
def test_noise_is_refused(noise: bytes, prefix: bool) -> None:
    data = len(noise).to_bytes(8, "little") + noise if prefix else noise
    with pytest.raises(PatchFormatError):
        from_bytes(data)


# Round trips.

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    sites = []
    for i in range(draw(st.integers(0, 3))):
        d_out, d_in = draw(st.integers(1, 12)), draw(st.integers(1, 5))
        rows = sorted(draw(st.sets(st.integers(0, d_out - 1), max_size=d_out)))
        k = draw(st.integers(1, 3)) if rows else 0
        seed = draw(st.integers(0, 10**6))
        generator = torch.Generator().manual_seed(seed)
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        optional = [torch.randn(len(rows), generator=generator) if draw(st.booleans()) else None for _ in range(2)]
        numbers = [draw(st.integers(0, k - 1)) for _ in rows]
        sites.append(
            Site(
                f"model.layers.{i}.mlp.{draw(st.sampled_from(['gate_proj', 'up_proj', 'gate_up_proj:up']))}",
                d_out,
                torch.randn(k, d_in, generator=generator).to(dtype),  # type: ignore[arg-type]
                torch.tensor(rows, dtype=torch.int32),  # type: ignore[arg-type]
                torch.tensor(numbers, dtype=torch.int32),  # type: ignore[arg-type]
                *optional,  # type: ignore[arg-type]
                stats=draw(st.dictionaries(_TEXT, _JSON, max_size=2)),
            )
        )
    free = {key: draw(st.dictionaries(_TEXT, _JSON, max_size=3)) for key in ("method", "data", "metrics")}
    return golden_patch().evolve(sites=tuple(sites), serial=draw(st.integers(0, 2**53)), **free)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(patches())
def test_round_trip(patch: Patch) -> None:
    data = to_bytes(patch)
    again = from_bytes(data)
    assert again == patch
    assert again.digest == patch.digest
    assert to_bytes(again) == data
    assert seal(*take_apart(data)) == data


def test_the_specification_shows_the_golden_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "patch-format.md").read_text(encoding="utf-8")
    golden = GOLDEN.read_bytes()
    assert GOLDEN_DIGEST in page
    assert GOLDEN_FILE_SHA256 in page
    assert f"({len(golden):,} bytes" in page
    assert golden[:8].hex(" ") in page
    listing = page.rpartition("```\n  0 ")[2].partition("```")[0]
    words = [word for line in listing.splitlines() for word in line.split() if len(word) in {4, 8}]
    assert bytes.fromhex("".join(words)) == take_apart(golden)[2]


def test_the_public_reader_and_save_method(tmp_path: Path) -> None:
    path = golden_patch().save(str(tmp_path / "p.safetensors"))
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert oct(path.stat().st_mode & 0o600) == "0o600"
