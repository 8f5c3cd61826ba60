"""Finished cells of a comparison on disk: one method with one value of its knob and one seed, on one set of cases.

A cell's folder is named by a digest of everything that decides its artifact and answers. The judge is not part of it:
under another judge, a finished cell's answers are judged again (compare.py). Neither is the code: a cell records the
code that made it, and :func:`notes_on` says if that is not the code running now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nest_runtime.compare.methods.base import Method, Target
from nest_runtime.compare.provenance import code_digest
from nest_runtime.errors import DataError
from nest_runtime.evaluate.cases import Case, digest_of
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.utility import Questions
from nest_runtime.io import read_json, write_json
from nest_runtime.train.recipe import Recipe

CELL_FORMAT = 2
_FIELDS = ("method", "knob", "value", "seed", "fit", "judge", "made")


@dataclass(frozen=True)
class Cell:
    """One method, value and seed, measured.

    Attributes:
        fit: trainable, artifact_bytes, seconds, peak_bytes, report: what fitting took.
        result: answers and verdicts on the cases.
        judge: the identity of the judge that gave the verdicts.
        made: provenance (provenance.py) of the run that made the answers.
    """

    method: str
    knob: str
    value: float
    seed: int
    fit: Mapping[str, Any]
    result: EvalResult
    judge: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """The knob and its value, for people."""
        return f"{self.knob} {self.value:g}" if self.knob else "–"


def cell_key(
    target: Target,
    method: Method,
    value: float,
    recipe: Recipe,
    data: Sequence[str],
    cases: Sequence[Case],
    tokens: int,
    questions: Questions | None = None,
) -> str:
    """Sixteen hex digits over all that decides a cell's artifact, answers and utility.

    Args:
        target: the model; its hash and its dtype count.
        method: its name and revision count.
        value: of the method's knob.
        recipe: what the method reads of it, the seed among it.
        data: digests of the training prompts.
        cases: what is asked.
        tokens: the longest answer.
        questions: of utility, if any are asked.
    """
    settings = {name: setting for name, setting in recipe.to_json().items() if name not in method.unused}
    parts = {
        "format": CELL_FORMAT,
        "method": [method.name, method.revision, value],
        "recipe": settings,
        "base": [target.base_hash, str(getattr(target.model, "dtype", ""))],
        "data": list(data),
        "cases": cases_digest(cases),
        "tokens": tokens,
        **({} if questions is None else {"questions": questions.digest}),
    }
    return digest_of(parts).removeprefix("sha256:")[:16]


def cases_digest(cases: Sequence[Case]) -> str:
    """``sha256:<hex>`` over all that decides what is asked, judged and counted, in order."""
    names = ("id", "suite", "family", "category", "attack", "trial", "attempt", "judged_digest")
    return digest_of([[getattr(case, name) for name in names] for case in cases])


def read_cell(path: Path) -> Cell | None:
    """The cell of a file, or None if there is no file.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    try:
        value = read_json(path)
        if value is None:
            return None
        if value["format"] != CELL_FORMAT:
            raise ValueError(f"format {value['format']!r}, expected {CELL_FORMAT}")
        fields = {name: value[name] for name in _FIELDS}
        return Cell(**fields, result=EvalResult.from_json(value["result"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is no finished cell: {type(error).__name__}: {error}", "delete it, or start anew with --fresh"
        ) from error


def write_cell(path: Path, cell: Cell) -> None:
    """Write a finished cell, atomically."""
    fields = {name: getattr(cell, name) for name in _FIELDS}
    write_json(path, {"format": CELL_FORMAT, **fields, "result": cell.result.to_json()})


def notes_on(cells: Sequence[Cell]) -> list[str]:
    """What a reader should know of where the cells come from."""
    others = [cell for cell in cells if cell.made.get("code") not in (None, code_digest())]
    if not others:
        return []
    commits = sorted({str(cell.made.get("commit") or cell.made.get("nest_runtime")) for cell in others})
    return [
        f"{len(others)} of {len(cells)} cells were made by other code than is running now "
        f"({', '.join(name[:12] for name in commits)}); --fresh makes them anew"
    ]
