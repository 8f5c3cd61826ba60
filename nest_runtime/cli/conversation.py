"""A conversation with a loaded model: turns, patches to switch between, and the loop of the terminal chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nest_runtime.cli.output import Output, clean, print_nest_error
from nest_runtime.errors import NestError, UsageError
from nest_runtime.patch import Patch

if TYPE_CHECKING:
    from nest_runtime.models import LoadedModel

BASE = "base"
HISTORY_LINES = 1000
HELP = """\
/patch v2    answer with another patch from here on (v2, name@v2, a file, hf://…)
/patch       list the patches for this model
/base        answer without a patch
/compare     the last question again, answered by the base and by the patch
/compare TEXT  a question of its own, answered by both; the conversation stays as it is
/clear       forget the conversation
/quit        leave (or Ctrl-D)"""


class Conversation:
    """One conversation: its messages, and the runtime that switches patches on its model.

    Args:
        loaded: the model and its tokenizer.
        max_tokens: the longest answer, in tokens.
    """

    def __init__(self, loaded: LoadedModel, *, max_tokens: int = 256) -> None:
        from nest_runtime.runtime import PatchRuntime

        self.loaded = loaded
        self.messages: list[dict[str, str]] = []
        self._max_tokens = max_tokens
        self._runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
        self._keys: dict[str, str] = {}  # patch digest → key in the runtime

    @property
    def patch(self) -> Patch | None:
        """The patch that answers now, or None for the base."""
        return self._runtime.active_patch

    @property
    def label(self) -> str:
        """The version that answers now, or ``base``."""
        return self.patch.version if self.patch else BASE

    @property
    def digest(self) -> str | None:
        """The digest of the patch that answers now."""
        return self.patch.digest if self.patch else None

    def use(self, patch: Patch | None) -> None:
        """Answer with ``patch`` from now on; None for the base. Raises BaseMismatch where it does not fit."""
        if patch is None:
            self._runtime.deactivate()
            return
        if patch.digest not in self._keys:
            self._keys[patch.digest] = self._runtime.add(patch)
        self._runtime.activate(self._keys[patch.digest])

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """Say something and get the answer; both join the conversation.

        Args:
            text: the user's turn.
            on_text: called with pieces of the answer as they come.
        """
        turn = {"role": "user", "content": text}
        answer = self._generate([*self.messages, turn], on_text)
        self.messages += [turn, {"role": "assistant", "content": answer}]
        return answer

    def compare(self, text: str | None = None) -> tuple[str, str]:
        """The base's and the patch's answer to a question; the conversation stays as it is.

        Args:
            text: the question; the last one of the conversation by default.

        Raises UsageError where there is no patch, or nothing was asked.
        """
        if self.patch is None:
            raise UsageError("no patch is on, so there is nothing to compare", "choose one with /patch v3")
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if text is None and not asked:
            raise UsageError("nothing was asked yet", "ask first, or write /compare and the question")
        turns = (
            [*self.messages, {"role": "user", "content": text}] if text is not None else self.messages[: asked[-1] + 1]
        )
        with self._runtime.using(None):
            base = self._generate(turns)
        return base, self._generate(turns)

    def clear(self) -> None:
        """Forget the conversation; the patch stays."""
        self.messages = []

    def _generate(self, messages: list[dict[str, Any]], on_text: Callable[[str], None] | None = None) -> str:
        import torch
        from transformers import GenerationConfig, TextStreamer

        from nest_runtime.generate import end_token_ids, pad_token_id
        from nest_runtime.train.data import encode

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = torch.tensor([encode(tokenizer, messages)], device=self.loaded.device)  # (1, tokens)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._max_tokens,
            eos_token_id=end_token_ids(model, tokenizer) or None,
            pad_token_id=pad_token_id(tokenizer),
        )

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if on_text is not None and text:
                    on_text(text)

        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
            )
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def run_loop(talk: Conversation, out: Output) -> None:
    """Read lines until /quit or the end of input; answers to stdout, everything else to stderr."""
    terminal = sys.stdin.isatty()
    if terminal:
        out.note(f"{talk.loaded.name}, {talk.label}. /help lists the commands, /quit leaves.")
    with _line_history(terminal):
        while (line := _read(talk.label if terminal else None)) is not None:
            if not line.strip():
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                _one_turn(talk, out, line.strip(), terminal)
            except NestError as error:
                print_nest_error(error)
            except KeyboardInterrupt:
                if not terminal:
                    raise
                out.note("(stopped)")


def _one_turn(talk: Conversation, out: Output, line: str, terminal: bool) -> None:
    if line.startswith("/"):
        _command(talk, out, line)
    elif terminal:
        talk.ask(line, lambda text: print(clean(text), end="", flush=True))
        print()
    else:
        out.line(talk.ask(line))


def _command(talk: Conversation, out: Output, line: str) -> None:
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
        out.note("the conversation is forgotten")
    elif name == "/compare":
        base, patched = talk.compare(rest or None)
        out.line(f"{BASE}> {base}")
        out.line(f"{talk.label}> {patched}")
    elif name == "/patch" and rest:
        from nest_runtime.resolve import load_patch

        talk.use(load_patch(rest, model_hash=talk.loaded.hash))
        out.note(f"{talk.label} ({(talk.digest or '')[:19]}) answers")
    elif name == "/patch":
        from nest_runtime.registry.store import Store

        known = Store().list(talk.loaded.hash)
        out.note("\n".join(entry.key for entry in known) or "no patches for this model")
    else:
        from nest_runtime.names import closest

        near = closest(name, ("/patch", "/base", "/compare", "/clear", "/help", "/quit"), limit=1)
        raise UsageError(f"there is no command {name}", f"did you mean {near[0]}? /help lists them all")


def _read(label: str | None) -> str | None:
    """The next line, or None at the end of input."""
    try:
        return input(f"{label}> " if label else "")
    except EOFError:
        if label:
            print()
        return None


@contextlib.contextmanager
def _line_history(terminal: bool) -> Iterator[None]:
    """Line editing, with the lines of earlier chats; kept in $NEST_HOME/chat_history. Only in a terminal."""
    if not terminal:
        yield
        return
    try:
        import readline
    except ImportError:  # Windows has none: lines still work, the arrow keys do not
        yield
        return
    from nest_runtime.home import nest_home

    path = nest_home() / "chat_history"
    with contextlib.suppress(OSError):  # no history yet, or none that can be read: start with an empty one
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):  # a read-only home costs the history, not the chat
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
