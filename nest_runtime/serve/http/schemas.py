"""What clients may send, field by field, as pydantic models.

A field that is not known here is refused: a typo must not pass for a setting. A field that OpenAI
knows and this server cannot do is refused by name, unless it asks for what happens anyway.
Lists are read up to their first fault: a client's error costs no more than its request would.
``logit_bias`` is refused on purpose: with it a client could ban the words that a refusal is made of.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from nest_runtime.serve.http.formats import ResponseFormat, Strict, no_setting
from nest_runtime.serve.served_patch import SwapPolicy

MAX_STOPS = 16
MAX_MESSAGES = 2048
MAX_TOP = 20  # of the likeliest tokens
SEED = 2**63
FIRST = Field(fail_fast=True)

Stop = Annotated[str, Field(min_length=1, max_length=512)]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextPart(Strict):
    """A piece of a message's content; only text is understood. What says how to cache it changes no answer."""

    type: Literal["text", "refusal"]
    text: str | None = Field(None, validate_default=True)
    refusal: str | None = Field(None, validate_default=True)
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @field_validator("text", "refusal", mode="after")
    @classmethod
    def _is_its_type(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("type") == info.field_name):
            raise PydanticCustomError("invalid_value", "expected a text in the field that the part's type names")
        return value

    @property
    def said(self) -> str:
        """The text."""
        return self.text or self.refusal or ""


class FunctionCall(BaseModel):
    """What an earlier answer called; clients send the arguments as JSON in a string, which prompts.py reads."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: Any = None


class ToolCall(BaseModel):
    """One call of a tool."""

    model_config = ConfigDict(extra="allow", strict=True)

    function: FunctionCall


class Message(BaseModel):
    """One turn. Further fields (``tool_call_id``, ``name``) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Role
    content: str | Annotated[list[TextPart], FIRST] | None = Field(None, validate_default=True)
    tool_calls: Annotated[list[ToolCall], FIRST] | None = None
    function_call: FunctionCall | None = None

    @field_validator("content", mode="after")
    @classmethod
    def _has_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") != "assistant":
            raise PydanticCustomError("invalid_value", "expected text, or a list of text parts")
        return value

    def for_template(self) -> dict[str, Any]:
        """The dict that chat templates expect: content as one string, roles and calls by their present names."""
        fields = {name: value for name, value in self.model_dump().items() if value is not None}
        if isinstance(self.content, list):
            fields["content"] = "".join(part.said for part in self.content)
        fields.setdefault("content", "")
        fields["role"] = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        called = fields.pop("function_call", None)
        calls = fields.pop("tool_calls", None) or ([{"type": "function", "function": called}] if called else [])
        return {**fields, "tool_calls": calls} if calls else fields


class Sampling(Strict):
    """Fields that both endpoints share."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31, description="Not OpenAI's: keep the k likeliest tokens.")
    n: int | None = Field(1, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-SEED, lt=SEED)
    presence_penalty: float | None = Field(0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        None, gt=0, le=2, description="Not OpenAI's: above 1, tokens that the answer already has get less likely."
    )
    logit_bias: dict[str, float] | None = Field(None, description="Refused unless empty.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _no_bias(cls, value: dict[str, float] | None) -> None:
        if value:
            raise _unsupported("logit_bias", "it could ban the words that a refusal is made of")

    @field_validator("stream_options", mode="after")
    @classmethod
    def _needs_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("invalid_value", "only allowed when stream is true")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def odds(self) -> int | None:
        """How many of the likeliest tokens to tell at each place; None for no log probabilities at all."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Annotated[list[dict[str, Any]], FIRST] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Not OpenAI's: settings of the model's chat template, such as enable_thinking."
    )
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Given to the chat template; most have no use for it."
    )
    modalities: list[str] | None = None
    verbosity: str | None = None
    functions: list[dict[str, Any]] | None = Field(None, description="Refused unless empty: use tools.")
    function_call: str | dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = Field(None, description="Changes no answer.")
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @field_validator("functions", "audio", "web_search_options", "moderation", mode="after")
    @classmethod
    def _not_given(cls, value: Any, info: ValidationInfo) -> Any:
        if value:
            why = "give tools instead" if info.field_name == "functions" else "this server has no such thing"
            raise _unsupported(str(info.field_name), why)
        return value

    @field_validator("modalities", mode="after")
    @classmethod
    def _only_text(cls, value: list[str] | None) -> list[str] | None:
        if value and set(value) != {"text"}:
            raise _unsupported("modalities", "only ['text'] is, answers are text")
        return value

    @field_validator("verbosity", mode="after")
    @classmethod
    def _as_it_comes(cls, value: str | None) -> str | None:
        if value not in (None, "medium"):
            raise _unsupported("verbosity", "answers are as long as they come")
        return value

    @field_validator("top_logprobs", mode="after")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("invalid_value", "only allowed when logprobs is true")
        return value

    @field_validator("chat_template_kwargs", mode="after")
    @classmethod
    def _settings_alone(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, setting in (value or {}).items():
            if why := no_setting(name, setting):
                raise _unsupported(f"chat_template_kwargs.{name[:64]}", why)
        return value

    @field_validator("tool_choice", "function_call", mode="after")
    @classmethod
    def _free_choice(cls, value: str | dict[str, Any] | None, info: ValidationInfo) -> str | dict[str, Any] | None:
        if value not in (None, "auto", "none"):
            raise _unsupported(str(info.field_name), "only 'auto' and 'none' are, a tool call cannot be forced")
        return value

    @field_validator("store", mode="after")
    @classmethod
    def _no_store(cls, value: bool | None) -> bool | None:
        if value:
            raise _unsupported("store", "answers are not kept")
        return value

    @property
    def odds(self) -> int | None:
        """How many of the likeliest tokens to tell at each place; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """New tokens asked for, by either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], FIRST]
        | Annotated[list[int], FIRST]
        | Annotated[list[Annotated[list[int], FIRST]], FIRST]
    )
    max_tokens: int | None = Field(16, ge=1)
    best_of: int | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    suffix: str | None = None

    @field_validator("echo", "suffix", mode="after")
    @classmethod
    def _not_done(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and value is not False and value != "":
            raise _unsupported(str(info.field_name), "only the answer's text is given")
        return value

    @field_validator("best_of", mode="after")
    @classmethod
    def _best_is_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, info.data.get("n") or 1):
            raise _unsupported("best_of", "ask for n answers instead")
        return value

    @field_validator("prompt", mode="after")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or [] in value):
            raise PydanticCustomError("invalid_value", "expected text or token ids")
        return value

    @property
    def odds(self) -> int | None:
        """How many of the likeliest tokens to tell at each place; None for no log probabilities at all."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class PatchRef(Strict):
    """The body of ``POST /v1/patches``."""

    patch: str = Field(min_length=1, max_length=4096, description="v3, name@v3, a digest, a file or hf://org/repo@v3.")


class SwitchRef(Strict):
    """The body of ``POST /v1/patches/rollback``, which may be left out."""

    policy: SwapPolicy | None = Field(
        None, description="What becomes of requests in flight; the server's --swap-policy without it."
    )


class Activation(PatchRef, SwitchRef):
    """The body of ``POST /v1/patches/activate``."""


def _unsupported(name: str, why: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "{name} is not supported: {why}", {"name": name, "why": why})
