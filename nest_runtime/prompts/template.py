"""A model's chat template: what it makes of a conversation, and of one whose contents are lists of parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.prompts.content import text_of

Messages = Sequence[Mapping[str, Any]]


def templated(tokenizer: Any, messages: Messages, given: Mapping[str, Any]) -> str:
    """What the template makes of a conversation.

    Templates of some multimodal models know content only as a list of parts, and lose a plain text silently. If the
    last message's text is not in the result, but is when contents are parts, the latter is used.

    Args:
        tokenizer: has a chat template.
        messages: the conversation.
        given: the template's further variables.

    Raises:
        DataError: the template refuses the conversation (for example a system message).
    """
    try:
        text = _apply(tokenizer, messages, given)
    except Exception as error:  # templates raise jinja errors of their own making
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"the model's chat template refuses a conversation with roles {roles}: {error}",
            "leave out the messages that this model's template does not know",
        ) from error
    wanted = text_of(messages[-1]["content"]).strip()
    return text if _holds(text, wanted) else _of_parts(tokenizer, messages, given, wanted) or text


def _of_parts(tokenizer: Any, messages: Messages, given: Mapping[str, Any], wanted: str) -> str | None:
    """The text where every content is a list of parts, or None if that does not hold what is wanted."""
    parts = [{**message, "content": _as_parts(message["content"])} for message in messages]
    try:
        text = _apply(tokenizer, parts, given)
    except Exception:  # the template knows no parts
        return None
    printed = any(_prints(text, part) for message in parts for part in message["content"])
    return text if _holds(text, wanted) and not printed else None


def _prints(text: str, part: Any) -> bool:
    """Whether a text shows a part itself, as Python or as JSON, and not just what it says."""
    return any(form in text for form in (repr(part), json.dumps(part), json.dumps(part, ensure_ascii=False)))


def _holds(text: str, wanted: str) -> bool:
    """Whether a text holds another, as it is or as JSON."""
    return any(
        form in text for form in (wanted, json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1])
    )


def _apply(tokenizer: Any, messages: Messages, given: Mapping[str, Any]) -> str:
    plain = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, **given))


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
