"""The JSON bodies of answers, as OpenAI defines them: whole, or chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.requests.answers import Choice, Piece, Usage
from nest_runtime.serve.requests.odds import TokenOdds, for_completions


@dataclass(frozen=True)
class Wire:
    """Builds the bodies of one answer; every chunk of a stream has the same id, time and fingerprint.

    Attributes:
        chat: chat completions, or plain completions.
        model: the name that the client asked for.
        fingerprint: model hash and patch digest.
        usage_in_stream: whether the client asked for a usage chunk.
        odds: whether it asked for log probabilities.
    """

    chat: bool
    model: str
    fingerprint: str
    usage_in_stream: bool = False
    odds: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [self._choice(choice) for choice in choices], "usage": usage.body()}

    def opening(self, index: int) -> bytes:
        """A chat stream's first chunk of a choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, piece: Piece) -> bytes:
        """A chunk with text, or with the end of a choice, or both."""
        odds = self._odds(piece.odds)
        body: dict[str, Any] = {"index": piece.index, "logprobs": odds, "finish_reason": piece.finish_reason}
        if self.chat:
            body["delta"] = {"content": piece.text} if piece.text else {}
        else:
            body["text"] = piece.text
        return self._chunk([body])

    def error(self, error: ApiError) -> bytes:
        """What ends a stream that cannot continue."""
        return sse(error.body())

    def last(self, usage: Usage) -> bytes:
        """What ends a stream: the usage chunk, if asked for, and the mark."""
        done = b"data: [DONE]\n\n"
        return self._chunk([], usage.body()) + done if self.usage_in_stream else done

    def _choice(self, choice: Choice) -> dict[str, Any]:
        odds = self._odds(choice.odds)
        body: dict[str, Any] = {"index": choice.index, "logprobs": odds, "finish_reason": choice.finish_reason}
        if self.chat:
            body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            body["text"] = choice.text
        return body

    def _odds(self, entries: Sequence[TokenOdds]) -> dict[str, Any] | None:
        if not self.odds:
            return None
        if self.chat:
            return {"content": [entry.for_chat() for entry in entries], "refusal": None}
        return for_completions(entries)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": choices}
        if self.usage_in_stream:
            body["usage"] = usage
        return sse(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"})


def escaped(line: str) -> str:
    """JSON on one line, even for clients that treat Unicode's line separators as line ends."""
    return line.translate(_LINE_ENDS)


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    line = escaped(json.dumps(body, ensure_ascii=False, separators=(",", ":")))
    return b"data: " + line.encode() + b"\n\n"
