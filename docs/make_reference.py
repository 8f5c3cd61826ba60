"""Write what comes from the code: the reference pages of commands and settings, and the help that a test pins.

    python docs/make_reference.py

Run it after a command, an option or a setting has changed. tests/docs/test_reference.py fails until then.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from nest_runtime.cli.main import app, main
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.limits import Allowed, FollowConfig, Limits
from nest_runtime.settings import Setting, settings_of
from nest_runtime.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
WIDTH = 100  # columns of the help that is pinned, and of prose in the pages
MADE = "<!-- Made by docs/make_reference.py from the code; do not edit it here. -->"


def pages() -> dict[str, str]:
    """Every file, by its path from the repository's root."""
    return {
        "docs/reference/cli.md": commands_page(),
        "docs/reference/settings.md": settings_page(),
        "tests/cli/help.txt": all_help(),
    }


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its words, in the order of ``--help``; a group stands before its commands."""
    for name, inner in (group or typer.main.get_command(app)).commands.items():
        yield " ".join((*path, name)), inner
        if hasattr(inner, "commands"):
            yield from commands(inner, (*path, name))


def all_help() -> str:
    """What ``--help`` prints, of every command, without the right edge of its boxes."""
    return "\n".join(f"$ nest-runtime {name} --help".replace("  ", " ") + f"\n{help_of(name)}" for name in _all_names())


def _all_names() -> list[str]:
    return ["", *(name for name, _ in commands())]


def help_of(name: str) -> str:
    """What ``--help`` of one command prints."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}), contextlib.redirect_stdout(printed):
        main([*name.split(), "--help"])
    lines = [re.sub(r"[\s│]+$", "", line) for line in printed.getvalue().splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def commands_page() -> str:
    """The page of all commands, by the panel that ``--help`` shows them in."""
    parts = [
        "# Commands",
        MADE,
        prose(
            "Every command and its options. `nest-runtime COMMAND --help` prints the same. `--debug` and `--quiet` may "
            "stand anywhere on the line. Exit statuses: 0 done, 1 failed, 2 wrong usage, 3 refused for trust, 130 "
            "stopped by Ctrl-C."
        ),
    ]
    panel = ""
    for name, command in commands():
        own = command.rich_help_panel
        if " " not in name and isinstance(own, str) and own != panel:
            panel = own
            parts.append(f"## {panel}")
        parts += [f"### {name}", *described_command(name, command)]
    return "\n\n".join(parts) + "\n"


def described_command(name: str, command: Any) -> Iterator[str]:
    """The parts of one command: what it does, its arguments and options, examples."""
    for paragraph in plain(command.help or "").split("\n\n"):
        yield prose(" ".join(paragraph.split()))
    if hasattr(command, "commands"):
        return
    rows = [row_of(each, command) for each in command.params if not getattr(each, "hidden", False)]
    if rows:
        yield table(("Option", "Default", "Meaning"), rows)
    lines = (command.epilog or "").replace("\\\n\n", "\\\n").split("\n\n")[1:]
    if lines:
        yield "\n".join(["```bash", *(line.replace(r"\[", "[") for line in lines), "```"])


def row_of(option: Any, command: Any) -> tuple[str, str, str]:
    """One row: how it is written, its default, what it does."""
    words = plain(option.metavar or "")
    if option.param_type_name == "argument":
        names = f"`{words}`"
    else:
        names = " / ".join(f"`{word}`" for word in (*option.opts, *option.secondary_opts))
        names = f"{names} {cell(words)}".rstrip()
    if option.multiple or option.nargs == -1:
        names += " …"
    help = cell(plain(option.help or ""))
    limits = limits_of(option.min, option.max)
    if limits:
        help += f" {limits}."
    if option.envvar:
        help += f" Variable: `{option.envvar}`."
    return names, "required" if option.required else default_of(option), help


def default_of(option: Any) -> str:
    """The default as it is shown; nothing for what is off, or said in the help."""
    if option.secondary_opts and isinstance(option.default, bool):
        return f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    shown = option.default not in (None, False, "") and option.show_default
    return f"`{option.default}`" if shown and not callable(option.default) else ""


def limits_of(low: float | None, high: float | None) -> str:
    """A range in words."""
    if low is None or high is None:
        return "" if low is None else f"{low} or more"
    return f"{low} to {high}"


def settings_page() -> str:
    """The page of all settings of training and of a server."""
    parts = [
        "# Settings",
        MADE,
        prose(
            "What training and a server can be told, from Python or in a file, with the options of the commands for "
            "those that have one. [Commands](cli.md) has every option."
        ),
        "## Training",
        prose(
            "`nest_runtime.Recipe`. `train --recipe FILE.json` takes a JSON object of these; what it leaves out is as "
            "in the recipe `default` (`reference` for the built-in model). `inspect --json` shows a patch's recipe "
            "under `method`."
        ),
        *tables(Recipe, 3),
        "## Serving",
        prose("`nest_runtime.serve.ServeConfig`. Every option has a variable, as `NEST_SERVE_MAX_QUEUE=64`."),
        *tables(ServeConfig, 3),
        "### Limits",
        prose("`ServeConfig.limits`: what one server takes on."),
        *tables(Limits, 4),
        "### What clients may do",
        prose("`ServeConfig.allowed`: what weakens a patch's effect, and is off unless the operator asks for it."),
        *tables(Allowed, 4),
        "### Following a channel",
        prose("`ServeConfig.follow`, a `FollowConfig`."),
        *tables(FollowConfig, 4),
    ]
    return "\n\n".join(parts) + "\n"


def tables(owner: type, level: int) -> Iterator[str]:
    """A table of settings for each group, under its title."""
    groups: dict[str, list[Setting]] = {}
    for about in settings_of(owner).values():
        groups.setdefault(about.group, []).append(about)
    for title, members in groups.items():
        if title:
            yield f"{'#' * level} {title}"
        rows = [setting_row(about) for about in members]
        yield table(("Setting", "Default", "Allowed", "Option", "Meaning"), rows)


def setting_row(about: Setting) -> tuple[str, ...]:
    """One row of a table of settings."""
    default = "required" if about.is_required else "" if about.default in (None, "", ()) else f"`{about.default}`"
    flag = " / ".join(f"`{part}`" for part in about.flag.split("/") if part)
    told = about.told.replace("``", "`")
    return f"`{about.name}`", default, cell(about.allowed), flag, cell(told)


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Help without its markup."""
    return text.replace(r"\[", "[")


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", r"\|").replace("* ", r"\* ").replace("<", "&lt;")


def prose(text: str) -> str:
    """A paragraph that fits. Words with hyphens stay whole, and no line begins as a list does ("1.", "-")."""
    bound = re.sub(r" (?=(?:\d+\.|[-+*#])(?: |$))", "\0", text)
    return textwrap.fill(bound, WIDTH, break_on_hyphens=False, break_long_words=False).replace("\0", " ")


def write(made: Mapping[str, str]) -> None:
    """Write the files."""
    for path, text in made.items():
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(pages())
