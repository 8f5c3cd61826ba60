"""Fields of a request that say how an answer is made: its form, and the settings of the model's chat template."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# What a template is given by its tokenizer, or what would make another conversation of the one that was sent.
_NOT_SETTINGS = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "additional_special_tokens",
    "extra_special_tokens",
)
_SETTING = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Strict(BaseModel):
    """A body that allows no unknown field and no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class JsonSchema(BaseModel):
    """What an answer is to be; further fields are OpenAI's for people and for other models."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer. A schema is taken where the operator allows it (grammar.py)."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, validate_default=True)

    @field_validator("json_schema", mode="after")
    @classmethod
    def _goes_with_its_type(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        if (value is not None) != (info.data.get("type") == "json_schema"):
            raise PydanticCustomError("invalid_value", "expected a schema with the type json_schema, and with no other")
        return value


def no_setting(name: str, value: Any) -> str:
    """Why a name and its value are no setting of a chat template; empty if they are one.

    A text is one word: it goes into the prompt past everything that tells a message's text from control tokens.
    """
    if not _SETTING.fullmatch(name) or name in _NOT_SETTINGS or name.endswith("_token"):
        return "it is no setting of a chat template"
    if isinstance(value, str) and not _SETTING.fullmatch(value):
        return "a text there is one word of letters and digits"
    return "" if isinstance(value, str | bool | int | float | None) else "a setting is a word, a number, true or false"
