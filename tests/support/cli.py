"""The command line in this process: ``run`` gives status and output, ``fails`` is the contract of every error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nest_runtime.cli.main import main


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def command_line(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = main([str(item) for item in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command_line(capsys)


def fails(result: Result, status: int, *words: str) -> None:
    """The contract of every error: the status, two lines on stderr at its end, nothing on stdout."""
    lines = result.err.splitlines()[-2:]
    assert result.status == status, result
    assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"], result.err
    assert lines[1].removeprefix("hint: ")
    assert result.out == ""
    for word in words:
        assert word in result.err
