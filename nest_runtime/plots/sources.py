"""What the user names, recognized by kind: patches, sites files, evaluation results, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError, reason_of
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.io import MAX_RESULT, expand, parse_json, read_text
from nest_runtime.measures import ATTACK_SUCCESS
from nest_runtime.plots.view import NeuronView, view_of_patch, view_of_sites


@dataclass(frozen=True)
class Sources:
    """Everything that was named.

    Attributes:
        views: patches and sites files.
        results: evaluations, in the order given.
        comparisons: documents of ``compare``.
    """

    views: tuple[NeuronView, ...] = ()
    results: tuple[EvalResult, ...] = ()
    comparisons: tuple[Mapping[str, Any], ...] = ()


def read_sources(refs: Sequence[str], *, model_hash: str | None = None) -> Sources:
    """Read what is named: ``*.json`` files by what they hold, everything else as a patch reference.

    Args:
        refs: files and patch references.
        model_hash: the model whose ``v3`` is meant.

    Raises:
        DataError: a JSON file is none that this package writes.
        PatchNotFound: a patch reference names nothing; and what else ``load_patch`` raises.
    """
    views: list[NeuronView] = []
    results: list[EvalResult] = []
    comparisons: list[Mapping[str, Any]] = []
    for ref in refs:
        if not ref.endswith(".json"):
            from nest_runtime.resolve import load_patch

            views.append(view_of_patch(load_patch(ref, model_hash=model_hash)))
            continue
        value = _read(expand(ref))
        if "records" in value:
            results.append(EvalResult.from_json(value))
        elif "rows" in value and "sweep" in value:
            comparisons.append(value)
        else:
            from nest_runtime.train.sites import read_sites

            views.append(view_of_sites(read_sites(ref), Path(ref).name))
    return Sources(tuple(views), tuple(results), tuple(comparisons))


def _read(path: Path) -> dict[str, Any]:
    hint = "give what `locate --out`, `eval --out` or `compare --out` wrote, or a patch"
    try:
        value = parse_json(read_text(path, MAX_RESULT))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", hint) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {reason_of(error)}", hint) from None
    if not isinstance(value, dict) or not {"sites", "records", "sweep"} & value.keys():
        summary = isinstance(value, dict) and ATTACK_SUCCESS.key in value
        what = "is a summary without the answers" if summary else "holds nothing that can be drawn"
        raise DataError(f"{path} {what}", "give what `eval --out FILE` wrote" if summary else hint)
    return value
