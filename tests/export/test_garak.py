"""The plugins for garak: where they are put, and what is said where that cannot be. garak itself: tests/clients."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nest_runtime.errors import NestError
from nest_runtime.export.garak import PLUGINS, __main__, garak_folder, install


def test_both_plugins_are_put_where_garak_looks_and_replaced(tmp_path: Path) -> None:
    for place in PLUGINS.values():
        (tmp_path / place).parent.mkdir()
    (tmp_path / "detectors" / "nest.py").write_text("an older one")
    written = install(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == list(PLUGINS.values())
    for path in written:
        classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        assert f'DEFAULT_CLASS = "{classes[0]}"' in path.read_text()


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(NestError, match=r"nest\.py cannot be written") as failed:
        install(tmp_path / "nowhere")
    assert "garak's folder" in failed.value.hint


def test_without_garak_there_are_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nest_runtime.export.garak.find_spec", lambda name: None)
    with pytest.raises(NestError, match="garak is not installed"):
        garak_folder()
    assert __main__.main() == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error", "hint"]
