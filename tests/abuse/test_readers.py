r"""Prompt files and words as others write them: what a line is, what a character is, and where an error was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nest_runtime.errors import DataError
from nest_runtime.prompts.readers import read_rows
from tests.abuse.conftest import Run, refused

ODD = "one\u2028still one\x0cand\x85here\x1cand\x0bthere"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_is_what_ends_with_a_line_end(tmp_path: Path, end: str) -> None:
    """The number of prompts is the denominator of every rate."""
    plain = tmp_path / "p.txt"
    plain.write_bytes(end.join((ODD, "", "two", "")).encode())
    assert read_rows(plain) == [(1, {"prompt": ODD}), (3, {"prompt": "two"})]
    lines = tmp_path / "p.jsonl"
    lines.write_bytes(end.join((json.dumps({"prompt": ODD}, ensure_ascii=False), "", '{"prompt": "two"}')).encode())
    assert read_rows(lines) == [(1, {"prompt": ODD}), (3, {"prompt": "two"})]
    table = tmp_path / "p.csv"
    table.write_bytes(end.join(("prompt,kind", "", f'"{ODD}",a', "two,b")).encode())
    assert [(line, row["prompt"]) for line, row in read_rows(table)] == [(3, ODD), (4, "two")]


def test_a_long_cell(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0][1]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("p.csv", b'prompt,kind\n\n\n"a\nb",x\n\na,b,c\n', 7),
        ("p.jsonl", b'{"prompt": "a"}\r\r{"prompt": \r', 3),
        ("p.txt", b"a\rb\r\xff\r", 3),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', 2),
        ("p.jsonl", b'\n{"messages": [{"role": "user", "content": "\\udc00"}]}\n', 2),
        ("p.jsonl", b'{"a": ' + b"[" * 100_000, 1),
        ("p.jsonl", b'\n{"prompt": ' + b"9" * 10_000 + b"}", 2),
    ],
)
def test_an_error_names_its_line(tmp_path: Path, name: str, content: bytes, where: int) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f":{where}: "):
        read_rows(path)


def test_words_that_are_no_text(run: Run) -> None:
    refused(run("chat", "caf\udce9"), 2, "argument 2 is not UTF-8")
    refused(run("add", "\ud800.safetensors"), 2, "argument 2 is not UTF-8")
