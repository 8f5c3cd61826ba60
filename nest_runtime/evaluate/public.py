"""Public prompt sets in a folder of the user's: what they are, under which licence, where they come from, their rows.

None of them is part of the package. This reads them as they are published; which of their rows make a suite is
standard.py's business.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nest_runtime.errors import DataError, UsageError
from nest_runtime.io import expand
from nest_runtime.prompts.readers import read_rows, read_text

VARIABLE = "NEST_TEST_DATA"
PAGE = "docs/guide/evaluation.md#the-standard-suite"
WILD_CHARACTERS = 1200
WILD_FOR_VALIDATION = 100
T = TypeVar("T")


@dataclass(frozen=True)
class PublicSet:
    """One file of a published set.

    Attributes:
        file: its path in the folder of sets.
        title: what it is, with its paper; licence: of its rows; origin: the repository and path it is published at.
    """

    file: str
    title: str
    licence: str
    origin: str


def _derta(name: str, title: str) -> PublicSet:
    paper = "Yuan et al. 2024, arXiv 2407.09121"
    return PublicSet(f"derta/{name}.json", f"{title} ({paper})", "MIT", f"RobustNLP/DeRTa data/test/{name}.json")


SETS: dict[str, PublicSet] = {
    "harmbench": PublicSet(
        "harmbench/harmbench_behaviors_text_test.csv",
        "HarmBench, test (Mazeika et al. 2024, arXiv 2402.04249)",
        "MIT",
        "centerforaisafety/HarmBench data/behavior_datasets/harmbench_behaviors_text_test.csv",
    ),
    "harmbench-validation": PublicSet(
        "harmbench/harmbench_behaviors_text_val.csv",
        "HarmBench, validation (Mazeika et al. 2024, arXiv 2402.04249)",
        "MIT",
        "centerforaisafety/HarmBench data/behavior_datasets/harmbench_behaviors_text_val.csv",
    ),
    "jailbreakbench": PublicSet(
        "jailbreakbench/harmful_and_benign/jailbreakbench.json",
        "JailbreakBench (Chao et al. 2024, arXiv 2404.01318)",
        "MIT",
        "bigsnarfdude/wizard101 data/benchmark/jailbreakbench.json",
    ),
    "wild": PublicSet(
        "in_the_wild/jailbreak_prompts.csv",
        "jailbreak prompts found in the wild (Shen et al. 2023, arXiv 2308.03825)",
        "MIT",
        "TrustAIRLab/JailbreakLLMs data/jailbreak_prompts.csv",
    ),
    "jailbreakchat": _derta("safety_jailbreakchat", "JailbreakChat prompts in DeRTa's test sets"),
    "selfcipher": _derta("safety_selfcipher", "SelfCipher prompts in DeRTa's test sets"),
    "codeattack": _derta("safety_codeattack", "CodeAttack prompts in DeRTa's test sets"),
    "completion": _derta("safety_completionattack", "CompletingAttack prompts in DeRTa's test sets"),
    "xstest": PublicSet(
        "xstest/xstest_prompts.csv",
        "XSTest (Röttger et al. 2023, arXiv 2308.01263)",
        "CC-BY-4.0",
        "paul-rottger/exaggerated-safety xstest_prompts.csv",
    ),
    "coconot": PublicSet(
        "coconot/coconot_contrast_eval.jsonl",
        "CoCoNot, contrast set for evaluation (Brahman et al. 2024, arXiv 2407.12043)",
        "MIT",
        "allenai/noncompliance data/coconot_contrast_eval.jsonl",
    ),
    "mmlu": _derta("helpfulness_mmlu_500", "MMLU (Hendrycks et al. 2021, arXiv 2009.03300), 500 in DeRTa's test sets"),
    "gsm8k": PublicSet(
        "gsm8k/test_first200.jsonl",
        "GSM8K (Cobbe et al. 2021, arXiv 2110.14168), the first 200 of the test set",
        "MIT",
        "openai/grade-school-math grade_school_math/data/test.jsonl, its first 200 lines",
    ),
    "alpaca": PublicSet(
        "alpaca/alpaca_2000.jsonl",
        "Alpaca instructions (Taori et al. 2023), 2,000 of them",
        "CC-BY-NC-4.0",
        "andyrdt/refusal_direction dataset/processed/alpaca.json, any 2,000 as rows with a prompt",
    ),
}


@dataclass(frozen=True)
class PublicData:
    """A folder of public sets."""

    folder: Path

    @classmethod
    def at(cls, folder: str | Path | None) -> PublicData:
        """The folder named, else the one that NEST_TEST_DATA names.

        Raises:
            UsageError: neither names a folder.
        """
        named = str(folder) if folder is not None else os.environ.get(VARIABLE, "")
        if not named:
            raise UsageError(
                "the standard suite asks public prompt sets, and no folder of them is named",
                f"give --data DIR, or set {VARIABLE}; {PAGE} says which files belong there",
            )
        path = expand(named)
        if not path.is_dir():
            raise UsageError(
                f"{named} is no folder; expected the public prompt sets", f"{PAGE} says which files belong there"
            )
        return cls(path)

    def check(self, keys: Iterable[str]) -> None:
        """Say which of the sets named are not there, all at once.

        Raises:
            DataError: any of them is missing.
        """
        missing = [SETS[key] for key in dict.fromkeys(keys) if not (self.folder / SETS[key].file).is_file()]
        if missing:
            raise DataError(
                f"{self.folder} lacks {', '.join(found.file for found in missing)}",
                f"get {'; '.join(f'{found.file} from github.com/{found.origin}' for found in missing)} ({PAGE}); "
                "or ask for fewer suites, as in standard:plain,built-in",
            )

    def fields(self, key: str, *columns: str) -> list[tuple[str, ...]]:
        """Columns of a set's rows, as texts.

        Raises:
            DataError: the file cannot be read, or a row lacks a column.
        """
        path = self.folder / SETS[key].file
        if path.suffix == ".json" and not read_text(path).lstrip().startswith("["):
            rows = _json_lines(path)  # DeRTa's files are JSON lines by another name
        else:
            rows = read_rows(path)
        found = []
        for line, row in rows:
            lacking = [column for column in columns if not isinstance(row.get(column), str | int | float)]
            if lacking:
                raise DataError(
                    f"{path}:{line}: a row without {', '.join(map(repr, lacking))}; found "
                    f"{', '.join(map(repr, row)) or 'nothing'}",
                    f"get the file unchanged from github.com/{SETS[key].origin}",
                )
            found.append(tuple(str(row[column]) for column in columns))
        return found

    def column(self, key: str, name: str) -> list[str]:
        """One column of a set's rows."""
        return [text for (text,) in self.fields(key, name)]

    def jailbreakbench(self, kind: str) -> list[str]:
        """JailbreakBench's texts, ``harmful`` or ``benign`` (which the file calls safe)."""
        rows = self.fields("jailbreakbench", "text", "label")
        return [text for text, label in rows if (label == "harmful") == (kind == "harmful")]

    def harmbench(self, key: str = "harmbench") -> list[str]:
        """HarmBench's behaviors without context of their own."""
        rows = self.fields(key, "Behavior", "FunctionalCategory")
        return [behavior for behavior, category in rows if category == "standard"]

    def xstest_safe(self) -> list[str]:
        """XSTest's safe prompts."""
        return [prompt for prompt, label in self.fields("xstest", "prompt", "label") if label == "safe"]

    def wild(self, part: str = "test") -> list[str]:
        """Prompts found in the wild, short enough; the first hundred of a seeded order are for ``validation``."""
        short = sorted({t for t in self.column("wild", "prompt") if 100 <= len(t) <= WILD_CHARACTERS})
        random.Random("wild").shuffle(short)
        return short[:WILD_FOR_VALIDATION] if part == "validation" else short[WILD_FOR_VALIDATION:]


def drawn(items: Sequence[T], n: int, purpose: str, seed: int = 0) -> list[T]:
    """At most n of the items, by a seed that the purpose is part of."""
    found = list(items)
    random.Random(purpose if seed == 0 else f"{seed}/{purpose}").shuffle(found)
    return found[:n]


def behind(wild: Sequence[str], goals: Sequence[str], n: int) -> list[tuple[str, str]]:
    """(What is typed, what is wanted): n goals, each behind a wild prompt of its own while there are enough."""
    return [(f"{wild[i % len(wild)]}\n\n{goals[i % len(goals)]}", goals[i % len(goals)]) for i in range(n)]


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a ``.json`` file that holds JSON lines."""
    from nest_runtime.io import lines_of, parse_json

    rows = []
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: broken JSON: {error}", "get the file again, unchanged") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {line[:40]!r} is no row", "get the file again, unchanged")
        rows.append((number, row))
    return rows
