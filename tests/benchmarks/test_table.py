"""The table of speed: rows that fail stand in it as failed, others go on, and ratios are taken round by round."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def imported(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "rows"))
    return imported(BENCHMARKS / "table.py")


GOOD = """
from measure import Goal, Line, Report, Series, run
lines = [Line("a thing", Series("ours", (1.0, 2.0)), Series("it", (2.0, 2.0)), Goal(1))]
plot = {"title": "t", "x": "n", "y": "s", "lines": {"n": [1, 2], "it": [1.0, 2.0]}}
run("good", None, lambda arguments: Report(lines, {"plots": {"t": plot}}))
"""
BAD = "raise RuntimeError('the disk is full')"
ABSENT = """
from measure import NotMeasured, Report, run
def measure(arguments):
    raise NotMeasured("no models here")
run("absent", None, measure)
"""
HURRIED = """
import time
from measure import Clock, Line, Report, Series, run
def measure(arguments):
    clock, report = Clock(arguments.seconds), Report(more={"left_out": []})
    for name in ("one", "two", "three", "four"):
        if not clock.one_more():
            report.more["left_out"].append(name)
            continue
        time.sleep(0.4)
        report.lines.append(Line(name, Series("ours", (1.0,))))
    return report
run("hurried", None, measure)
"""
SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
open(sys.argv[0] + ".pid", "w").write(str(child.pid))
time.sleep(120)
"""


def rows(table: Any, folder: Path, **scripts: str) -> None:
    """The table's rows, replaced by these."""
    found = {}
    for name, text in scripts.items():
        path = folder / f"{name}.py"
        path.write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'rows')!r})\n{text}", encoding="utf-8")
        found[name] = table.Row(f"Row {name}", str(path), 3 if name == "slow" else 60)
    table.ROWS = found


def call(table: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["table.py", *words])
    return int(table.main())


def test_rows_that_fail_are_named_and_the_others_go_on(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(table, tmp_path, bad=BAD, good=GOOD, absent=ABSENT, slow=SLOW)
    result = tmp_path / "speed.json"
    assert call(table, monkeypatch, "--json", str(result)) == 1
    document = json.loads(result.read_text(encoding="utf-8"))["rows"]
    assert document["bad"]["failed"] == "RuntimeError: the disk is full"
    assert document["slow"]["failed"] == "it took longer than 3 s"
    assert document["absent"]["not_measured"] == "no models here"
    assert document["good"]["lines"][0]["ratio"]["median"] == 0.75
    assert document["good"]["lines"][0]["met"]
    shown = capsys.readouterr().out
    assert "Failed: RuntimeError: the disk is full" in shown
    assert "| a thing | 1.5 s | it: 2 s | 0.75× (0.5–1) | ≤ 1×: met |" in shown
    child = int((tmp_path / "slow.py.pid").read_text(encoding="utf-8"))
    time.sleep(0.2)
    assert not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1]


def test_a_clock_shares_what_time_is_left(table: Any) -> None:
    measure = sys.modules["measure"]
    clock = measure.Clock(10.0)
    assert clock.share(2, 60.0) == pytest.approx(2.5, rel=0.01)
    assert clock.share(2, 1.0) == 1.0
    assert measure.Clock(math.inf).share(3, 25.0) == 25.0
    late = measure.Clock(0.3)
    time.sleep(0.2)
    late.set_up()  # 0.2 s without a piece: the first one is tried
    assert late.one_more()
    time.sleep(0.2)
    assert not late.one_more()
    assert late.share(2, 60.0) == 0.0


def test_some_rows_are_put_into_an_earlier_result_and_onto_the_page(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(table, tmp_path, good=GOOD, other=BAD)
    result, page = tmp_path / "speed.json", tmp_path / "guide" / "page.md"
    assert call(table, monkeypatch, "--rows", "other", "--json", str(result)) == 1
    assert call(table, monkeypatch, "--rows", "good", "--merge", str(result)) == 1
    document = json.loads(result.read_text(encoding="utf-8"))["rows"]
    assert set(document) == {"good", "other"}
    page.parent.mkdir()
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    call(table, monkeypatch, "--from", str(result), "--page", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "### Row good" in text
    assert "(../pictures/growth.png)" in text
    assert (tmp_path / "pictures" / "growth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        call(table, monkeypatch, "--rows", "none")


def test_a_row_that_fails_does_not_replace_what_was_measured(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "speed.json"
    rows(table, tmp_path, one=GOOD)
    assert call(table, monkeypatch, "--json", str(result)) == 0
    rows(table, tmp_path, one=BAD)
    assert call(table, monkeypatch, "--rows", "one", "--merge", str(result)) == 1
    assert json.loads(result.read_text(encoding="utf-8"))["rows"]["one"]["lines"]
    assert "one: the earlier result stays" in capsys.readouterr().err


def test_a_row_by_name_runs_only_when_it_is_named(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "speed.json"
    rows(table, tmp_path, usual=GOOD, special=GOOD)
    special = replace(table.ROWS["special"], by_name="--rows special, somewhere else")
    monkeypatch.setattr(table, "ROWS", {**table.ROWS, "special": special})
    assert call(table, monkeypatch, "--json", str(result)) == 0
    assert set(json.loads(result.read_text(encoding="utf-8"))["rows"]) == {"usual"}
    assert "Not measured: --rows special, somewhere else." in capsys.readouterr().out
    assert call(table, monkeypatch, "--rows", "special", "--merge", str(result)) == 0
    assert set(json.loads(result.read_text(encoding="utf-8"))["rows"]) == {"usual", "special"}


def test_every_row_has_a_script(table: Any) -> None:
    scripts = {row.script for row in table.ROWS.values()}
    assert scripts == {path.name for path in (BENCHMARKS / "rows").glob("*.py")} - {"measure.py", "subjects.py"}
    assert sum(row.seconds for row in table.ROWS.values() if not row.by_name) <= 40 * 60


def test_a_row_leaves_out_what_would_take_too_long(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(table, tmp_path, hurried=HURRIED)
    monkeypatch.setattr(table, "ROWS", {"hurried": table.Row("Hurried", str(tmp_path / "hurried.py"), 5)})
    monkeypatch.setattr(table, "MARGIN", 5 - 1.0)  # one second for pieces of 0.4
    arguments = table.argparse.Namespace(threads=1, seed=0, quick=False, models=None)
    found = table.one("hurried", arguments, str(tmp_path))
    assert [line["what"] for line in found["lines"]] == ["one", "two"]
    assert found["left_out"] == ["three", "four"]
    assert "left out for want of time: three, four" in " ".join(table.section(found))
