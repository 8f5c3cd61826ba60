"""The entry point ``nest-runtime``: the list of commands, and what becomes of errors.

No command's machinery is imported here, torch least of all: ``--help`` answers at once. Commands
import what they need when they run.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nest_runtime import __version__
from nest_runtime.cli import remote
from nest_runtime.cli.commands import (
    bench,
    channel,
    chat,
    claim,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    hub,
    judge,
    patches,
    plan,
    plot,
    reference,
    retarget,
    scale,
    serve,
    store,
    train,
    trust,
)
from nest_runtime.cli.output import Interrupted, Settings, print_error, print_nest_error, print_usage_error
from nest_runtime.errors import NestError, UsageError
from nest_runtime.escape import visible
from nest_runtime.io import is_text

INTERRUPTED = 130
_GLOBAL_FLAGS = ("--debug", "--quiet")

app = typer.Typer(
    name="nest-runtime",
    help="Safety patches for language models: train them, switch them, serve them.",
    epilog="Start with:  nest-runtime chat  ·  nest-runtime serve --patch v3",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for family in (
    serve,
    chat,
    demo,
    train,
    retarget,
    scale,
    plan,
    evaluate,
    judge,
    compare,
    bench,
    patches,
    plot,
    doctor,
    export,
    store,
    remote,
    trust,
    claim,
    hub,
    channel,
):
    family.register(app)
app.add_typer(reference.app, name="reference", rich_help_panel="Look")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nest-runtime {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes and no progress bars on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    ctx.obj = Settings(debug=debug, quiet=quiet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status.

    0 done, 1 failed, 2 wrong usage, 3 refused for trust, 130 stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _calm_libraries(debug, "--quiet" in given)
    try:
        _check_text(given)
        status = _run(_flags_first(given) or ["--help"])
        sys.stdout.flush()
    except BrokenPipeError:
        return _close_stdout()
    except NestError as error:
        if debug:
            raise
        return print_nest_error(error)
    except (KeyboardInterrupt, Interrupted) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):
            return print_usage_error(error)
        if debug:
            raise
        detail = " ".join(str(error).split()) or "no message"
        print_error(
            f"{type(error).__name__}: {detail}",
            "run it again with --debug for the traceback, and report it if it stays",
        )
        return 1
    if status == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return status


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse words that are no text: bytes that are not UTF-8 come as lone surrogates, and no model can take them."""
    for number, word in enumerate(arguments, start=1):
        if not is_text(word):
            raise UsageError(
                f"argument {number} is not UTF-8: {word!a:.80}", "set the terminal to UTF-8, or rename the file"
            )


def _run(arguments: list[str]) -> int:
    command = _flags_without_type(typer.main.get_command(app))
    status = command.main(args=arguments, prog_name="nest-runtime", standalone_mode=False)
    return status if isinstance(status, int) else 0


def _flags_without_type(command: Any, parent: Any = None) -> Any:
    """The command, its help without the ``<bool>`` that typer writes beside flags: they take no value."""
    context = command.context_class(command, parent=parent, **command.context_settings)
    for option in (*command.params, command.get_help_option(context)):
        if getattr(option, "is_flag", False) and option.metavar is None:
            option.metavar = ""
    for inner in getattr(command, "commands", {}).values():
        _flags_without_type(inner, context)
    return command


def _flags_first(arguments: list[str]) -> list[str]:
    """The global flags moved before the command: they may stand anywhere on the line, up to ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [item for item in arguments[:end] if item in _GLOBAL_FLAGS]
    return flags + [item for item in arguments[:end] if item not in _GLOBAL_FLAGS] + arguments[end:]


def _calm_libraries(debug: bool, quiet: bool) -> None:
    """Keep stderr to our own words; ``--debug`` lets the libraries speak."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _show_warning
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line on stderr, without the source line that raised it."""
    print(f"warning: {visible(' '.join(str(message).split()))}", file=sys.stderr)


def _close_stdout() -> int:
    """The reader of our pipe has gone: end quietly, and keep Python from flushing into the closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    sys.exit(main())
