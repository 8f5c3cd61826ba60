"""Thousands of changed patch files through the reader that a server uses: none crashes, loads, or costs much.

Every file is read from disk, its processor time and its peak of resident memory taken by itself. Files whose digest
is right again (a forger can compute it) are in patch/test_file.py: those may load, as what they say.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nest_runtime.errors import DigestMismatch, PatchFormatError, SignatureError
from nest_runtime.patch.file import MAX_FILE, from_bytes, read_patch
from nest_runtime.patch.write import to_bytes
from nest_runtime.trust.check import sign_patch, verify_patch
from nest_runtime.trust.keys import generate_keys
from nest_runtime.trust.policy import policy_for
from tests.support.patches import random_site
from tests.support.patchfile import golden_patch, put_together, seal, take_apart

PATCHES = Path(__file__).parents[2] / "patches"
SECONDS, MEMORY = 1.0, 100 << 20
FILES = 2400  # of four kinds

Mutation = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for at in {rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 2, 8, 64)))}:
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Cut at the end, in the middle, or at the start; or filled up again to the old size, or longer."""
    at = rng.choice((rng.randrange(len(data)), rng.randrange(200), len(data) - rng.randrange(1, 200)))
    if rng.random() < 0.5:
        return data[:at]
    if rng.random() < 0.5:
        return data[at + 1 :]
    return data[:at] + bytes(rng.choice((len(data) - at + 1, 1 << 16)))


def header_surgery(rng: random.Random, data: bytes) -> bytes:
    """A length that lies, a field that is gone, new or other, a piece of one header within another."""
    outer, header, area = take_apart(data)
    kind = rng.randrange(6)
    if kind == 0:
        length = rng.choice((0, 1, rng.randrange(1 << 20), 1 << 20, (1 << 20) + 1, 1 << 40, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:] + b"\0"
    if kind == 1:
        header.pop(rng.choice(list(header)))
    elif kind == 2:
        header[rng.choice([*header, "extra"])] = rng.choice((None, -1, 2**63, 1e300, "", "../x", [], {}, ["a"] * 2000))
    elif kind == 3:
        header["sites"] = rng.choice(([], header["sites"] * 2, header["sites"][:-1], header["sites"] * 500))
    elif kind == 4:
        outer = {**outer, **{f"extra.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(900)}}
    else:
        text = json.dumps(header)
        at = rng.randrange(len(text))
        return put_together(
            outer, text[:at] + rng.choice(("", '"', "{", "[" * 900, "NaN", "\\u0000")) + text[at:], area
        )
    return put_together(outer, header, area)


def index_edits(rng: random.Random, data: bytes) -> bytes:
    """Which tensor lies where, how long it claims to be, and the numbers of neurons and clusters in it."""
    outer, header, area = take_apart(data)
    names = [key for key in outer if key != "__metadata__"]
    name = rng.choice(names)
    entry = dict(outer[name])
    kind = rng.randrange(5)
    if kind == 0:
        entry["shape"] = rng.choice(([2**31], [2**62, 2**62], [-1], [0], entry["shape"] + [1], [10**17]))
    elif kind == 1:
        start, stop = entry["data_offsets"]
        step = rng.choice((-4, 4, 1, 2**40))
        entry["data_offsets"] = rng.choice(([start + step, stop + step], [start, stop + step], [stop, start - 1]))
    elif kind == 2:
        entry["dtype"] = rng.choice(
            [dtype for dtype in ("F64", "I64", "BOOL", "F8_E4M3", "X") if dtype != entry["dtype"]]
        )
    elif kind == 3:
        content = {key: area[slice(*outer[key]["data_offsets"])] for key in names}
        other = rng.choice([key for key in names if content[key] != content[name]])  # alike, it would be the same patch
        outer = {**outer, other: {**outer[other], "data_offsets": entry["data_offsets"]}}
        entry["data_offsets"] = take_apart(data)[0][other]["data_offsets"]
    else:
        target = rng.choice(
            [key for key in names if key.endswith((".neurons", ".clusters")) and outer[key]["shape"][0]]
        )
        start, stop = outer[target]["data_offsets"]
        at = rng.randrange(start, stop, 4)
        old, new = area[at : at + 4], rng.choice((-1, 0, 1, 2**31 - 1, -(2**31))).to_bytes(4, "little", signed=True)
        edited = bytes(byte ^ 1 for byte in old) if new == old else new
        return put_together(outer, header, area[:at] + edited + area[at + 4 :])
    return put_together({**outer, name: entry}, header, area)


def sources() -> list[bytes]:
    """What is changed: every dtype and part, a patch that ships, and one of a megabyte."""
    sites = tuple(random_site(f"layers.{i}.mlp.gate_proj", 512, 256, neurons=200, clusters=64) for i in range(16))
    return [
        to_bytes(golden_patch()),
        (PATCHES / "v3.safetensors").read_bytes(),
        to_bytes(golden_patch().evolve(sites=sites)),
    ]


class Meter:
    """Processor time, and the peak of resident memory beyond what the process had, of one call."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak = 0

    def __enter__(self) -> Meter:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = resident("VmRSS")
        self.began = time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.thread_time() - self.began
        self.peak = resident("VmHWM") - self.before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")


def mutated() -> Iterator[tuple[str, bytes]]:
    rng, originals = random.Random(20261124), sources()
    kinds: list[Mutation] = [flip, truncate, header_surgery, index_edits]
    for number in range(FILES):
        original = originals[-1 if number % 20 == 0 else number % 2]
        changed = original
        while changed == original:
            changed = kinds[number % 4](rng, original)
        yield kinds[number % 4].__name__, changed


@linux
def test_no_changed_file_crashes_loads_or_costs_much(tmp_path: Path) -> None:
    path, seen, words = tmp_path / "changed.safetensors", Counter[str](), set[str]()
    for kind, changed in mutated():
        path.write_bytes(changed)
        with Meter() as meter, pytest.raises((PatchFormatError, DigestMismatch)) as refused:
            read_patch(path)
        assert meter.seconds < SECONDS, (kind, meter.seconds)
        assert meter.peak < MEMORY, (kind, meter.peak)
        assert str(path) in refused.value.message
        assert refused.value.hint
        seen[kind] += 1
        words.add(refused.value.message.removeprefix(f"{path}: ")[:12])
    assert sum(seen.values()) == FILES >= 2000
    assert min(seen.values()) == FILES // 4
    assert len(words) > 20  # refused for many reasons, not all for one


def sparse(path: Path, start: bytes, size: int) -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


@linux
def test_a_large_file_is_refused_by_its_header(tmp_path: Path) -> None:
    """Nothing of a gigabyte is read where header and size of the file do not agree."""
    data = to_bytes(golden_patch())
    for start in (data, data[:200], bytes(8), (1 << 19).to_bytes(8, "little"), b""):
        path = sparse(tmp_path / "large.safetensors", start, MAX_FILE)
        with Meter() as meter, pytest.raises(PatchFormatError):
            read_patch(path)
        assert meter.seconds < SECONDS
        assert meter.peak < MEMORY


@linux
def test_a_large_file_of_right_form_is_hashed_in_pieces(tmp_path: Path) -> None:
    """The header agrees with 300 MB of zeros; only the digest does not."""
    outer, header, _ = take_apart(to_bytes(golden_patch()))
    name, width = "model.layers.0.mlp.gate_proj.deltas", 75_000_000
    at = 0
    for key, entry in outer.items():
        if key == "__metadata__":
            continue
        shape = [1, width] if key == name else entry["shape"]
        size = 4 * width if key == name else entry["data_offsets"][1] - entry["data_offsets"][0]
        outer[key] = {**entry, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    start = put_together(outer, header, b"")
    path = sparse(tmp_path / "large.safetensors", start, len(start) + at)
    with Meter() as meter, pytest.raises(DigestMismatch):
        read_patch(path)
    assert meter.peak < MEMORY


@linux
def test_what_is_signed_bounds_what_is_read(tmp_path: Path) -> None:
    path = golden_patch().save(tmp_path / "patch.safetensors")
    private, public, _ = generate_keys(tmp_path / "keys")
    policy = policy_for([public], require_signature=True)
    assert policy is not None
    sparse(tmp_path / "unsigned.safetensors", path.read_bytes(), MAX_FILE)
    sign_patch(path, private)
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(MAX_FILE)
    for file_path, word in ((path, f"manifest says {size}"), (tmp_path / "unsigned.safetensors", "is not signed")):
        with Meter() as meter, pytest.raises(SignatureError, match=word):
            verify_patch(file_path, policy)
        assert meter.peak < MEMORY
        assert meter.seconds < SECONDS


def test_sealed_again_a_change_is_another_patch_or_none() -> None:
    """With its digest computed anew a changed file may be valid; then it is not the patch that it was."""
    rng, data = random.Random(7), (PATCHES / "v3.safetensors").read_bytes()
    outer, header, area = take_apart(data)
    loaded = 0
    for _ in range(300):
        at, bit = rng.randrange(len(area)), 1 << rng.randrange(8)
        changed = area[:at] + bytes([area[at] ^ bit]) + area[at + 1 :]
        try:
            patch = from_bytes(seal(outer, header, changed))
        except PatchFormatError:
            continue
        loaded += 1
        assert patch.digest != header["digest"]
    assert 0 < loaded < 300
