"""From what a client sent to token ids: the model's chat template, its tokenizer, its limits.

It uses the function of training and evaluation (prompts/examples.py). Nothing here generates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.prompts.control import controls, plain_ids, spelled, text_ids
from nest_runtime.prompts.examples import encode
from nest_runtime.serve.http.bodies import MAX_NAMED, check_counts, check_depth
from nest_runtime.serve.http.problems import ApiError, context_exceeded, control_tokens_closed, prefill_closed
from nest_runtime.serve.http.schemas import ChatRequest, CompletionRequest
from nest_runtime.serve.limits import Allowed, Limits

Tokens = tuple[int, ...]


def chat_tokens(tokenizer: Any, request: ChatRequest, allowed: Allowed, context: int) -> Tokens:
    """The conversation as the model reads it, ready for the answer.

    Args:
        tokenizer: the model's.
        request: as the client sent it.
        allowed: what the operator allows.
        context: tokens that a prompt and its answer may have together.

    Raises:
        ApiError: 400; it cannot be read, or cannot fit.
    """
    messages = _messages(request)
    _check_controls(tokenizer, [messages, request.tools], context, "messages")
    if messages[-1]["role"] == "assistant" and not allowed.prefill:
        raise prefill_closed()
    settings = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort:
        settings["reasoning_effort"] = request.reasoning_effort
    try:
        tokens = encode(
            tokenizer,
            messages,
            tools=request.tools if request.tool_choice != "none" else None,
            variables=settings or None,
            allow_special=allowed.special_tokens,
        )
    except DataError as error:
        raise ApiError(400, str(error), code="invalid_messages", param="messages") from error
    return _not_empty(tokens, "messages")


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages as templates expect them, the arguments of earlier calls as values. Raises ApiError 400."""
    messages = [message.for_template() for message in request.messages]
    functions = [
        (f"messages.{place}.tool_calls.{number}.function.arguments", call["function"])
        for place, message in enumerate(messages)
        for number, call in enumerate(message.get("tool_calls", ()))
    ]
    strings = [value for _, function in functions if isinstance(value := function["arguments"], str)]
    check_counts(",".join(strings).encode(), MAX_NAMED)  # what is in a string was not counted with the body
    for where, function in functions:
        function["arguments"] = _value(function["arguments"], where)
    return messages


def _value(arguments: Any, where: str) -> Any:
    if not arguments:
        return {}
    if not isinstance(arguments, str):
        return arguments
    check_depth(arguments.encode(), where)
    try:
        value = json.loads(arguments)
        json.dumps(value, ensure_ascii=False).encode()  # JSON within JSON can spell half a character once more
    except (ValueError, RecursionError) as error:
        message = f"{where}: expected JSON in a string, of text that exists"
        raise ApiError(400, message, code="invalid_value", param=where) from error
    return value


def completion_tokens(tokenizer: Any, request: CompletionRequest, allowed: Allowed, context: int) -> tuple[Tokens, ...]:
    """Each prompt as token ids; ids that a client sent are checked (ApiError 400).

    A text that spells control tokens is read as text, and ids of control tokens are refused, unless they are allowed.
    None may spell more of them than ``context``, the tokens that a prompt and its answer may have together.
    """
    for prompt in request.prompts:
        if isinstance(prompt, str):
            _check_controls(tokenizer, prompt, context, "prompt")
    return tuple(
        _text_tokens(tokenizer, prompt, allowed) if isinstance(prompt, str) else _given(tokenizer, prompt, allowed)
        for prompt in request.prompts
    )


def _check_controls(tokenizer: Any, value: Any, context: int, param: str) -> None:
    """Refuse what spells more control tokens than the context holds, before each of them costs time."""
    found = spelled(tokenizer, value)
    if found >= context:
        message = (
            f"{param}: {found} control tokens are spelled in it; this model's maximum context length is {context} "
            "tokens. Please leave them out."
        )
        raise ApiError(400, message, code="context_length_exceeded", param=param)


def _text_tokens(tokenizer: Any, text: str, allowed: Allowed) -> Tokens:
    read = plain_ids if allowed.special_tokens else text_ids
    return _not_empty(read(tokenizer, text, special=True), "prompt")


def _given(tokenizer: Any, prompt: list[int], allowed: Allowed) -> Tokens:
    start = prompt[:1] == [tokenizer.bos_token_id]
    if not allowed.special_tokens and controls(tokenizer).count(prompt[start:]):
        raise control_tokens_closed("prompt")
    return tuple(prompt)


def check_ids(prompts: Sequence[Tokens], rows: int, param: str) -> None:
    """Raises ApiError 400 for a token that the model's embedding, of so many rows, does not know.

    A tokenizer may know more tokens than the model: some were added, or belong to another form of it.
    """
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < rows), None)
    if wrong is not None:
        message = f"{param}: token {wrong} is out of range [0, {rows}): the model has no such token"
        raise ApiError(400, message, code="invalid_value", param=param)


def new_token_limits(
    prompts: Sequence[Tokens],
    asked: int | None,
    context: int,
    limits: Limits,
    *,
    default: int | None = None,
    source: str = "prompt",
    param: str = "max_tokens",
) -> tuple[int, ...]:
    """How many tokens each answer may have.

    Args:
        prompts: token ids.
        asked: what the client asked for, or None for as many as fit, up to ``default``.
        context: tokens that a prompt and its answer may have together.
        limits: the server's own.
        default: the model's own limit where the client asked for none.
        source, param: the fields that the prompts and ``asked`` came from, for errors.

    Raises:
        ApiError: 400; a prompt, or a prompt with what was asked for, is too long.
    """
    if asked is not None and limits.max_tokens is not None and asked > limits.max_tokens:
        message = f"{param}: {asked} new tokens were asked for; this server gives at most {limits.max_tokens}"
        raise ApiError(400, message, code="invalid_value", param=param)
    found = []
    for prompt in prompts:
        if limits.max_prompt_tokens is not None and len(prompt) > limits.max_prompt_tokens:
            message = f"the prompt has {len(prompt)} tokens; this server takes at most {limits.max_prompt_tokens}"
            raise ApiError(400, message, code="context_length_exceeded", param=source)
        left = context - len(prompt)
        if left < (asked or 1):
            raise context_exceeded(context, len(prompt), asked or 1, source if left < 1 else param)
        found.append(asked or min(left, limits.max_tokens or left, default or left))
    return tuple(found)


def _not_empty(tokens: Sequence[int], param: str) -> Tokens:
    if not tokens:
        raise ApiError(400, f"{param}: the prompt has no tokens", code="invalid_value", param=param)
    return tuple(tokens)
