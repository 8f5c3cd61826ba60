"""The patches that ship for real models: what make_real.py makes, or one of those at another strength."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.patch.algebra import scale
from nest_runtime.prompts.examples import examples_digest
from nest_runtime.resolve import load_patch
from nest_runtime.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("NEST_TEST_DATA", ROOT.parent / "shared" / "data"))
SHIPPED = sorted(path for path in (ROOT / "patches").glob("*/*.safetensors"))


@pytest.fixture(scope="module")
def make_real() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("make_real", ROOT / "patches" / "make_real.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_ships_is_what_the_script_makes(path: Path, make_real: Any) -> None:
    patch = load_patch(path)
    if "scaled" in patch.method:
        (parent,) = [load_patch(other) for other in SHIPPED if load_patch(other).digest == patch.parent]
        again = scale(parent, patch.method["scaled"]["factor"], version=patch.version)
        assert again.evolve(created=patch.created).digest == patch.digest
        return
    making = make_real.makings_of(path.parent.name)[path.stem]
    assert Recipe.of_header(patch.method["recipe"]) == making.recipe
    if not (DATA / "advbench").is_dir():
        pytest.skip(f"{DATA / 'advbench'} is not there: prompts were not compared")
    for kind, examples in zip(("harmful", "benign"), make_real.training_prompts(DATA, making), strict=True):
        assert patch.data[kind]["digest"] == examples_digest(examples)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_card_beside_a_patch_is_of_that_patch_and_of_what_was_measured(path: Path) -> None:
    patch, card = load_patch(path), path.with_suffix(".md").read_text(encoding="utf-8")
    front = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert (front["name"], front["version"], front["digest"]) == (patch.name, patch.version, patch.digest)
    assert f"{patch.parameters:,}\ntrained numbers" in card
    measured = json.loads((ROOT / "docs/results/real" / f"{path.parent.name}-{path.stem}.json").read_text())
    assert measured["digest"] == patch.digest
