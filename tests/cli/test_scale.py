"""The command scale: a patch at another strength, as a new file with its lineage; wrong input leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nest_runtime.resolve import load_patch
from tests.support.cli import Run, fails

pytest_plugins = ["tests.support.cli"]


def test_a_patch_at_another_strength_is_a_child_of_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "milder.safetensors"
    told = json.loads(run("scale", "v3", "--by", 0.5, "--out", out, "--json").out)
    before, after = load_patch("v3"), load_patch(str(out))
    assert (told["version"], told["parent"], told["digest"]) == ("v4", before.digest, after.digest)
    assert after.created
    for one, other in zip(before.sites, after.sites, strict=True):
        assert torch.equal(other.deltas.tensor(), 0.5 * one.deltas.tensor())


def test_people_are_told_what_came_of_what_and_what_to_do_next(run: Run, tmp_path: Path) -> None:
    done = run("scale", "v3", "--by", 1.1, "--out", tmp_path / "a.safetensors", "--name", "mine", "--version", "v9")
    assert "mine@v9" in done.out
    assert "reference-safety@v3, times 1.1" in done.out
    assert f"next: nest-runtime eval --patch {tmp_path / 'a.safetensors'} --with-base" in done.err


def test_the_version_is_one_that_nothing_has_yet(run: Run, tmp_path: Path) -> None:
    told = json.loads(run("scale", "v1", "--by", 2, "--out", tmp_path / "a.safetensors", "--json").out)
    assert told["version"] == "v4"  # v2 and v3 come with the package


def test_wrong_input_is_said_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    fails(run("scale", "v3", "--by", 0, "--out", out), 2, "expected a number above 0")
    fails(run("scale", "v3", "--by", "nan", "--out", out), 2, "expected a number above 0")
    fails(run("scale", "v3", "--by", 2, "--out", tmp_path / "a.pt"), 2, "a.safetensors")
    fails(run("scale", "v3", "--by", 2, "--out", tmp_path / "no" / "a.safetensors"), 2, "does not exist")
    own = tmp_path / "own.safetensors"
    load_patch("v3").save(own)
    fails(run("scale", own, "--by", 2, "--out", out, "--version", "base"), 2, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
