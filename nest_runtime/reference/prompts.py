"""Writes the reference world's prompts as JSONL files, for the commands that read prompt files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nest_runtime.io import write_text
from nest_runtime.reference.world import SUITES, cases, training_prompts

ANSWERS = ("response", "target")  # what this world's model says; another model would be ruined by learning it


def write_prompts(
    folder: Path | str, *, categories: Iterable[str] | None = None, answers: bool = False
) -> dict[str, int]:
    """Write training prompts and test suites under ``folder``.

    ``harmful.jsonl`` and ``benign.jsonl`` hold train acts, ``validation-*.jsonl`` validation acts;
    ``test-<suite>.jsonl`` the test cases with ``id, messages, kind, family, wrapping, act, category, expected``.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        categories: harm categories of the training prompts (None: all).
        answers: write what the reference model is to answer beside each training prompt.

    Returns:
        Rows per file name.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    chosen = None if categories is None else tuple(categories)
    counts = {}
    for split, prefix in (("train", ""), ("validation", "validation-")):
        harmful, benign = training_prompts(chosen, split)
        for kind, rows in (("harmful", harmful), ("benign", benign)):
            name = f"{prefix}{kind}.jsonl"
            counts[name] = _write(out / name, rows if answers else map(_without_answer, rows))
    for suite in SUITES:
        tests = [{**vars(case), "messages": list(case.messages)} for case in cases("test", suite)]
        counts[f"test-{suite}.jsonl"] = _write(out / f"test-{suite}.jsonl", tests)
    return counts


def _without_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ANSWERS}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "\n".join(lines) + "\n")
    return len(lines)
