"""The layer in front of vLLM's own API: it decides which patch answers, and the answer says so.

An ASGI layer. It asks the table which patch a request's ``model`` means, and hands vLLM the name that the engine
knows (the base's, or an adapter's). It writes the client's name and our ``system_fingerprint`` into the answer, event
by event if it is streamed. Endpoints that could answer past the table are not served. Needs no vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nest_runtime.errors import NestError, PatchReplaced
from nest_runtime.prompts.control import spells_control
from nest_runtime.serve.engine import Engine
from nest_runtime.serve.http.api import Service, fingerprint
from nest_runtime.serve.http.json_route import check_text
from nest_runtime.serve.http.middleware import replayed
from nest_runtime.serve.http.problems import (
    ApiError,
    completions_closed,
    control_tokens_closed,
    from_nest,
    prefill_closed,
    unknown_model,
)
from nest_runtime.serve.http.wire import sse
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.vllm.flow import Attempt, Flow

ANSWERING = ("/v1/chat/completions", "/v1/completions")
HARMLESS = ("/ping", "/version", "/load", "/tokenize", "/detokenize", "/openapi.json")
# With these a client could ban the words that a refusal is made of, or reach into the engine past the patch.
REFUSED = (
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "logits_processors",
    "vllm_xargs",
    "kv_transfer_params",
    "cache_salt",
)


class Front:
    """In front of vLLM's app.

    Args:
        app: vLLM's own.
        service: the table, and the limits.
        flow: counts requests in flight.
        engine_name: what the engine calls a patch, or the base.
    """

    def __init__(
        self, app: ASGIApp, service: Service[Engine], flow: Flow, engine_name: Callable[[ServedPatch], str]
    ) -> None:
        self._app = app
        self._service = service
        self._flow = flow
        self._engine_name = engine_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] in ANSWERING and scope["method"] == "POST":
                await self._answer(scope, receive, send)
            elif scope["path"] in (*HARMLESS, *ANSWERING):
                await self._app(scope, receive, send)
            else:
                raise ApiError(404, f"Invalid URL ({scope['method']} {scope['path']})")
        except ApiError as error:
            await error.response()(scope, receive, send)
        except NestError as error:
            await from_nest(error).response()(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/completions" and not self._service.allowed.completions:
            raise completions_closed()
        fields = checked(await _body(receive), self._service)
        table, seconds = self._service.table, self._service.limits.request_seconds
        model = fields.setdefault("model", table.model_name)

        def pin() -> ServedPatch:
            """Pin the request to the patch that its model names now."""
            found = table.named(model)
            if found is None:
                raise unknown_model(str(model))
            scope["state"]["pin"] = found
            return found

        pin()
        again, until = False, asyncio.get_running_loop().time() + seconds
        while True:
            async with self._flow.enter(pin, model == table.model_name, again=again) as attempt:
                answer = AnswerRelay(send, attempt, model, fingerprint(table, attempt.pin))
                inner = _scope(scope, body := json.dumps({**fields, "model": self._engine_name(attempt.pin)}).encode())
                try:
                    async with asyncio.timeout_at(until):
                        if await attempt.run(self._app(inner, replayed(body, receive), answer.send)):
                            return
                except TimeoutError:
                    late = ApiError(504, f"The request took more than {seconds:g} s.", code="timeout")
                    if not attempt.shown:
                        raise late from None
                    await answer.end(late)
                    return
            if attempt.shown:
                await answer.end(from_nest(_replaced(attempt.pin, table.active)))
                return
            again = True


class AnswerRelay:
    """Passes one answer on to the client, in the client's terms.

    Args:
        send: to the client.
        attempt: is marked when the client has seen a part.
        model: what the client asked for.
        fingerprint: model hash and patch digest.
    """

    def __init__(self, send: Send, attempt: Attempt, model: str, fingerprint: str) -> None:
        self._send = send
        self._attempt = attempt
        self._mine = {"model": model, "system_fingerprint": fingerprint}
        self._start: Message | None = None
        self._kind = ""
        self._rest = b""

    async def send(self, message: Message) -> None:
        """Takes vLLM's messages."""
        if message["type"] == "http.response.start":
            self._start = message
            self._kind = Headers(raw=message["headers"]).get("content-type", "").partition(";")[0]
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._rest += message.get("body", b"")
        more = message.get("more_body", False)
        if self._kind == "text/event-stream":
            whole, ended, rest = self._rest.rpartition(b"\n\n") if more else (self._rest, b"", b"")
            if ended or not more:
                self._rest = rest
                await self._out(b"".join(self._event(event) for event in whole.split(b"\n\n")), more)
        elif not more:
            await self._out(self._whole(self._rest), False)

    async def end(self, error: ApiError) -> None:
        """End a stream, of which a part was sent, with an error."""
        await self._send({"type": "http.response.body", "body": sse(error.body()), "more_body": False})

    async def _out(self, body: bytes, more: bool) -> None:
        if not body and more:
            return
        if self._start is not None:
            start, self._start = self._start, None
            if not more and self._kind != "text/event-stream":
                MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
            await self._send(start)
        self._attempt.shown = True
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _event(self, event: bytes) -> bytes:
        prefix, found, data = event.partition(b"data: ")
        if not event.strip():
            return b""
        if not found or prefix.strip() or data.strip() == b"[DONE]":
            return event + b"\n\n"
        return sse(self._named(json.loads(data)))

    def _whole(self, body: bytes) -> bytes:
        if self._kind != "application/json":
            return body
        value = json.loads(body)
        return json.dumps(self._named(value), ensure_ascii=False, separators=(",", ":")).encode()

    def _named(self, value: Any) -> Any:
        """An answer, or a chunk of it, under the client's name; errors in the shape of OpenAI's."""
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("error"), dict):
            return {"error": _error(value["error"])}
        return {**value, **self._mine} if "model" in value else value


def checked(body: bytes, service: Service[Engine]) -> dict[str, Any]:
    """A request's fields, with the model's own sampling where the client leaves it open.

    Raises:
        ApiError: 400; it is no JSON object, or has a field that a client may not set.
    """
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is no JSON object.", code="invalid_json")
    for name in REFUSED:
        if fields.get(name):
            raise ApiError(400, f"{name} is not supported by this server.", code="unsupported_parameter", param=name)
    if not isinstance(fields.get("model") or "", str):
        raise ApiError(400, "model: expected a string", code="invalid_value", param="model")
    if fields.get("model") is None:
        fields.pop("model", None)
    if fields.get("temperature") is None:
        fields["temperature"] = service.defaults.temperature
    check_text(fields)
    _check_sizes(fields, service)
    _check_allowed(fields, service)
    return fields


def _check_allowed(fields: Mapping[str, Any], service: Service[Engine]) -> None:
    """What the operator did not allow. VLLM reads all that spells a control token as one: such prompts are refused."""
    messages = fields.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    begun = fields.get("continue_final_message") or fields.get("add_generation_prompt") is False
    if not service.allowed.prefill and (begun or (isinstance(last, dict) and last.get("role") == "assistant")):
        raise prefill_closed()
    for name in ("messages", "tools", "documents", "chat_template_kwargs", "prompt"):
        if not service.allowed.special_tokens and spells_control(service.tokenizer, fields.get(name)):
            raise control_tokens_closed(name)


def _check_sizes(fields: Mapping[str, Any], service: Service[Engine]) -> None:
    limits = service.limits
    for name, most in (
        ("n", limits.max_choices),
        ("max_tokens", limits.max_tokens),
        ("max_completion_tokens", limits.max_tokens),
    ):
        asked = fields.get(name)
        if most is not None and isinstance(asked, int) and asked > most:
            raise ApiError(400, f"{name} is {asked}; at most {most} is taken.", code="invalid_value", param=name)


def _error(found: Mapping[str, Any]) -> dict[str, Any]:
    """VLLM's error in OpenAI's shape: its ``code`` is the HTTP status, which is no code."""
    code = found.get("code")
    status = code if isinstance(code, int) else 400
    shaped = ApiError(status, str(found.get("message", "")), param=found.get("param")).body()["error"]
    return {**shaped, "code": code if isinstance(code, str) else None}


def _replaced(old: ServedPatch, new: ServedPatch) -> NestError:
    message = f"this answer ends here: while it was given, its patch {old.label} was replaced by {new.label}"
    return PatchReplaced(message, "do not use the part that came, and ask again")


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "The client left.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _scope(scope: Scope, body: bytes) -> Scope:
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-length"] = str(len(body))
    headers["content-type"] = "application/json"
    del headers["transfer-encoding"]
    return {**scope, "headers": headers.raw}
