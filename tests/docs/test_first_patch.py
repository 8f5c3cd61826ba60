"""docs/guide/first-patch.md: its commands parse and name the model, and no column of prompt files is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from nest_runtime.cli.main import app
from nest_runtime.prompts import examples as data
from nest_runtime.prompts import readers

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "first-patch.md"
TEXT = PAGE.read_text(encoding="utf-8")
NO_MODEL = ("scale", "add", "list")  # of commands on the page; they are not about a model


def commands() -> list[str]:
    """The shell commands of the page, by line."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_its_commands_exist_and_name_the_model() -> None:
    names = []
    for command in commands():
        words = shlex.split(command)
        if words[0] != "nest-runtime":
            continue
        names.append(words[1])
        inner = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
        context = inner.make_context(words[1], words[2:])
        assert words[1] in NO_MODEL or context.params["model"] == "$M", command
    assert names == ["plan", "train", "eval", "eval", "eval", "scale", "serve", "add", "list", "serve"]


def test_the_named_prompts_are_as_many_as_it_says() -> None:
    for name in ("everyday", "borderline", "imperatives", "pasted", "small-talk"):
        examples = data.load_examples(name)
        assert f"`{name}` has {len(examples)}" in TEXT or f"`{name}` {len(examples)}" in TEXT
        assert not any(example.response for example in examples)


def test_it_tells_of_every_column_and_form() -> None:
    columns = {*data.PROMPT_COLUMNS, *data.CATEGORY_COLUMNS, *data.ID_COLUMNS, *readers.SUFFIXES}
    columns |= {"messages", "response", "target", "contextstring", "input", "instances", "FILE#column=value"}
    assert not [name for name in sorted(columns) if f"`{name}`" not in TEXT]
    assert "hf://datasets/org/name[@revision][:split]" in TEXT
    assert all(f"`{role}`" in TEXT for role in data.ROLES)
