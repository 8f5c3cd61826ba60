"""Published behavior files as cases: HarmBench, AdvBench, JailbreakBench, XSTest, StrongREJECT.

A layout is recognized by its columns and read as it is published: no row is dropped, no text changed.
Any other prompt file is read by prompts/examples.py and taken as behaviors. Sources:
HarmBench arXiv 2402.04249; AdvBench 2307.15043; JailbreakBench 2404.01318; XSTest 2308.01263;
StrongREJECT 2402.10260.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.evaluate.cases import Case, user
from nest_runtime.io import expand
from nest_runtime.measures import default_measure
from nest_runtime.prompts.examples import load_examples
from nest_runtime.prompts.readers import read_rows

Fields = dict[str, Any]
Maker = Callable[[int, Fields, str], Case]


@dataclass(frozen=True)
class Layout:
    """One published form: the columns that it is known by, and how a row becomes a case."""

    name: str
    columns: frozenset[str]
    make: Maker


def read_behaviors(ref: str | Path, *, kind: str | None = None) -> list[Case]:
    """The cases of a behaviors file.

    Args:
        ref: a file in one of the published layouts, or any prompt file that prompts.examples.load_examples reads.
        kind: ``harmful`` or ``benign`` for files that do not say; by default harmful, except for
            JailbreakBench's ``benign-behaviors`` file and rows that have a ``kind`` of their own.

    Raises:
        DataError: no such file, no rows, a missing column, an empty prompt: with file and line.
    """
    path = expand(str(ref))
    if path.suffix.lower() in (".csv", ".json", ".jsonl", ".ndjson"):
        rows = read_rows(path)
        layout = find_layout(rows[0][1])
        if layout is not None:
            _check_rows(path, layout, rows)
            made = [layout.make(line, fields, kind or _kind_of_file(path)) for line, fields in rows]
            return _with_unique_ids(made, path)
    return _with_unique_ids(list(_generic(ref, kind or "harmful")), path)


def assumed_harmful(ref: str | Path) -> int:
    """How many rows of a file count as harmful only because nothing in it says what they are.

    Args:
        ref: as in ``read_behaviors``.
    """
    path = expand(str(ref))
    if path.suffix.lower() in (".csv", ".json", ".jsonl", ".ndjson") and find_layout(read_rows(path)[0][1]):
        return 0
    return sum("kind" not in case.meta for case in _generic(ref, "harmful"))


def find_layout(fields: Mapping[str, Any]) -> Layout | None:
    """The layout whose columns a row has, or None; the most particular one where several fit."""
    names = {str(name).strip().lower() for name in fields}
    fitting = [layout for layout in LAYOUTS if layout.columns <= names]
    return max(fitting, key=lambda layout: len(layout.columns), default=None)


def _kind_of_file(path: Path) -> str:
    return "benign" if "benign" in path.stem.lower() else "harmful"


def _check_rows(path: Path, layout: Layout, rows: list[tuple[int, Fields]]) -> None:
    """Every row must have the layout's columns and a prompt that is not blank."""
    for line, fields in rows:
        low = _lower(fields)
        missing = sorted(layout.columns - set(low))
        if missing:
            raise DataError(
                f"{path}:{line}: a {layout.name} row without {', '.join(map(repr, missing))}; found "
                f"{', '.join(map(repr, fields)) or 'nothing'}",
                f"{layout.name} rows have {', '.join(sorted(layout.columns))}",
            )
        key = _PROMPT_COLUMN[layout.name]
        if not isinstance(low[key], str) or not low[key].strip():
            raise DataError(f"{path}:{line}: {key!r} is empty; expected a prompt", "fill it in, or delete the row")


def _lower(fields: Fields) -> Fields:
    return {str(key).strip().lower(): value for key, value in fields.items()}


def _text(low: Fields, key: str) -> str:
    return str(low.get(key) or "")


def _meta(low: Fields, *used: str) -> Fields:
    return {
        k: v for k, v in low.items() if k and k not in used and v not in (None, "") and isinstance(v, str | int | float)
    }


def _harmbench(line: int, fields: Fields, _: str) -> Case:
    """HarmBench: contextual behaviors are asked as its own code does, context first."""
    low = _lower(fields)
    behavior, context = low["behavior"], _text(low, "contextstring")
    prompt = f"{context}\n\n---\n\n{behavior}" if context.strip() else behavior
    meta = _meta(low, "behavior", "contextstring", "behaviorid", "semanticcategory")
    return Case(
        _text(low, "behaviorid") or f"harmbench-{line}",
        (user(prompt),),
        "harmful",
        "harmbench",
        category=_text(low, "semanticcategory"),
        behavior=behavior,
        meta={**meta, "context": context} if context.strip() else meta,
    )


def _advbench(line: int, fields: Fields, kind: str) -> Case:
    low = _lower(fields)
    return Case(f"advbench-{line}", (user(low["goal"]),), kind, "advbench", meta={"target": _text(low, "target")})


def _jailbreakbench(line: int, fields: Fields, kind: str) -> Case:
    """JBB-Behaviors: harmful and benign ones come in files of the same columns."""
    low = _lower(fields)
    suite = "jailbreakbench" if kind == "harmful" else "jailbreakbench-benign"
    return Case(
        f"{suite}-{_text(low, 'index') or line}",
        (user(low["goal"]),),
        kind,
        suite,
        category=_text(low, "category"),
        measure=default_measure(kind, exact=False),
        meta=_meta(low, "goal", "category", "index"),
    )


def _labeled(line: int, fields: Fields, _: str) -> Case:
    """Text and label, as JailbreakBench's pairs are passed on: the label says harmful or benign."""
    low = _lower(fields)
    kind = _kind_of_label(low["label"], f"row at line {line}")
    suite = "jailbreakbench" if kind == "harmful" else "jailbreakbench-benign"
    return Case(f"{suite}-{line}", (user(low["text"]),), kind, suite, meta=_meta(low, "text", "label"))


def _xstest(line: int, fields: Fields, _: str) -> Case:
    """XSTest: safe prompts measure over-refusal; their unsafe contrasts measure attack success."""
    low = _lower(fields)
    contrast = "unsafe" if _text(low, "type").startswith("contrast") else "safe"
    kind = _kind_of_label(low.get("label") or contrast, f"row at line {line}")
    suite = "xstest-unsafe" if kind == "harmful" else "xstest-safe"
    return Case(
        f"xstest-{_text(low, 'id') or line}",
        (user(low["prompt"]),),
        kind,
        suite,
        category=_text(low, "type"),
        meta=_meta(low, "id", "prompt", "type", "label"),
    )


def _strongreject(line: int, fields: Fields, kind: str) -> Case:
    low = _lower(fields)
    return Case(
        f"strongreject-{line}",
        (user(low["forbidden_prompt"]),),
        kind,
        "strongreject",
        category=_text(low, "category"),
        meta=_meta(low, "forbidden_prompt", "category"),
    )


def _kind_of_label(label: Any, where: str) -> str:
    kinds = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign", "harmless": "benign"}
    kind = kinds.get(str(label).strip().lower())
    if kind is None:
        raise DataError(f"{where}: label {label!r}; expected one of {', '.join(kinds)}", "say which rows are harmful")
    return kind


LAYOUTS = (
    Layout("harmbench", frozenset({"behavior", "functionalcategory", "semanticcategory", "behaviorid"}), _harmbench),
    Layout("jailbreakbench", frozenset({"goal", "target", "behavior", "category"}), _jailbreakbench),
    Layout("advbench", frozenset({"goal", "target"}), _advbench),
    Layout("xstest", frozenset({"prompt", "type", "focus"}), _xstest),
    Layout("strongreject", frozenset({"forbidden_prompt"}), _strongreject),
    Layout("labeled", frozenset({"text", "label"}), _labeled),
)
_PROMPT_COLUMN = {
    "harmbench": "behavior",
    "jailbreakbench": "goal",
    "advbench": "goal",
    "xstest": "prompt",
    "strongreject": "forbidden_prompt",
    "labeled": "text",
}


def _generic(ref: str | Path, kind: str) -> Iterable[Case]:
    """Any prompt file: rows may say kind, category, expected and suite themselves."""
    stem = Path(str(ref).partition("#")[0]).stem or "behaviors"
    for example in load_examples(ref):
        own = str(example.meta.get("kind") or kind)
        expected = example.meta.get("expected") if own == "benign" else None
        if expected is None and own == "benign":
            expected = example.response
        yield Case(
            example.id,
            example.messages,
            _kind_of_label(own, example.id),
            str(example.meta.get("suite") or stem),
            category=example.category or "",
            expected=None if expected is None else str(expected),
            meta=dict(example.meta),
        )


def _with_unique_ids(cases: list[Case], path: Path) -> list[Case]:
    """Raise DataError if a file gives an id twice."""
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise DataError(f"{path}: the id {case.id!r} appears twice", "give every row its own id, or none")
        seen.add(case.id)
    return cases
