"""The OpenAI-compatible routes, and the probes beside them.

A request gets its patch at the moment the engine takes it in, and keeps it. Access, request ids and
the patch headers are added in middleware.py; the admin routes are in admin.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nest_runtime.serve.engine import Engine, TokenEngine
from nest_runtime.serve.http.answering import answer_request, check_choices, prepared
from nest_runtime.serve.http.json_route import JsonRoute
from nest_runtime.serve.http.problems import ErrorBody, completions_closed
from nest_runtime.serve.http.prompts import Tokens, chat_tokens, completion_tokens
from nest_runtime.serve.http.responses import ResponsesWire
from nest_runtime.serve.http.responses_schemas import ResponsesRequest
from nest_runtime.serve.http.schemas import ChatRequest, CompletionRequest
from nest_runtime.serve.http.service import Service, fingerprint, model_row

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault, in OpenAI's error shape."},
    "5XX": {"model": ErrorBody, "description": "The server is at fault, in OpenAI's error shape."},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with stream, its chunks as events.", "content": {"text/event-stream": {}}}
}
PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
__all__ = ["ERRORS", "PLAIN", "Service", "fingerprint", "model_routes", "model_row", "probes", "routes"]


def routes(service: Service[TokenEngine]) -> APIRouter:
    """The public routes."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    def read(chat: ChatRequest) -> tuple[Tokens]:
        return (chat_tokens(service.tokenizer, chat, service.allowed, service.engine.context),)

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.pin(request, body.model)
        check_choices(service, 1, body)
        tokens = await prepared(service, request, lambda: read(body))
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        return await answer_request(service, request, body, tokens, body.limit, param)

    @router.post("/v1/responses", responses=STREAMED)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, in the shape of the Responses API; nothing is kept."""
        chat = body.for_chat()
        service.pin(request, chat.model)
        tokens = await prepared(service, request, lambda: read(chat))
        limit, param = body.max_output_tokens, "max_output_tokens"
        return await answer_request(service, request, chat, tokens, limit, param, partial(ResponsesWire, body))

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one text, or several, where the operator allows it."""
        if not service.allowed.completions:
            raise completions_closed()
        service.pin(request, body.model)
        check_choices(service, len(body.prompts), body)
        texts = partial(completion_tokens, service.tokenizer, body, service.allowed, service.engine.context)
        tokens = await prepared(service, request, texts)
        return await answer_request(service, request, body, tokens, body.max_tokens or 16, "max_tokens")

    router.include_router(model_routes(service))
    return router


def model_routes(service: Service[Engine]) -> APIRouter:
    """What models there are: the patches that clients may name. The same for every engine."""
    router = APIRouter(responses=ERRORS)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that clients may use."""
        return {"object": "list", "data": [model_row(service, name) for name in service.table.names()]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        """One of the names."""
        service.pin(request, model)
        return model_row(service, model)

    return router


def probes(service: Service[Engine], *, metrics: bool = True) -> APIRouter:
    """Health, readiness and, if wanted here, metrics."""
    router = APIRouter(responses=ERRORS)

    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether this process can do its work; if not, only a restart helps."""
        alive = service.engine.alive or service.engine.draining
        return JSONResponse({"status": "ok" if alive else "engine dead"}, 200 if alive else 503)

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether to send requests here now."""
        engine, active = service.engine, service.table.active
        state = "draining" if engine.draining else "ready" if engine.alive else "engine dead"
        if service.table.halted is not None:
            state = "stopped: the active patch is revoked"
        body: dict[str, Any] = {
            "status": state,
            "model": service.table.model_name,
            "patch": active.label,
            "digest": active.digest,
        }
        if service.following is not None:
            body["follow"] = service.following()
        return JSONResponse(body, 200 if state == "ready" else 503)

    if metrics:

        @router.get("/metrics", responses=PLAIN, response_class=Response)
        async def metrics_text() -> Response:
            """Prometheus metrics."""
            return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
