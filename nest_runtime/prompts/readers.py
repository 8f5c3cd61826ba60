"""Prompt files as rows: JSONL, JSON, CSV, TXT and parquet, with errors that name file and line.

A row is ``(line, fields)``. What the fields mean is examples.py's business; nothing here knows of
chat templates or models.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.io import is_text, lines_of, open_file, parse_json
from nest_runtime.prompts.builtin import NAMES as BUNDLED

Row = tuple[int, dict[str, Any]]

MAX_CELL = 1 << 26  # characters of a CSV file's cell; Python's own limit is 131,072
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet")


def read_rows(path: Path, what: str = "prompts") -> list[Row]:
    """All rows of one prompt file, by its suffix.

    Args:
        path: the file.
        what: what its rows are, for messages.

    Raises:
        DataError: no such file, unknown suffix, not UTF-8, broken syntax, wrong types, or no rows.
    """
    check_file(path, what)
    suffix, kind = path.suffix.lower(), f"{what.removesuffix('s')} file"
    if suffix == ".parquet":
        rows = list(_parquet(path))
    elif suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of {kind} {path.suffix!r}; expected one of {', '.join(SUFFIXES)}",
            "rename the file to the suffix of what it holds",
        )
    else:
        text = read_text(path)
        reader = {".csv": _csv, ".txt": _txt, ".json": _json}.get(suffix, _jsonl)
        rows = list(reader(path, text))
    if not rows:
        raise DataError(f"{path}: the file holds no {what}", "give a file with at least one row")
    return rows


def check_file(path: Path, what: str = "prompts") -> None:
    """Raise DataError if ``path`` is not a readable file of ``what``, with the nearest name as a hint."""
    kind = f"{what.removesuffix('s')} file"
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a {kind}", "name one file in it")
    if path.is_file():
        return
    if path.exists():
        raise DataError(f"{path} is a device or a pipe; expected a {kind}", f"save the {what} to a file first")
    folder = path.parent
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    bare = str(path) == path.name and what == "prompts"
    near = difflib.get_close_matches(path.name, [*(BUNDLED if bare else ()), *names], n=1, cutoff=0.6)
    hint = f"did you mean {folder / near[0]}?" if near else "check the path"
    if bare and not path.suffix:
        hint += f"{' ' if near else '; '}prompts that come with the package are {', '.join(BUNDLED)}"
    if not folder.is_dir():
        hint = f"the folder {folder} does not exist either"
    raise DataError(f"no such {kind}: {path}", hint)


def read_text(path: Path) -> str:
    """The file as text. DataError names the line of the first byte that is not UTF-8."""
    with open_file(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(lines_of(data[: error.start].decode("latin-1") + "."))
        encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8",
            f"the file looks like {encoding}: save it as UTF-8",
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            yield number, _row(path, number, _parse(path, line, number))


def _json(path: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    value = _parse(path, text, 1)
    if not isinstance(value, list):
        raise DataError(
            f"{path}:1: the file holds a JSON {_kind(value)}; expected a list of rows",
            'use [{"prompt": "…"}, …], or a .jsonl file with a row a line',
        )
    for number, item in enumerate(value, 1):
        yield number, _row(path, number, item, unit="row ")


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        value = parse_json(text)
        _check_text(value)
        return value
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise DataError(
            f"{path}:{where}: broken JSON at column {error.colno}: {error.msg}",
            'expected one object a line, like {"prompt": "…", "response": "…"}'
            if line > 1 or path.suffix != ".json"
            else "expected a list of objects",
        ) from None
    except ValueError as error:  # nested beyond measure, a number of thousands of digits, half a character
        raise DataError(f"{path}:{line}: this JSON cannot be used: {error}", "mend that row, or leave it out") from None


def _check_text(value: Any) -> None:
    r"""Refuse text that is none: half of a surrogate pair (``\ud83d`` alone), which no tokenizer can take."""
    texts = [value]
    while texts:
        item = texts.pop()
        if isinstance(item, dict):
            texts += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            texts += item
        elif isinstance(item, str) and not is_text(item):
            raise ValueError(f"{item!a:.60} holds half of a surrogate pair")


def _row(path: Path, number: int, value: Any, unit: str = "") -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{path}:{unit}{number}: a JSON {_kind(value)}; expected an object or a string",
        'write {"prompt": "…"} or {"messages": […]}',
    )


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _csv(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1  # the line on which the next row begins; a row may go over several, and empty ones count
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"{path}:{line}: {len(cells)} cells; the header has {len(header)}",
                    "put quotes around cells that hold commas",
                )
            if len(header) == 1 or any(cell.strip() for cell in cells):  # in one column "" is a prompt left empty
                yield line, {**dict.fromkeys(header), **dict(zip(header, cells, strict=False))}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}", "check the quotes of that line") from None


def _txt(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow, which is not installed",
            "pip install pyarrow, or convert the file to JSONL",
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}", "convert the file to JSONL") from error
    yield from enumerate(rows, 1)
