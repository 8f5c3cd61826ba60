"""What clients may send to ``/v1/responses``, and the chat request that it means.

Answers are text and are not kept: what asks for an earlier response, for tools of OpenAI's own, or for work in the
background is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from nest_runtime.serve.http.formats import Strict
from nest_runtime.serve.http.schemas import FIRST, MAX_MESSAGES, MAX_TOP, ChatRequest

_TEXTS = ("input_text", "output_text", "text", "refusal")


class Part(BaseModel):
    """A piece of an item's content; only text is understood."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None
    refusal: str | None = None

    @field_validator("type", mode="after")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value not in _TEXTS:
            raise PydanticCustomError("unsupported_value", "only text is understood")
        return value


class Item(BaseModel):
    """One item of the input: a message, or a call of a tool, or what came of it."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, validate_default=True)
    content: str | Annotated[list[Part], FIRST] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[Part], FIRST] | None = None

    @field_validator("role", mode="after")
    @classmethod
    def _has_role(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("type") == "message":
            raise PydanticCustomError("invalid_value", "expected the role of a message")
        return value

    def for_chat(self) -> dict[str, Any] | None:
        """The same as a message of a chat; None for what no message is made of."""
        if self.type == "message":
            return {"role": self.role, "content": _text(self.content)}
        if self.type == "function_call":
            call = {"name": self.name or "", "arguments": self.arguments or ""}
            return {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": self.call_id, "type": "function", "function": call}],
            }
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)}
        return None


class Format(BaseModel):
    """``text.format``: as ``response_format``, with the schema's fields in it."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str

    def for_chat(self) -> dict[str, Any]:
        """The same as a ``response_format``."""
        more = self.model_extra or {}
        return {"type": self.type, "json_schema": more} if self.type == "json_schema" else {"type": self.type, **more}


class Text(Strict):
    """How the text is to be."""

    format: Format | None = None
    verbosity: str | None = None


class Reasoning(Strict):
    """How much the model is to think, for templates that know of it."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Strict):
    """``POST /v1/responses``."""

    model: str = Field(min_length=1, max_length=512)
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    truncation: str | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    max_tool_calls: int | None = Field(None, description="Changes no answer: tools are called by the client.")
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @field_validator("background", "previous_response_id", "conversation", "prompt", mode="after")
    @classmethod
    def _nothing_is_kept(cls, value: Any, info: ValidationInfo) -> Any:
        if value:
            raise PydanticCustomError(
                "unsupported_parameter",
                "{name} is not supported: nothing is kept between requests",
                {"name": str(info.field_name)},
            )
        return value

    @field_validator("truncation", mode="after")
    @classmethod
    def _whole(cls, value: str | None) -> str | None:
        if value not in (None, "disabled"):
            raise PydanticCustomError("unsupported_parameter", "truncation is not supported: nothing is left out")
        return value

    @field_validator("include", mode="after")
    @classmethod
    def _includes(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in ("message.output_text.logprobs", "reasoning.encrypted_content"):
                raise PydanticCustomError("unsupported_value", "only message.output_text.logprobs is")
        return value

    @field_validator("tools", mode="after")
    @classmethod
    def _functions(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in value or ():
            if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
                raise PydanticCustomError("unsupported_value", "only tools of the type function, with a name, are")
        return value

    @property
    def logprobs(self) -> bool:
        """Whether log probabilities are asked for."""
        return "message.output_text.logprobs" in (self.include or ())

    def for_chat(self) -> ChatRequest:
        """The chat request that it means. Raises RequestValidationError if a field of that one cannot be so."""
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [message for item in items if (message := item.for_chat()) is not None]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        format_ = self.text.format if self.text is not None else None
        fields = {
            "model": self.model,
            "messages": _joined(messages),
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "logprobs": self.logprobs or None,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
            "tools": [_nested(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self.tool_choice,
            "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
            "response_format": None if format_ is None else format_.for_chat(),
            "chat_template_kwargs": self.chat_template_kwargs,
            "verbosity": self.text.verbosity if self.text is not None else None,
        }
        try:
            return ChatRequest.model_validate(fields)
        except ValidationError as error:
            raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages, calls of tools that follow each other as one turn: templates know it so."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if found and message.get("tool_calls") and found[-1]["role"] == "assistant":
            found[-1] = {**found[-1], "tool_calls": [*found[-1].get("tool_calls", ()), *message["tool_calls"]]}
        else:
            found.append(message)
    return found


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as chat completions name it."""
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _text(content: str | list[Part] | None) -> str | None:
    if isinstance(content, list):
        return "".join(part.text or part.refusal or "" for part in content)
    return content
