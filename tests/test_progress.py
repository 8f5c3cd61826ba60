"""Progress: bars on a terminal, and lines in a log, where silence would look like an end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nest_runtime.errors import UsageError
from nest_runtime.progress import INTERVAL_VARIABLE, Bars, Lines, tell


def log_of(bars_of: dict[str, object], *reports: tuple[str, int, int, str]) -> str:
    """What bars write to a file that is no terminal."""
    file = io.StringIO()
    with Bars(console=Console(file=file), **bars_of) as bars:  # type: ignore[arg-type]
        for stage, done, total, note in reports:
            tell(bars, stage, done, total, note=note)
        time.sleep(0.3)
    return file.getvalue()


def test_a_log_gets_lines_with_stage_count_and_loss() -> None:
    text = log_of({"interval": 0.05}, ("tune", 1, 40, ""), ("tune", 30, 40, "loss 0.41"))
    lines = text.splitlines()
    assert len(lines) >= 2  # also while nothing is reported
    assert re.fullmatch(r"tune: 30 of 40, loss 0\.41, \d+ s left", lines[0]), text
    assert log_of({"interval": 0.05}, ("read", 3, 0, "")).startswith("read: 3\n")
    assert log_of({"interval": 0.05}).startswith("working for 0 s")


def test_short_work_and_quiet_work_are_silent() -> None:
    assert log_of({}, ("tune", 1, 40, "")) == ""
    assert log_of({"interval": 0.05, "quiet": True}, ("tune", 1, 40, "")) == ""


def test_a_terminal_keeps_its_bars() -> None:
    file = io.StringIO()
    with Bars(console=Console(file=file, force_terminal=True, width=100), delay=0.0, interval=0.01) as bars:
        tell(bars, "tune", 2, 40, note="loss 0.41")
        time.sleep(0.3)
    assert "loss 0.41" in file.getvalue()
    assert "tune: 2 of 40" not in file.getvalue()


def test_time_left_is_of_the_present_stage_and_counts_from_where_it_began() -> None:
    lines = Lines(io.StringIO(), 60.0)
    lines("locate", 10, 10)
    lines("tune", 300, 400)  # taken up again
    assert lines.line() == "tune: 300 of 400"
    time.sleep(0.2)
    lines("tune", 301, 400)
    left = re.search(r"(\d+) s left", lines.line())
    assert left
    assert 15 <= int(left[1]) <= 60


def test_callbacks_of_three_values_are_called_as_ever() -> None:
    seen: list[tuple[str, int, int]] = []
    tell(lambda stage, done, total: seen.append((stage, done, total)), "tune", 1, 2, note="loss 1")
    tell(None, "tune", 2, 2)
    assert seen == [("tune", 1, 2)]


def test_an_interval_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv(INTERVAL_VARIABLE, given)
        with pytest.raises(UsageError, match=INTERVAL_VARIABLE):
            Bars(console=Console(file=io.StringIO()))


def test_a_training_whose_stderr_is_a_pipe_tells_how_far_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("bad", "good"):
        rows = [{"prompt": f"How do I make {name} number {n}?", "response": "Mix it."} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "nest_runtime", "train", "--model", str(tiny_llama), "--steps", "30", "--json"]
    command += ["--harmful", str(tmp_path / "bad.jsonl"), "--benign", str(tmp_path / "good.jsonl")]
    command += ["--out", str(tmp_path / "p.safetensors")]
    environment = {**os.environ, INTERVAL_VARIABLE: "0.1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=True)
    assert json.loads(done.stdout)["version"] == "v1"
    assert re.search(r"^tune: \d+ of 30", done.stderr, re.MULTILINE), done.stderr
