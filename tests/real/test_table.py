"""The table of goals: one command prints it, utility included, and writes it as JSON and as a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("NEST_TEST_DATA", ROOT.parent / "shared" / "data"))
MODEL = Path(os.environ.get("NEST_REAL_MODELS", "/nowhere")) / "smollm2-135m-instruct-q4_1.gguf"


def test_one_command_prints_the_table(tmp_path: Path) -> None:
    for needed in (MODEL, DATA):
        if not needed.exists():
            pytest.skip(f"{needed} is not there")
    command = [sys.executable, str(ROOT / "benchmarks" / "real_models.py"), "--data", str(DATA), "--model", str(MODEL)]
    command += ["--patch", "v1", "--n", "2", "--suites", "plain,xstest", "--tokens", "8", "--utility", "2"]
    command += ["--answer-tokens", "8", "--work", "work", "--out", "table.json", "--card", "card.md"]
    env = {**os.environ, "NEST_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["base"]["rates"]["plain"]["n"] == 2
    assert table["patch"]["utility"]["kl"] > table["base"]["utility"]["kl"] == 0
    for row in ("| plain | 2 |", "| xstest-safe | 2 |", "| mmlu |", "| kl |"):
        assert row in done.stdout
        assert row in (tmp_path / "card.md").read_text()
    assert f"digest: {table['digest']}\nbase_model: {MODEL.name}" in (tmp_path / "card.md").read_text()
