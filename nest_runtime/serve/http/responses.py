"""``/v1/responses``: the same answers as chat completions, in the shape of OpenAI's newer API."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.http.responses_schemas import ResponsesRequest
from nest_runtime.serve.http.wire import escaped
from nest_runtime.serve.requests.answers import Choice, Piece, Usage


@dataclass
class ResponsesWire:
    """Builds the body of one response, or its events; one answer, which is text.

    Attributes:
        body: what the client asked.
        fingerprint: model hash and patch digest.
    """

    chat = True  # an opening comes before the text

    body: ResponsesRequest
    fingerprint: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _text: str = field(default="", init=False)
    _odds: list[dict[str, Any]] = field(default_factory=list, init=False)
    _reason: str | None = field(default=None, init=False)
    _number: int = field(default=0, init=False)

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        (choice,) = choices
        self._text, self._reason = choice.text, choice.finish_reason
        self._odds = [entry.for_chat() for entry in choice.odds]
        return self._response(self._status, [self._message(self._status)], usage)

    def opening(self, index: int) -> bytes:
        """The events before the first text."""
        begun = self._response("in_progress", [], None)
        item = {**self._message("in_progress"), "content": []}
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._event("response.content_part.added", **self._place, part=self._part("", []))
        )

    def piece(self, piece: Piece) -> bytes:
        """The event of some text."""
        odds = [entry.for_chat() for entry in piece.odds]
        self._text += piece.text
        self._odds += odds
        self._reason = piece.finish_reason or self._reason
        if not piece.text:
            return b""
        return self._event("response.output_text.delta", **self._place, delta=piece.text, logprobs=odds)

    def last(self, usage: Usage) -> bytes:
        """The events after the last text."""
        message = self._message(self._status)
        response = self._response(self._status, [message], usage)
        return (
            self._event("response.output_text.done", **self._place, text=self._text, logprobs=self._odds)
            + self._event("response.content_part.done", **self._place, part=message["content"][0])
            + self._event("response.output_item.done", output_index=0, item=message)
            + self._event(f"response.{self._status}", response=response)
        )

    def error(self, error: ApiError) -> bytes:
        """The event of a response that cannot continue."""
        said = error.body()["error"]
        return self._event("error", code=said["code"], message=said["message"], param=said["param"])

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _part(self, text: str, odds: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": odds}

    def _message(self, status: str) -> dict[str, Any]:
        part = self._part(self._text, self._odds)
        return {"type": "message", "id": f"msg_{self.id}", "status": status, "role": "assistant", "content": [part]}

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        body = self.body
        counted = None
        if usage is not None:
            counted = {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            }
        text = {"type": "text"} if body.text is None or body.text.format is None else body.text.format.model_dump()
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "system_fingerprint": self.fingerprint,
            "temperature": body.temperature,
            "text": {"format": text},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": counted,
            "user": body.user,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        line = escaped(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        return f"event: {kind}\ndata: {line}\n\n".encode()
