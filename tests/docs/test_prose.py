"""How the documents are written: lines that fit, and sentences that can be read at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PRINTED = ("comparison.md", "ablations.md")  # under docs/results: written by commands, not by hand
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in PRINTED or "guide" in page.parts]
WIDEST = 100  # characters of a line
LONGEST = {True: 25, False: 40}  # words of a sentence: README's, the other documents'
AVERAGE = 18  # words of README's sentences


def without_code(text: str) -> str:
    """The text without its code blocks, fenced or indented."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?:(?: {4}.*)?\n)+", "\n", text)


def sentences(text: str) -> list[str]:
    """The sentences outside of code, tables, headings and pictures.

    A link counts by its words, code as one word. Items of a list go on with the sentence that leads to them.
    """
    text = re.sub(r"^\s*(\||#|!\[|<!--|:::).*$", "\n", without_code(text), flags=re.MULTILINE)
    text = re.sub(r":\s*\n+ *(?:[-*]|\d+\.) +", ": ", text)
    text = re.sub(r"^ *(?:[-*]|\d+\.) +", "", text, flags=re.MULTILINE)
    return [part for paragraph in text.split("\n\n") for part in told_apart(paragraph)]


def cells(text: str) -> list[str]:
    """The sentences in the cells of tables."""
    rows = [line for line in without_code(text).splitlines() if line.lstrip().startswith("|")]
    return [part for row in rows for cell in re.split(r"(?<!\\)\|", row) for part in told_apart(cell)]


def told_apart(text: str) -> list[str]:
    """The sentences of a paragraph."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    return [part for part in re.split(r"(?<=[.?!])[)*]*\s+", " ".join(text.split())) if part]


def test_sentences_are_told_apart() -> None:
    text = (
        "# Head\n\nOne `a b c` two. Three [four five](x.md)!\n\n- Six.\n- Seven: eight.\n\n```\nno. no.\n```\n| no |\n"
    )
    assert sentences(text) == ["One code two.", "Three four five!", "Six.", "Seven: eight."]
    assert sentences("Two:\n\n- one;\n- another.\n- More.\n") == ["Two: one; another.", "More."]
    assert cells(f"{text}\n| One. Two | `a\\|b` |\n") == ["no", "One.", "Two", "code"]


@pytest.mark.parametrize("page", [README, *PAGES, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sentences_are_short(page: Path) -> None:
    text, limit = page.read_text(encoding="utf-8"), LONGEST[page == README]
    assert [part for part in [*sentences(text), *cells(text)] if len(part.split()) > limit] == []


def test_readmes_sentences_are_short_on_average() -> None:
    counts = [len(part.split()) for part in sentences(README.read_text(encoding="utf-8"))]
    assert sum(counts) / len(counts) <= AVERAGE


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_fit(page: Path) -> None:
    """Tables, pictures and single words that cannot be broken (addresses) are left out."""
    lines = without_code(page.read_text(encoding="utf-8")).splitlines()
    prose = [line for line in lines if not re.match(r"\s*(\||!\[|<!--)", line)]
    assert [line for line in prose if len(line) > WIDEST and len(line.split()) > 2] == []
