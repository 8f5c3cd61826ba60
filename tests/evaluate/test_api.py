"""``nest.evaluate`` and ``nest.compare``: what the commands say, from Python."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nest_runtime as nest
from nest_runtime.cli.main import main


def test_the_names_are_packages_and_functions_whatever_is_imported_first() -> None:
    for first in ("nest.evaluate.Case, nest.compare", "__import__('nest_runtime.compare.rows')"):
        code = f"import nest_runtime as nest; {first}; assert callable(nest.evaluate) and callable(nest.compare)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_their_arguments_can_be_looked_up() -> None:
    assert {"suites", "limit", "judge"} <= set(inspect.signature(nest.evaluate).parameters)
    assert {"methods", "seeds"} <= set(inspect.signature(nest.compare).parameters)


def test_evaluate_says_what_the_command_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = {"suites": ["jailbreak-seen", "over-refusal"], "limit": 6}
    result = nest.evaluate("reference", "v3", with_base=True, workdir=tmp_path, **asked)  # type: ignore[arg-type]
    words = ["eval", "--patch", "v3", "--suite", "jailbreak-seen", "--suite", "over-refusal", "--limit", "6"]
    assert main([*words, "--with-base", "--json", "--workdir", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    mine = json.loads(json.dumps(result.summary()))
    for key in ("asr", "over_refusal", "patch", "digest"):
        assert mine[key] == told[key], key
    assert result.changes is not None


def test_a_loaded_model_is_used_as_it_is_and_left_as_it_was() -> None:
    loaded = nest.load_model("reference")
    result = nest.evaluate(loaded, None, suites=["plain"], limit=3, max_new_tokens=8)
    assert (result.patch, result.digest, len(result.records)) == ("base", None, 3)
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_compare_gives_a_row_for_each_method_and_patch(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"suites": ["plain"], "limit": 4, "max_new_tokens": 8, "workdir": tmp_path}
    table = nest.compare(["filter"], patches=["v3"], **asked)
    assert [row["method"] for row in table["rows"]] == ["base", "filter", "reference-safety@v3"]
    assert table["rows"][2]["trainable"] == nest.load_patch("v3").parameters
    assert nest.compare(["filter"], patches=["v3"], **asked)["rows"] == table["rows"]  # from what is kept


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nest.evaluate("org/other", suites=[]), "nothing to measure org/other on"),
        (lambda: nest.evaluate(suites="plain"), "suites is one text, 'plain'"),
        (lambda: nest.evaluate(suites=["plane"]), "plane"),
        (lambda: nest.compare("base"), "methods is one text, 'base'"),
        (lambda: nest.compare(["bass"]), "there is no method 'bass'"),
        (lambda: nest.compare(["base"], harmful="x.csv"), "benign prompts are missing"),
        (lambda: nest.compare(["base"], "org/other"), "no training prompts for org/other"),
    ],
)
def test_what_is_wrong_is_said_before_anything_loads(call: Any, said: str) -> None:
    with pytest.raises(nest.UsageError, match=said):
        call()
