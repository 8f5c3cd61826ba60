"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, with the status codes clients expect.

Every error that leaves the server passes through here, whatever raised it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from nest_runtime.errors import (
    EngineError,
    HubError,
    NestError,
    PatchNotFound,
    PatchReplaced,
    QueueFull,
    StoreError,
    TrustError,
    UsageError,
)
from nest_runtime.escape import clean

MAX_MESSAGE = 2000  # characters
MAX_PARAM = 200
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


class ErrorDetail(BaseModel):
    """What went wrong: for people, by kind, by field, for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: for people.
        code: for programs, e.g. ``model_not_found``.
        param: the request's field at fault.
        headers: more response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else _clipped(self.param, MAX_PARAM)
        message = clean(_clipped(self.message, MAX_MESSAGE))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def unknown_model(model: str) -> ApiError:
    """404, in the same words whether the model is unknown or the patch is there and not exposed."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found", param="model")


def completions_closed() -> ApiError:
    """403 where only chat is answered: a text of the client's own goes around the template, and most refusals."""
    message = (
        "This server answers chat (/v1/chat/completions) only; its operator can open this path: --allow-completions."
    )
    return ApiError(403, message, code="not_allowed")


def prefill_closed() -> ApiError:
    """400 where answers are not begun by clients."""
    message = "messages: the last one is the assistant's (the operator can allow that: --allow-prefill)"
    return ApiError(400, message, code="not_allowed", param="messages")


def schemas_closed() -> ApiError:
    """400 where clients may not have the model say what a schema spells out."""
    message = (
        "response_format: this server holds answers to no schema of a client's own, only to {'type': 'json_object'} "
        "(the operator can allow that: --allow-json-schema)"
    )
    return ApiError(400, message, code="not_allowed", param="response_format")


def control_tokens_closed(param: str) -> ApiError:
    """400 where clients may not send control tokens, and what they sent cannot be read as text."""
    message = f"{param}: it holds a control token of the model (the operator can allow that: --allow-special-tokens)"
    return ApiError(400, message, code="not_allowed", param=param)


def context_exceeded(context: int, prompt: int, answer: int, param: str) -> ApiError:
    """400 for a prompt, or a prompt with its ``max_tokens``, that the context cannot hold; in OpenAI's words."""
    message = (
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + answer} tokens "
        f"({prompt} in the prompt, {answer} in the completion). Please reduce the length of the prompt or completion."
    )
    return ApiError(400, message, code="context_length_exceeded", param=param)


def from_nest(error: NestError) -> ApiError:
    """What a NestError is in HTTP."""
    message = str(error)
    if isinstance(error, QueueFull):
        headers = {"retry-after": str(error.retry_after)}
        return ApiError(429, message, code="queue_full", headers=headers)
    if isinstance(error, PatchReplaced):
        return ApiError(503, message, code="patch_replaced")
    if isinstance(error, EngineError):
        return ApiError(503, message, code="engine_unavailable", headers={"retry-after": "5"})
    if isinstance(error, PatchNotFound):
        return ApiError(404, message, code="patch_not_found", param="patch")
    if isinstance(error, TrustError):
        return ApiError(403, message, code=_snake(error), param="patch")
    if isinstance(error, StoreError):
        return ApiError(409, message, code="conflict", param="patch")
    if isinstance(error, HubError):
        return ApiError(502, message, code=_snake(error), param="patch")
    if isinstance(error, UsageError):
        return ApiError(400, message, code="invalid_value")
    return ApiError(422, message, code=_snake(error), param="patch")


def from_validation(error: RequestValidationError) -> ApiError:
    """400 for the first field that pydantic refuses, with the field's path in ``param``."""
    first = error.errors()[0]
    unknown = next((e for e in error.errors() if e["type"] == "extra_forbidden"), None)
    if first["type"] == "missing" and unknown is not None:  # a mistyped name is both
        first = unknown
    # A union reports every alternative it tried: the one that got furthest knows best what is wrong.
    first = max((e for e in error.errors() if e["loc"][:2] == first["loc"][:2]), key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}.", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"][1:] if not _is_union_tag(part)) or None
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
    else:
        given = first.get("input")
        found = f"; found {given!r:.80}" if isinstance(given, (str, int, float)) else ""
        message = f"{param or 'The body'}: {first['msg']}{found}"
    return ApiError(400, message, code=_CODES.get(first["type"], _own_code(first["type"])), param=param)


def install(app: FastAPI) -> None:
    """Make ``app`` answer every error in OpenAI's shape."""

    async def api_error(request: Request, error: Any) -> JSONResponse:
        return error.response()

    async def nest_error(request: Request, error: Any) -> JSONResponse:
        return from_nest(error).response()

    async def invalid(request: Request, error: Any) -> JSONResponse:
        return from_validation(error).response()

    async def http_error(request: Request, error: Any) -> JSONResponse:
        """A path that is not there, or cannot be asked so; else as the framework says."""
        message, headers = str(error.detail), error.headers
        if error.status_code == 404:
            message = f"Invalid URL ({request.method} {request.url.path})"
        elif error.status_code == 405:
            allowed = _methods(request)
            message, headers = f"Not allowed: {request.method}; use {allowed}", {"allow": allowed}
        return ApiError(error.status_code, message, headers=headers).response()

    async def bug(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server had an error while processing your request.").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(NestError, nest_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, bug)


def _methods(request: Request) -> str:
    """What a path can be asked with. Each method is tried on the routes: what an included router holds is its own."""
    routes, found = request.app.routes, []
    for method in ("DELETE", "GET", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in routes):
            found.append(method)
    return ", ".join(found)


def _is_union_tag(part: str | int) -> bool:
    """Pydantic names the alternative of a union it tried (``str``, ``list[int]``); clients sent no such field."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part or "-" in part)


def _own_code(kind: str) -> str:
    """Codes that schemas.py raises itself pass through; pydantic's become ``invalid_value``."""
    return kind if kind in ("unsupported_parameter", "unsupported_value") else "invalid_value"


def _clipped(text: str, most: int) -> str:
    """Text of bounded length: what a client sent may stand in it."""
    return text if len(text) <= most else f"{text[:most]}…"


def _snake(error: Exception) -> str:
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
