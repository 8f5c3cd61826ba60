"""From a parsed request to its answer, whole or streamed, or to nothing if the client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nest_runtime.errors import NestError
from nest_runtime.serve.engine import TokenEngine
from nest_runtime.serve.http.connections import Connection
from nest_runtime.serve.http.problems import ApiError, from_nest
from nest_runtime.serve.http.prompts import Tokens, check_ids, new_token_limits
from nest_runtime.serve.http.request_rules import makers_of
from nest_runtime.serve.http.responses import ResponsesWire
from nest_runtime.serve.http.schemas import ChatRequest, Sampling
from nest_runtime.serve.http.service import Service, fingerprint
from nest_runtime.serve.http.wire import Wire
from nest_runtime.serve.requests.answers import Answer, Choice, Piece
from nest_runtime.serve.requests.generation import EngineRequest
from nest_runtime.serve.requests.sampling import Rule

GONE = 499  # nginx's status for a client that left; nobody reads it but the log
LONG_BODY = 32 * 1024  # longer ones are tokenized off the event loop
T = TypeVar("T")

prompt_log = logging.getLogger("nest_runtime.serve.prompts")


class EventStream(StreamingResponse):
    """Server-sent events, the first of which exists already; ``closed`` is called however they end.

    An event is asked for when the client has taken all before it. So none waits where nobody can take it back.
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
        """Send the status and every event, and end the response."""
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


async def answer_request(
    service: Service[TokenEngine],
    request: Request,
    body: Sampling,
    prompts: tuple[Tokens, ...],
    asked: int | None,
    param: str,
    write: Callable[[str], ResponsesWire] | None = None,
) -> Response:
    """Answer a request, written as chat or plain completions unless ``write`` makes another wire of a fingerprint."""
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
    makers = await _makers(service, body)
    # From here to the engine nothing awaits: an activation is either before this request or after it.
    pin = service.pin(request, body.model)
    follows = body.model == service.table.model_name
    wanted = EngineRequest(prompts, most, body.n or 1, service.params(body), pin, follows, makers=makers)
    generation = service.engine.admit(wanted)
    answer = Answer(generation, service.tokenizer, body.stops, service.limits.request_seconds, service.metrics)
    if service.log_prompts:
        _log_prompts(service, request, prompts)
    try:
        if body.stream:
            return await _streamed(service, request, body, answer, write)
        choices = await _unless_gone(request, _sendable(request, answer))
        while choices is not None and answer.stale:
            choices = await _unless_gone(request, _sendable(request, answer))
    except BaseException:
        _left(service, answer)
        raise
    _left(service, answer)
    if choices is None:
        return Response(status_code=GONE)
    return JSONResponse(_wire(service, request, body, answer, write).whole(choices, answer.usage))


async def _streamed(
    service: Service[TokenEngine],
    request: Request,
    body: Sampling,
    answer: Answer,
    write: Callable[[str], ResponsesWire] | None,
) -> Response:
    """A stream begins with its first text: until then the patch may still change, and an error has a status."""
    pieces = answer.stream()
    first = await _unless_gone(request, anext(pieces))
    while first is not None and answer.stale:
        first = await _unless_gone(request, anext(pieces))
    if first is None:
        _left(service, answer)
        return Response(status_code=GONE)
    wire = _wire(service, request, body, answer, write)
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


def _wire(
    service: Service[TokenEngine],
    request: Request,
    body: Sampling,
    answer: Answer,
    write: Callable[[str], ResponsesWire] | None,
) -> Wire | ResponsesWire:
    """How the answer is written, now that its patch is settled; the headers will name it too."""
    request.state.pin = pin = answer.generation.request.pin
    named = fingerprint(service.table, pin)
    if write is not None:
        return write(named)
    return Wire(isinstance(body, ChatRequest), body.model, named, body.include_usage, body.odds is not None)


async def _events(
    answer: Answer, wire: Wire | ResponsesWire, first: Piece, rest: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """The stream's chunks; an error after the first byte becomes an event of its own, and the last."""
    try:
        if wire.chat:
            for index in range(answer.generation.request.choices):
                yield wire.opening(index)
        if not answer.generation.failed:
            yield wire.piece(first)
        async for piece in rest:
            yield wire.piece(piece)
        yield wire.last(answer.usage)
    except NestError as error:
        yield wire.error(from_nest(error))
    except ApiError as error:
        yield wire.error(error)


def _log_prompts(service: Service[TokenEngine], request: Request, prompts: tuple[Tokens, ...]) -> None:
    for prompt in prompts:
        fields = {"request_id": request.state.request_id, "prompt": service.tokenizer.decode(prompt)}
        extra = {"fields": fields, "kind": None}
        prompt_log.info("request_id=%(request_id)s prompt=%(prompt)r", fields, extra=extra)


def _left(service: Service[TokenEngine], answer: Answer) -> None:
    """Called when a response is over, whatever ended it."""
    answer.generation.cancel()
    if answer.generation.canceled:
        service.metrics.canceled.inc()


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T | None:
    """The result of ``answer``, or None as soon as the client closes the connection; ``answer`` is canceled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        watch.cancel()
        task.cancel()


async def _makers(service: Service[TokenEngine], body: Sampling) -> tuple[Callable[[int], Rule], ...]:
    """What makes the request's own rules; a grammar is made off the event loop. Raises ApiError 400."""

    def made() -> tuple[Callable[[int], Rule], ...]:
        return makers_of(body, service.allowed, service.grammars)

    formed = isinstance(body, ChatRequest) and body.response_format is not None
    return await service.tokenizing.run(made) if formed else made()


def check_choices(service: Service[TokenEngine], prompts: int, body: Sampling) -> None:
    """Whether so many answers are given to one request; asked before anything is tokenized. Raises ApiError 400."""
    n, most = body.n or 1, service.limits.max_choices
    if prompts * n > most:
        message = f"{prompts} prompts times n = {n} were asked for; at most {most} are answered"
        raise ApiError(400, message, code="invalid_value", param="n")


async def prepared(service: Service[TokenEngine], request: Request, tokenize: Callable[[], T]) -> T:
    """Tokenize here, or in a thread if the body is so long that others would wait for it."""
    if int(request.headers.get("content-length") or LONG_BODY) < LONG_BODY:
        return tokenize()
    return await service.tokenizing.run(tokenize)
