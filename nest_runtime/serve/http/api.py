"""The OpenAI-compatible routes, and the probes beside them.

A request gets its patch at the moment the engine takes it in, and keeps it. Access, request ids and
the patch headers are added in middleware.py; the admin routes are in admin.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nest_runtime.errors import NestError
from nest_runtime.serve.answers import Answer, Choice, Piece
from nest_runtime.serve.config import Allowed, Limits
from nest_runtime.serve.generation import Work
from nest_runtime.serve.http.connections import Connection
from nest_runtime.serve.http.json_route import JsonRoute
from nest_runtime.serve.http.problems import ApiError, ErrorBody, completions_closed, from_nest, unknown_model
from nest_runtime.serve.http.prompts import Tokens, chat_tokens, check_ids, completion_tokens, new_token_limits
from nest_runtime.serve.http.schemas import ChatRequest, CompletionRequest, Sampling
from nest_runtime.serve.http.wire import Wire, sse
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.patches import PatchTable, Served
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.sampling import SamplingParams
from nest_runtime.serve.transformers.engine import Engine

GONE = 499  # nginx's status for a client that left; nobody reads it but the log
LONG_BODY = 32 * 1024  # longer ones are tokenized off the event loop
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault, in OpenAI's error shape."},
    "5XX": {"model": ErrorBody, "description": "The server is at fault, in OpenAI's error shape."},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with stream, its chunks as events.", "content": {"text/event-stream": {}}}
}
PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
TOKENIZING = 2  # threads for that
T = TypeVar("T")

prompt_log = logging.getLogger("nest_runtime.serve.prompts")


@dataclass
class Service:
    """What the routes need: one model, one engine, one table of patches.

    ``defaults`` and ``max_new_tokens`` are the model's own, for what a client leaves open.
    """

    engine: Engine
    table: PatchTable
    tokenizer: Any
    limits: Limits
    metrics: Metrics
    defaults: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    following: Callable[[], dict[str, Any]] | None = None
    log_prompts: bool = False
    allowed: Allowed = field(default_factory=Allowed)
    started: int = field(default_factory=lambda: int(time.time()))
    tokenizing: Pool = field(default_factory=lambda: Pool("tokenize", TOKENIZING))

    def pin(self, request: Request, model: str) -> Served:
        """The patch a model name stands for now; the response's headers will name it. Raises ApiError 404."""
        served = self.table.named(model)
        if served is None:
            raise unknown_model(model)
        request.state.pin = served
        return served

    def params(self, body: Sampling) -> SamplingParams:
        """The request's sampling, with the model's own defaults where the client says nothing."""
        default = self.defaults
        return replace(
            default,
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_p=default.top_p if body.top_p is None else body.top_p,
            top_k=default.top_k if body.top_k is None else body.top_k,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=body.seed,
        )


class EventStream(StreamingResponse):
    """Server-sent events, the first of which is there; whatever ends them, ``closed`` is called.

    An event is asked for when the client has taken all before it, so that none waits where nobody can take it back.
    """

    def __init__(self, content: AsyncIterator[bytes], closed: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._closed = closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()

    async def stream_response(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = {"type": "http.response.body", "more_body": True}
        events = aiter(self.body_iterator)
        while True:
            await send({**body, "body": b""})  # nothing goes out; it returns when what did has been taken
            try:
                event = await anext(events)
            except StopAsyncIteration:
                break
            await send({**body, "body": event})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def routes(service: Service) -> APIRouter:
    """The public routes."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.pin(request, body.model)
        _check_choices(service, 1, body)
        tokens = await _prepare(service, request, lambda: (chat_tokens(service.tokenizer, body, service.allowed),))
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        return await _answer(service, request, body, tokens, body.limit, param)

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one text, or several, where the operator allows it."""
        if not service.allowed.completions:
            raise completions_closed()
        service.pin(request, body.model)
        _check_choices(service, len(body.prompts), body)
        tokens = await _prepare(service, request, lambda: completion_tokens(service.tokenizer, body, service.allowed))
        return await _answer(service, request, body, tokens, body.max_tokens or 16, "max_tokens")

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


def probes(service: Service, *, metrics: bool = True) -> APIRouter:
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


async def _answer(
    service: Service, request: Request, body: Sampling, prompts: tuple[Tokens, ...], asked: int | None, param: str
) -> Response:
    chat = isinstance(body, ChatRequest)
    source = "messages" if chat else "prompt"
    check_ids(prompts, service.engine.rows, source)
    most = new_token_limits(
        prompts,
        asked,
        service.engine.context,
        service.limits,
        default=service.max_new_tokens,
        source=source,
        param=param,
    )
    # From here to the engine nothing awaits: an activation is either before this request or after it.
    pin = service.pin(request, body.model)
    follows = body.model == service.table.model_name
    generation = service.engine.admit(Work(prompts, most, body.n or 1, service.params(body), pin, follows))
    answer = Answer(generation, service.tokenizer, body.stops, service.limits.request_seconds, service.metrics)
    if service.log_prompts:
        _log_prompts(service, request, prompts)
    try:
        if body.stream:
            return await _streamed(service, request, body, answer)
        choices = await _unless_gone(request, _sendable(request, answer))
        while choices is not None and answer.stale:
            choices = await _unless_gone(request, _sendable(request, answer))
    except BaseException:
        _left(service, answer)
        raise
    _left(service, answer)
    if choices is None:
        return Response(status_code=GONE)
    return JSONResponse(_wire(service, request, body, answer).whole(choices, answer.usage))


async def _streamed(service: Service, request: Request, body: Sampling, answer: Answer) -> Response:
    """A stream begins with its first text: until then the patch may still change, and an error has a status."""
    pieces = answer.stream()
    first = await _unless_gone(request, anext(pieces))
    while first is not None and answer.stale:
        first = await _unless_gone(request, anext(pieces))
    if first is None:
        _left(service, answer)
        return Response(status_code=GONE)
    wire = _wire(service, request, body, answer)
    answer.generation.shown = True
    if (connection := _connection(request)) is not None:
        answer.generation.on_cut = connection.cut
    return EventStream(_events(answer, wire, first, pieces), lambda: _left(service, answer))


async def _sendable(request: Request, answer: Answer) -> list[Choice]:
    """The whole answer, when the client has taken all that it was sent before."""
    choices = await answer.whole()
    if (connection := _connection(request)) is not None:
        await connection.writable()
    return choices


def _connection(request: Request) -> Connection | None:
    """The request's connection, where the listener is our own."""
    return getattr(request.state, "connection", None)


def _wire(service: Service, request: Request, body: Sampling, answer: Answer) -> Wire:
    """How the answer is written, now that its patch is settled; the headers will name it too."""
    request.state.pin = pin = answer.generation.work.pin
    return Wire(isinstance(body, ChatRequest), body.model, fingerprint(service.table, pin), body.include_usage)


async def _events(answer: Answer, wire: Wire, first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """The stream's chunks; an error after the first byte becomes an event of its own, and the last."""
    try:
        if wire.chat:
            for index in range(answer.generation.work.choices):
                yield wire.opening(index)
        if not answer.generation.failed:
            yield wire.piece(first)
        async for piece in rest:
            yield wire.piece(piece)
        yield wire.last(answer.usage)
    except NestError as error:
        yield sse(from_nest(error).body())
    except ApiError as error:
        yield sse(error.body())


def _log_prompts(service: Service, request: Request, prompts: tuple[Tokens, ...]) -> None:
    for prompt in prompts:
        fields = {"request_id": request.state.request_id, "prompt": service.tokenizer.decode(prompt)}
        extra = {"fields": fields, "kind": None}
        prompt_log.info("request_id=%(request_id)s prompt=%(prompt)r", fields, extra=extra)


def _left(service: Service, answer: Answer) -> None:
    """Called when a response is over, whatever ended it."""
    answer.generation.cancel()
    if answer.generation.canceled:
        service.metrics.canceled.inc()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of ``work``, or None as soon as the client closes the connection; ``work`` is canceled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        watch.cancel()
        task.cancel()


def _check_choices(service: Service, prompts: int, body: Sampling) -> None:
    """Whether so many answers are given to one request; asked before anything is tokenized. Raises ApiError 400."""
    n, most = body.n or 1, service.limits.max_choices
    if prompts * n > most:
        message = f"{prompts} prompts times n = {n} were asked for; at most {most} are answered"
        raise ApiError(400, message, code="invalid_value", param="n")


async def _prepare(service: Service, request: Request, tokenize: Callable[[], T]) -> T:
    """Tokenize here, or in a thread where the body is so long that others would wait for it."""
    if int(request.headers.get("content-length") or LONG_BODY) < LONG_BODY:
        return tokenize()
    return await service.tokenizing.run(tokenize)


def model_row(service: Service, name: str) -> dict[str, Any]:
    """What ``/v1/models`` says of one name."""
    served = service.table.named(name) or service.table.active
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "nest-runtime",
        "patch": served.label,
        "digest": served.digest,
    }


def fingerprint(table: PatchTable, pin: Served) -> str:
    """``model=<hash>;patch=<digest>``: what produced an answer, to the bit."""
    return f"model={table.model_hash};patch={pin.digest}"
