"""Puts one server together over a running vLLM engine: table, routes, and the layer in front of vLLM's app.

The parts are the transformers server's (serve/): store, trust, audit, admin API, metrics, access, following. Only the
engine's side differs: patches in place, or as adapters if clients may choose (``--expose``).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nest_runtime.errors import EngineError
from nest_runtime.io import nest_home
from nest_runtime.model.load import resolve_model
from nest_runtime.serve.app import Server, fastapi_app, framed, guard_of, measure, secrets_of
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.following.follow import Following
from nest_runtime.serve.http.access import Secrets
from nest_runtime.serve.http.admin import admin_routes
from nest_runtime.serve.http.api import ERRORS, PLAIN, Service, model_routes, probes
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.requests.generation import EngineRequest
from nest_runtime.serve.requests.sampling import SamplingParams
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.vllm.adapters import Adapters
from nest_runtime.serve.vllm.base import CheckpointBase
from nest_runtime.serve.vllm.flow import Flow
from nest_runtime.serve.vllm.front import Front
from nest_runtime.serve.vllm.inplace import InPlace
from nest_runtime.serve.vllm.replicas import Replicas
from nest_runtime.serve.vllm.slots import BASE_NAME, adapter_name
from nest_runtime.serve.vllm.table import VllmTable
from nest_runtime.serve.vllm.trial import Trial
from nest_runtime.store.store import Store

OWN = ("/v1/models", "/v1/patches", "/v1/audit", "/health", "/ready", "/metrics")


class VllmEngine:
    """vLLM's engine as the routes, the table and the metrics see one (serve/engine.py).

    Args:
        replicas: the workers.
        patches: how patches are put on.
        flow: the requests in flight.
        limits: how many sequences run at once, and how long a trial waits for them.
        context: tokens that a prompt and its answer may have together.
    """

    reused_tokens = 0  # vLLM counts its own: vllm:prefix_cache_hits
    failed_passes = 0  # vLLM ends with its first

    def __init__(
        self, replicas: Replicas, patches: InPlace | Adapters, flow: Flow, limits: Limits, context: int
    ) -> None:
        self.replicas = replicas
        self.patches = patches
        self.flow = flow
        self.capacity = flow.capacity
        self.context = context
        self._running = limits.running
        self._wait_seconds = limits.drain_seconds

    @property
    def alive(self) -> bool:
        """Whether the engine answers, under weights that are known."""
        return self.replicas.alive and self.patches.broken is None

    @property
    def draining(self) -> bool:
        """Whether the server is on its way out."""
        return self.flow.draining

    @property
    def live(self) -> int:
        """Requests running or waiting."""
        return self.flow.live

    @property
    def waiting(self) -> int:
        """Requests beyond what runs at once."""
        return max(0, self.flow.live - self._running)

    @property
    def folded(self) -> bool:
        """Whether a patch is folded into the weights."""
        return isinstance(self.patches, InPlace) and self.patches.on is not None

    def admit(self, request: EngineRequest) -> Trial:
        """Answer outside of any request: the probes of a patch (serve/following/admission.py)."""
        return Trial(self.replicas.client, self.patches, self.flow, request, self._wait_seconds)

    def in_flight(self) -> Counter[str]:
        """Requests running, by the label of the patch that answers them."""
        return self.flow.in_flight()

    def keys_in_use(self) -> set[str | None]:
        """Keys of the patches that answer requests."""
        return self.flow.keys_in_use()

    def pause(self) -> AbstractContextManager[None]:
        """Return at once: loading and unloading go through the engine's own queue, so nothing has to stop."""
        return nullcontext()

    hold = pause

    def unfold(self) -> None:
        """Do nothing: a patch that is removed is not active, and so not in the weights."""

    def enforce(self, pin: ServedPatch) -> int:
        """Replace requests in flight; in place, the switch has done so already."""
        return 0 if isinstance(self.patches, InPlace) else self.flow.replace(pin)

    async def start(self) -> None:
        """Check that every rank has what was applied; vLLM has started the engine."""
        await self.patches.verify()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, and wait for those in flight; vLLM ends the engine."""
        await self.flow.drained(drain_seconds)


async def build(config: ServeConfig, client: Any, models: Any) -> Server[VllmEngine]:
    """A server over a running engine; nothing is active yet.

    Args:
        config: how to serve.
        client: vLLM's ``AsyncLLM``.
        models: vLLM's ``OpenAIServingModels``.

    Raises:
        NestError: the engine cannot be patched, or the model's checkpoint not be read.
    """
    api_keys, admin = secrets_of(config)
    store = Store()
    guard = guard_of(config, store)
    name, folder = await asyncio.to_thread(resolve_model, config.model, trust_remote_code=config.trust_remote_code)
    base = CheckpointBase(folder, client.vllm_config.model_config.dtype)
    model_hash = await asyncio.to_thread(lambda: base.hash)
    replicas = Replicas(client)
    patches = _patches(config, replicas, base, models)
    flow = Flow(config.limits.running + config.max_queue, config.limits.running)
    audit = AuditLog(config.audit_file or nest_home() / "audit.jsonl")
    served_name = config.served_name or name
    table = VllmTable(
        patches,
        flow,
        config.limits.drain_seconds,
        served_name,
        model_hash,
        store,
        audit,
        guard=guard,
        follows_store=config.patch is None,
        policy=config.swap_policy,
    )
    context = client.vllm_config.model_config.max_model_len
    engine = VllmEngine(replicas, patches, flow, config.limits, context)
    defaults = _defaults(client.vllm_config.model_config)
    tokenizer = await asyncio.to_thread(_tokenizer, base.folder, config.trust_remote_code)
    service = Service(engine, table, tokenizer, config.limits, Metrics(), defaults=defaults, allowed=config.allowed)
    measure(service, served_name, model_hash)
    following = None
    if config.follow is not None:
        following = Following(config.follow, service, store, audit, guard, model_name=name)
        service.following = following.state
    return Server(config, service, audit, Secrets(api_keys, admin), following)


def asgi_app(server: Server[VllmEngine], vllm_app: ASGIApp) -> ASGIApp:
    """VLLM's app with our routes beside it and our layer in front."""
    service = server.service
    engine = service.engine
    admin_here = server.config.admin_token_file is not None and server.config.admin_address is None
    routers = [model_routes(service), probes(service, metrics=False), _metrics_route(service, vllm_app)]
    if admin_here:
        routers.append(admin_routes(service, server.audit))
    own = fastapi_app(routers)
    front = Front(vllm_app, service, engine.flow, lambda served_patch: engine_name(engine, served_patch))

    async def split(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        mine = any(path == own_path or path.startswith(f"{own_path}/") for own_path in OWN)
        await (own if mine else front)(scope, receive, send)

    return framed(server, split, server.config.host, admin_here=admin_here)


def engine_name(engine: VllmEngine, served_patch: ServedPatch) -> str:
    """The name that vLLM knows a patch by; in place, everything is the base."""
    return (
        BASE_NAME if served_patch.key is None or not engine.patches.per_request else adapter_name(served_patch.digest)
    )


def _patches(config: ServeConfig, replicas: Replicas, base: CheckpointBase, models: Any) -> InPlace | Adapters:
    chosen = bool(config.expose) or config.expose_base
    lora = replicas.client.vllm_config.lora_config
    if chosen != (lora is not None):
        raise EngineError(
            f"clients may {'' if chosen else 'not '}choose patches, and the engine runs "
            f"{'without' if chosen else 'with'} adapters",
            "give --enable-lora and --expose (or --expose-base) together, or neither",
        )
    if not chosen:
        return InPlace(replicas, base)
    return Adapters(replicas, base, models, nest_home() / "vllm")


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The model's tokenizer, for what is asked outside of vLLM's own API."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _defaults(model_config: Any) -> SamplingParams:
    """As the transformers server: greedy unless the model's generation config says ``do_sample``."""
    settings = model_config.try_get_generation_config() or {}
    if not settings.get("do_sample"):
        return SamplingParams()
    return SamplingParams(temperature=settings.get("temperature") or 1.0)


def _metrics_route(service: Service[VllmEngine], vllm_app: ASGIApp) -> APIRouter:
    router = APIRouter(responses=ERRORS)

    @router.get("/metrics", responses=PLAIN, response_class=Response)
    async def metrics(request: Request) -> Response:
        """VLLM's metrics, and ours; those of the process once."""
        text, theirs = service.metrics.text().decode(), (await _fetch(vllm_app, request.scope)).decode()
        lines = [line for line in text.splitlines(True) if not line.removeprefix("# HELP ").startswith("process_")]
        ours = "".join(line for line in lines if not line.startswith("# TYPE process_"))
        return Response(theirs + ours, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _fetch(app: ASGIApp, scope: Scope) -> bytes:
    """The body that an app gives for a request without one."""
    body = b""

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal body
        body += message.get("body", b"")

    kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "server")
    await app({key: scope[key] for key in kept if key in scope} | {"headers": [], "state": {}}, receive, send)
    return body
