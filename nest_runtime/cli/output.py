"""What commands print: one JSON document or tables on stdout, notes, progress and errors on stderr.

Under ``--json`` everything that anyone else prints to stdout is sent to stderr, so that stdout holds
the document and nothing more. Errors are always two lines: ``error: …`` and ``hint: …``.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nest_runtime.cli import complete
from nest_runtime.errors import NestError
from nest_runtime.escape import clean, visible
from nest_runtime.hints import alike
from nest_runtime.progress import Bars

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=complete.models,
        help="reference, a folder, FILE.gguf, or org/name\\[@revision].",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", autocompletion=complete.devices, help="auto, cpu, cuda, cuda:1, mps.")
]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", metavar="NAME", autocompletion=complete.dtypes, help="auto, float32, bfloat16, float16."),
]


WIDEST = 10_000  # columns of a table in a pipe whose rows are not wrapped
ELSEWHERE = {"rm": "remove", "delete": "remove", "ls": "list", "show": "inspect", "download": "pull", "upload": "push"}
_NO_CHOICE = re.compile(r"'([^']*)' is not one of (.+)")


class Interrupted(Exception):
    """Ctrl-C, with one line to print about it."""


@dataclass
class Settings:
    """The options that stand before the command, or anywhere on the line."""

    debug: bool = False
    quiet: bool = False


class Output:
    """Where one command prints. Make it with :meth:`of`.

    Attributes:
        json: the user asked for JSON.
        quiet: no notes and no progress.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.json = as_json
        self.quiet = quiet
        self._stdout = sys.stdout

    @classmethod
    def of(cls, ctx: typer.Context, as_json: bool = False) -> Output:
        """The output of the command that ``ctx`` runs; under JSON, stdout is stderr for everyone else until it ends."""
        settings = ctx.find_object(Settings) or Settings()
        out = cls(as_json=as_json, quiet=settings.quiet)
        if as_json:
            sys.stdout = sys.stderr
            ctx.call_on_close(out._restore)
        return out

    def _restore(self) -> None:
        sys.stdout = self._stdout

    def result(self, document: Mapping[str, Any], render: Callable[[], None]) -> None:
        """Print the result: ``document`` under ``--json``, else what ``render`` prints."""
        if self.json:
            self.event(document, indent=2)
        else:
            render()

    def event(self, value: Mapping[str, Any], indent: int | None = None) -> None:
        """Print one JSON value on the real stdout, at once."""
        print(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False), file=self._stdout, flush=True)

    def line(self, text: str = "") -> None:
        """Print a line for people on stdout: no wrapping, no markup, no control characters."""
        print(clean(text))

    def note(self, text: str) -> None:
        """Print a remark on stderr, unless quiet."""
        if not self.quiet:
            stderr_console().print(clean(text), style="dim", markup=False, highlight=False, soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        right: Sequence[str] = (),
        whole: Sequence[str] = (),
        styles: Mapping[str, str] | None = None,
        whole_in_pipe: bool = False,
    ) -> None:
        """Print a table that fits the terminal, or 80 columns in a pipe.

        Args:
            columns: their titles.
            rows: their cells; numbers and nothing are written for people.
            right: titles of the columns that align right.
            whole: titles of the columns that are not wrapped.
            styles: color of the cells that hold just this text.
            whole_in_pipe: print a line a row in a pipe, however long, for what people look for or copy; COLUMNS bounds
                it.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        console = stdout_console()
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, show_edge=False)
        for column in columns:
            justify: Literal["left", "right"] = "right" if column in right else "left"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=column in whole)
        for row in rows:
            cells = [visible(_cell(value)) for value in row]
            table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in cells))
        if console.is_terminal:
            console.print(table)
            return
        if whole_in_pipe and not os.environ.get("COLUMNS"):
            console.width = WIDEST
        with console.capture() as captured:  # in a pipe: no padding behind the last column
            console.print(table)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def pairs(self, rows: Mapping[str, object]) -> None:
        """Print ``name  value`` lines, aligned; values are not wrapped, so that they can be copied."""
        width = max(len(name) for name in rows)
        for name, value in rows.items():
            self.line(f"{name:<{width}}  {visible(_cell(value))}")

    def bars(self) -> Bars:
        """A progress callback that draws on stderr; a context manager."""
        return Bars(quiet=self.quiet)


def stdout_console() -> Console:
    """A console on the present stdout."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def stderr_console() -> Console:
    """A console on the present stderr."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def print_error(message: str, hint: str) -> None:
    """The two lines of an error, on stderr."""
    console = stderr_console()
    hint = hint or "run the command with --help to see what it takes"
    for label, style, text in (("error:", "bold red", message), ("hint:", "bold cyan", hint)):
        console.print(f"[{style}]{label}[/]", end=" ")
        console.print(clean(" ".join(text.split())), markup=False, highlight=False, soft_wrap=True)


def print_nest_error(error: NestError) -> int:
    """Print one of our own errors; returns the exit status."""
    print_error(error.message, error.hint)
    return error.exit_status


def print_usage_error(error: Any) -> int:
    """Print an error of the command-line parser; returns the exit status.

    Args:
        error: an exception with ``format_message`` and ``exit_code``: typer's, whichever click it is built on.
    """
    message = str(error.format_message()).strip()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "nest-runtime"
    hint = f"see `{command} --help`"
    if (variable := _variable_of(context, getattr(error, "param", None))) is not None:
        hint = f"it comes from the environment, where {variable} is set; {hint}"
    message, _, suggestion = message.partition("Did you mean ")
    names = sorted(getattr(error, "possibilities", None) or []) or _choice_meant(message) or _command_meant(message)
    if suggestion:
        hint = f"did you mean {suggestion.strip()} {hint}"
    elif names:
        message = message.partition("(Possible options")[0]
        hint = f"did you mean {' or '.join(names)}? {hint}"
    message = message.replace("Value error, ", "").strip().rstrip(".") + _found(error.__cause__, message)
    print_error(message[:1].lower() + message[1:], hint)
    return int(getattr(error, "exit_code", 2))


def _found(cause: BaseException | None, message: str) -> str:
    """What stood in the place of an option's value, where the parser's message does not say it."""
    from pydantic import ValidationError  # typer's own parser of values

    if not isinstance(cause, ValidationError):
        return ""
    found = repr(cause.errors(include_url=False)[0]["input"])
    return "" if found in message else f"; found {found:.60}"


def _variable_of(context: Any, option: Any) -> str | None:
    """The environment variable that gave an option its value, or None."""
    if context is None or option is None:
        return None
    source = context.get_parameter_source(option.name)
    if getattr(source, "name", "") != "ENVIRONMENT":
        return None
    return option.envvar or f"{context.auto_envvar_prefix}_{option.name.upper()}"


def _choice_meant(message: str) -> list[str]:
    """The choice that the parser's ``'pfet' is not one of 'peft', 'vllm'`` was meant to be, or nothing."""
    found = _NO_CHOICE.search(message)
    return alike(found[1], re.findall(r"'([^']*)'", found[2]), limit=1) if found else []


def _command_meant(message: str) -> list[str]:
    """The command behind a name that other tools have for it, or nothing."""
    found = re.match(r"No such command '([^']*)'", message)
    return [ELSEWHERE[found[1]]] if found and found[1] in ELSEWHERE else []


def size(count: int) -> str:
    """A number of bytes for people: 512 B, 9.6 kB, 1.2 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def percent(value: float | None) -> str:
    """A share as ``12.3 %``; ``-`` if there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
