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

        Raises UsageError if the conversation is longer than what the model reads; it stays as it was.
        """
        turn = {"role": "user", "content": text}
        answer = self._generate([*self.messages, turn], on_text)
        self.messages += [turn, {"role": "assistant", "content": answer}]
        return answer

    def compare(self, text: str | None = None) -> tuple[str, str]:
        """The base's and the patch's answer to a question; the conversation stays as it is.

        Args:
            text: the question; the last one of the conversation by default.

        Raises UsageError if there is no patch, or nothing was asked.
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

        from nest_runtime.prompts.examples import encode
        from nest_runtime.prompts.generate import end_token_ids, pad_token_id

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = torch.tensor([encode(tokenizer, messages)], device=self.loaded.device)  # (1, tokens)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._room(ids.shape[1]),
            eos_token_id=end_token_ids(model, tokenizer) or None,
            pad_token_id=pad_token_id(model, tokenizer),
        )

        class TerminalStreamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if on_text is not None and text:
                    on_text(text)

        streamer = TerminalStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
            )
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _room(self, tokens: int) -> int:
        """How many tokens the answer may have. Raises UsageError if ``tokens`` leave no room for one."""
        limit = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int):
            return self._max_tokens
        if tokens >= limit:
            raise UsageError(
                f"the conversation has {tokens:,} tokens; the model reads at most {limit:,} with its answer",
                "ask something shorter, or write /clear to begin anew",
            )
        return min(self._max_tokens, limit - tokens)
