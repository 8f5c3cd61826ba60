"""The terminal chat: lines in, streamed answers out, commands with a slash, Tab and the lines of earlier chats.

Answers go to stdout, everything else to stderr, so that a chat can be piped. What answers is conversation.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nest_runtime.cli.conversation import BASE, Conversation
from nest_runtime.cli.output import Output, print_nest_error
from nest_runtime.errors import NestError, UsageError
from nest_runtime.escape import clean

HISTORY_LINES = 1000
COMMANDS = ("/patch", "/base", "/compare", "/history", "/clear", "/help", "/quit")
LEAVE = (
    "/quit",
    "/exit",
    "exit",
    "quit",
)  # the last two from people, who type them everywhere; in a file they are text
HELP = """\
/patch v2      answer with another patch from here on (v2, name@v2, a file, hf://…)
/patch         list the patches for this model
/base          answer without a patch
/compare       the last question again, answered by the base and by the patch
/compare TEXT  a question of its own, answered by both; the conversation stays
/history       what was said so far, and by whom
/clear         forget the conversation
/help          this list
/quit          leave (or Ctrl-D); Ctrl-C stops an answer"""


def run_loop(talk: Conversation, out: Output) -> None:
    """Read lines until /quit or the end of input. Raises KeyboardInterrupt for Ctrl-C at an empty prompt, twice."""
    terminal = sys.stdin.isatty()
    if terminal:
        out.note(f"{talk.loaded.name}, {talk.label}. /help lists the commands, /quit leaves.")
    who: list[str] = []  # what gave each answer of the conversation
    stopped = False
    with _line_editing(terminal, talk):
        while True:
            try:
                line = _read(talk.label if terminal else None)
                if line is None or line.strip() in LEAVE[: None if terminal else 2]:
                    return
                stopped = False
                _one_turn(talk, out, line.strip(), terminal, who)
            except NestError as error:
                print_nest_error(error)
            except KeyboardInterrupt:
                if not terminal or stopped:
                    raise
                stopped = True
                print()
                out.note("(stopped; /quit or Ctrl-D leaves, and so does Ctrl-C now)")


def _one_turn(talk: Conversation, out: Output, line: str, terminal: bool, who: list[str]) -> None:
    if not line:
        return
    if line.startswith("/"):
        _command(talk, out, line, who)
        return
    if terminal:
        answer = talk.ask(line, lambda text: print(clean(text), end="", flush=True))
        print()
    else:
        answer = talk.ask(line)
        out.line(answer)
    who.append(talk.label)
    if not answer:
        out.note("(an empty answer)")


def _command(talk: Conversation, out: Output, line: str, who: list[str]) -> None:
    """Run a line that begins with a slash."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        out.note(HELP)
    elif name == "/base":
        talk.use(None)
        out.note("the bare base answers")
    elif name == "/clear":
        talk.clear()
        who.clear()
        out.note("the conversation is forgotten")
    elif name == "/history":
        _show_history(talk, out, who)
    elif name == "/compare":
        _compare(talk, out, rest)
    elif name == "/patch" and rest:
        from nest_runtime.resolve import load_patch

        talk.use(load_patch(rest, model_hash=talk.loaded.hash))
        out.note(f"{talk.label} ({(talk.digest or '')[:19]}) answers")
    elif name == "/patch":
        _list_patches(talk, out)
    else:
        from nest_runtime.hints import did_you_mean

        raise UsageError(f"there is no command {name}", f"{did_you_mean(name, COMMANDS)}/help lists them all")


def _compare(talk: Conversation, out: Output, text: str) -> None:
    """Both answers, one under the other."""
    base, patched = talk.compare(text or None)
    names = [f"{BASE}>", f"{talk.label}>"]
    width = max(map(len, names))
    for name, answer in zip(names, (base, patched), strict=True):
        out.line(f"{name:<{width}} {answer}")
    if base == patched:
        out.note("(the same answer)")


def _list_patches(talk: Conversation, out: Output) -> None:
    """The patches of this model, the one that answers marked."""
    from nest_runtime.store.store import Store

    entries = Store().list(talk.loaded.hash)
    lines = [f"{'*' if entry.digest == talk.digest else ' '} {entry.key}" for entry in entries]
    if talk.patch is not None and talk.digest not in {entry.digest for entry in entries}:
        lines.append(f"* {talk.patch.label} (not in the store)")
    out.note("\n".join(lines) or "no patches for this model")


def _show_history(talk: Conversation, out: Output, who: Sequence[str]) -> None:
    """What was said. Raises UsageError if nothing was."""
    if not talk.messages:
        raise UsageError("nothing was said yet", "ask something first")
    answers = iter(who)
    for message in talk.messages:
        speaker = "you" if message["role"] == "user" else next(answers, "")
        out.line(f"{speaker}> {message['content']}")


def _read(label: str | None) -> str | None:
    """The next line, or None at the end of input."""
    try:
        return input(f"{label}> " if label else "")
    except EOFError:
        if label:
            print()
        return None


@contextlib.contextmanager
def _line_editing(terminal: bool, talk: Conversation) -> Iterator[None]:
    """Line editing with Tab and the lines of earlier chats ($NEST_HOME/chat_history). Only in a terminal."""
    if not terminal:
        yield
        return
    try:
        import readline
    except ImportError:  # Windows has none: lines still work, the arrow keys do not
        yield
        return
    from nest_runtime.io import nest_home

    path = nest_home() / "chat_history"
    _complete_with(readline, talk)
    with contextlib.suppress(OSError):  # no history yet, or none that can be read: start with an empty one
        readline.read_history_file(path)
    try:
        yield
    finally:
        _save_history(readline, path)


def _save_history(readline: Any, path: Path) -> None:
    """Write the lines, readable by their owner alone from the first byte on."""
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # a read-only home costs the history, not the chat
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        readline.write_history_file(path)
        path.chmod(0o600)


def _complete_with(readline: Any, talk: Conversation) -> None:
    """Tab completes commands, and patches after /patch."""

    def complete(text: str, state: int) -> str | None:
        found = candidates(readline.get_line_buffer(), text, _patch_names(talk))
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


def candidates(line: str, word: str, patches: Sequence[str]) -> list[str]:
    """What Tab offers for the ``word`` at the end of ``line``."""
    if line.startswith("/patch "):
        return [name for name in patches if name.startswith(word)]
    if line == word and word.startswith("/"):
        return [f"{name} " if name in ("/patch", "/compare") else name for name in COMMANDS if name.startswith(word)]
    return []


def _patch_names(talk: Conversation) -> list[str]:
    from nest_runtime.store.store import Store

    try:
        entries = Store().list(talk.loaded.hash)
    except NestError:  # Tab is no place for an error; /patch says it
        return []
    return [entry.version for entry in entries] + [entry.key for entry in entries]
