"""Every ``nest-runtime …`` in any document is a command that exists, with options that it takes. Nothing is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from nest_runtime.cli.main import app

ROOT = Path(__file__).parents[2]
GENERATED = (
    "CHANGELOG.md",
    "docs/reference/cli.md",
    "docs/reference/settings.md",
    "docs/results/",
)  # or kept as it was
PAGES = [
    page
    for page in sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/*/*.md"), *ROOT.glob(".github/*/*.yml")]
    )
    if not page.relative_to(ROOT).as_posix().startswith(GENERATED)
]
USAGE = typer.BadParameter.__mro__[1]  # click's UsageError, wherever typer keeps it
IN_BLOCK = re.compile(r"(?:nest-runtime|-m nest_runtime) (.*)")
IN_TEXT = re.compile(r"`nest-runtime\s+([^`]+)`")
END = re.compile(r"\s(?:&&|\|\|?|>{1,2}|<|&|;|#)(?:\s|$)|[;)]\s*$|\)\"")  # of a command, in a line of a shell


def typed(text: str) -> list[tuple[str, bool]]:
    """The words after each ``nest-runtime``, and whether the command stands there whole."""
    found, variables = [], {}
    blocks = re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    for block in [*blocks, *re.findall(r"^ {4}nest-runtime (?:.*\\\n)*.*", text, re.MULTILINE)]:
        for line in block.replace("\\\n", " ").splitlines():
            variables |= dict(re.findall(r"\b([A-Z])=\"([^\"$]*(?:\$U)?[^\"$]*)\"", line))
            for part in line.split(" && "):
                if (match := IN_BLOCK.search(part)) and not part.lstrip().startswith("docker "):
                    found.append((END.split(match[1])[0], True))
    outside = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [(" ".join(match[1].split()), False) for match in IN_TEXT.finditer(outside)]
    return [
        (re.sub(r"\$([A-Z])\b", lambda name: variables.get(name[1], name[0]), words), whole) for words, whole in found
    ]


def parse(words: list[str]) -> None:
    """Raises where a command does not exist, or does not take what it is given."""
    inner: Any = typer.main.get_command(app)
    while hasattr(inner, "commands") and words and not words[0].startswith("-"):
        assert words[0] in inner.commands, words[0]
        inner = inner.commands[words.pop(0)]
    if not hasattr(inner, "commands"):
        inner.make_context("nest-runtime", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    wrong = []
    for line, whole in typed(page.read_text(encoding="utf-8")):
        if "…" in line or "COMMAND" in line:
            continue
        try:
            parse(shlex.split(line, comments=True))
        except typer.Exit:
            pass  # --help, --version
        except (USAGE, AssertionError) as error:
            if whole or "Missing parameter" not in str(error):
                wrong.append((line, str(error)))
    assert wrong == []
