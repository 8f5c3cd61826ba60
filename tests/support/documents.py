"""The commands of a document, in order, and whether what they print is what the page says.

Output is compared in shape: numbers, digests and spaces count as equal, ``…`` stands for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from nest_runtime.prompts.refusals import is_refusal

REPO, FOLDER = "alice/first-safety", "./mirror"  # the tutorial's repository, and where there is no account
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One command of a page, and what the page says that it prints; None if the page does not say."""

    command: str
    output: str | None
    line: int


def steps_of(text: str) -> list[Step]:
    """The commands of all blocks of ``bash`` and ``console``.

    A block without a language that comes right after one of ``bash`` is a part of what its last command prints.
    """
    steps: list[Step] = []
    end, before = 0, ""
    for block in BLOCK.finditer(text):
        language, inside = block.groups()
        line = text[: block.start()].count("\n") + 2
        if language == "console":
            steps += _console(inside, line)
        elif language == "bash":
            for command in lines_of(inside):
                steps.append(Step(command, None, line + inside[: inside.index(command)].count("\n")))
        elif not language and before == "bash" and not text[end : block.start()].strip():
            steps[-1] = Step(steps[-1].command, f"…\n{inside}…", steps[-1].line)
        end, before = block.end(), language
    return steps


def _console(block: str, line: int) -> list[Step]:
    """Lines that begin with ``$``, and what is below each; lines that end in a backslash are joined."""
    steps = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.replace("\\\n", "").partition("\n")
        steps.append(Step(" ".join(command.split()) if "'" not in command else command, output, line))
        line += part.count("\n")
    return steps


def lines_of(block: str) -> list[str]:
    """The commands of a block: a line each, but for those that a backslash or an open quote continues."""
    found: list[str] = []
    for line in block.splitlines():
        if found and (found[-1].endswith("\\") or found[-1].count("'") % 2):
            found[-1] += "\n" + line
        else:
            found.append(line)
    return [line for line in found if line.strip()]


def blocks_of(text: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return [inside for found, inside in BLOCK.findall(text) if found == language]


def shape(text: str) -> str:
    """Text with numbers, digests and spacing made equal."""
    text = re.sub(r"sha256:[0-9a-f]+", "sha256:…", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\d[\d.,]*", "#", text)).strip()


def agrees(said: str, printed: str) -> bool:
    """Whether what is printed is what a page says, ``…`` standing for anything.

    One refusal is as good as another: which words a patch trained on this processor chooses is not the point.
    """
    if is_refusal(said) and is_refusal(printed):
        return True
    wanted = ".*".join(re.escape(part) for part in re.split(r"\s*…\s*", shape(said)))
    return re.fullmatch(wanted, shape(printed), re.DOTALL) is not None


def in_place(step: Step, place: str) -> Step:
    """A step as the tutorial says to take it where there is no account: a folder in the place of a repository."""
    if place == REPO:
        return step
    output = step.output and step.output.replace(f"hf://{REPO}", f"…/{Path(place).name}")
    return replace(step, command=step.command.replace(REPO, place), output=output)
