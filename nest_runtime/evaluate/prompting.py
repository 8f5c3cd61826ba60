"""Views of a tokenizer for texts that are no ordinary conversations: prefilled answers, forms.

``generate_answers`` renders each conversation with the tokenizer it is given; these views change the
rendering and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nest_runtime.prompts.content import text_of


class PrefillView:
    """A tokenizer whose chat template leaves a last assistant message open, for the model to continue from."""

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


class FormView:
    """A tokenizer whose chat template is a form with slots, for models that are asked in a form and not in turns.

    The form's control tokens are tokens; what fills the slots is text, whatever it spells.

    Args:
        tokenizer: the tokenizer; its own special tokens (a beginning of sequence) come around the form.
        forms: forms by name.
        slot: matches a slot, with its name as the first group.
    """

    adds_special = True

    def __init__(self, tokenizer: Any, forms: Mapping[str, str], slot: re.Pattern[str]) -> None:
        self._tokenizer, self._forms, self._slot = tokenizer, dict(forms), slot
        self.chat_template = "\n".join(forms.values())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        """The form that the last message names as its ``type``, with the message's fields in the slots."""
        fields = messages[-1]
        return self._slot.sub(lambda match: str(fields[match[1]]), self._forms[fields["type"]])
