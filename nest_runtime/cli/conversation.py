"""A conversation with a loaded model: its turns, and the patches to switch between. The terminal is in terminal.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import UsageError
from nest_runtime.patch.patch import Patch

if TYPE_CHECKING:
    from nest_runtime.model.load import LoadedModel

BASE = "base"


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
        """Answer with ``patch`` from now on; None for the base. Raises BaseMismatch if it does not fit."""
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

        Raises:
            UsageError: the conversation is longer than what the model reads; it stays as it was.
        """
        turn = {"role": "user", "content": text}
        answer = self._generate([*self.messages, turn], on_text)
        self.messages += [turn, {"role": "assistant", "content": answer}]
        return answer

    def compare(self, text: str | None = None) -> tuple[str, str]:
        """The base's and the patch's answer to a question; the conversation stays as it is.

        Args:
            text: the question; the last one of the conversation by default.

        Raises:
            UsageError: there is no patch, or nothing was asked.
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
        from nest_runtime.prompts.chat import answer_chat

        return answer_chat(
            self.loaded.model,
            self.loaded.tokenizer,
            messages,
            max_tokens=self._max_tokens,
            on_text=on_text,
            too_long="ask something shorter, or write /clear to begin anew",
        ).text
