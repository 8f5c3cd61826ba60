"""What a message holds: a text, or a list of parts, of which some are images.

Parts are ``{"type": "text", "text": …}`` and ``{"type": "image", "path": …, "sha256": …}``. Nothing here opens
images (images.py does) or imports torch, since evaluation's values use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(content: Any) -> str:
    """The text of a message's content, without its images."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The image parts of a conversation, in order."""
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return [part for part in parts if part["type"] == "image"]


def plain_content(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as JSON values for digests: texts as they are, images by their bytes."""
    return [{**message, "content": _without_paths(message["content"])} for message in messages]


def _without_paths(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if key != "path"} for part in content]
