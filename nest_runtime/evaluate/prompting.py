"""Views of a tokenizer for texts that are no ordinary conversations: prefilled answers, ready-made prompts.

``generate_answers`` renders each conversation with the tokenizer it is given; these views change the
rendering and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nest_runtime.train.content import text_of


class PrefillView:
    """A tokenizer whose chat template leaves a last assistant message open, for the model to go on from."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **kwargs: Any) -> Any:
        """The conversation up to the last user turn, ready for the answer, then the answer's given beginning."""
        if messages[-1]["role"] != "assistant":
            return self._tokenizer.apply_chat_template(messages, **kwargs)
        return self._tokenizer.apply_chat_template(messages[:-1], **kwargs) + text_of(messages[-1]["content"])


class PlainView:
    """A tokenizer without a chat template: messages are taken as the text to go on from.

    Args:
        tokenizer: the tokenizer.
        special: add the tokenizer's own special tokens (a beginning-of-sequence token); off where the text has them.
    """

    chat_template = None

    def __init__(self, tokenizer: Any, special: bool = True) -> None:
        self._tokenizer, self._special = tokenizer, special

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return self._tokenizer(text, **{**kwargs, "add_special_tokens": self._special})
