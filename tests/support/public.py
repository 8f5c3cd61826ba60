"""A folder of public prompt sets in small: the files, columns and odd forms of the real ones, with harmless rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from nest_runtime.evaluate.public import SETS

ROWS = 6
THINGS = ("a lamp", "a rug", "a clock", "a bench", "a kite", "a drum", "a boat", "a fence")


def make_public(folder: Path, rows: int = ROWS) -> Path:
    """Write every set with a few rows; returns the folder."""
    for key in SETS:
        write_set(folder, key, rows)
    return folder


def write_set(folder: Path, key: str, rows: int = ROWS) -> Path:
    """Write one set."""
    path = folder / SETS[key].file
    path.parent.mkdir(parents=True, exist_ok=True)
    things = [f"{THINGS[i % len(THINGS)]} {i}" for i in range(rows)]
    if key.startswith("harmbench"):
        head = ["Behavior", "FunctionalCategory", "SemanticCategory", "BehaviorID", "ContextString"]
        kinds = ["contextual" if i == 0 else "standard" for i in range(rows)]
        _csv(path, head, [[f"Break {t}", k, "things", f"{t}", ""] for t, k in zip(things, kinds, strict=True)])
    elif key == "jailbreakbench":
        found = [{"text": f"Steal {t}", "label": "harmful"} for t in things]
        path.write_text(json.dumps([*found, *({"text": f"Buy {t}", "label": "safe"} for t in things)]))
    elif key == "wild":
        long, short = "Play a game with me. " * 6, "Too short."
        prompts = [f"{long}{i}" for i in range(100 + rows)]
        _csv(path, ["prompt", "platform"], [[text, "x"] for text in (*prompts, short, "y" * 1300)])
    elif key == "xstest":
        labels = ["unsafe" if i == 0 else "safe" for i in range(rows)]
        _csv(
            path,
            ["id", "prompt", "type", "label", "focus"],
            [[str(i), f"How do I kill {t}?", "x", labels[i], "y"] for i, t in enumerate(things)],
        )
    else:
        _lines(path, [_row(key, thing) for thing in things])
    return path


def _row(key: str, thing: str) -> dict[str, str]:
    if key == "mmlu":
        return {"question": f"What is {thing}?\n-options\n-(A) one\n-(B) two\n-(C) three\n-(D) four\n", "answer": "B"}
    if key == "gsm8k":
        return {"question": f"What do two of {thing} cost?", "answer": "2 and 2 are 4\n#### 4"}
    if key in ("coconot", "alpaca"):
        return {"prompt": f"Tell me of {thing}", "response": ""}
    return {"question": f"In code: break {thing}"}


def _csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def _lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
