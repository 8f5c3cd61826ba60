"""Puts the parts of one server together, from a configuration to an ASGI app. Opens no port, prints nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from nest_runtime import __version__
from nest_runtime.addresses import is_loopback, networks_of
from nest_runtime.errors import HubError, NestError, TrustError, UsageError
from nest_runtime.hub.follow import follow_ref
from nest_runtime.io import nest_home
from nest_runtime.model.load import load_model
from nest_runtime.prompts.control import controls
from nest_runtime.prompts.generate import end_token_ids
from nest_runtime.resolve import load_patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.engine import Engine, TokenEngine
from nest_runtime.serve.following.follow import Following
from nest_runtime.serve.http.access import Access, Secrets
from nest_runtime.serve.http.admin import admin_routes
from nest_runtime.serve.http.api import Service, probes, routes
from nest_runtime.serve.http.connections import ADMIN, Crowd, clients_share, descriptors
from nest_runtime.serve.http.grammar import Grammars
from nest_runtime.serve.http.middleware import RequestFrame
from nest_runtime.serve.http.pages import pages
from nest_runtime.serve.http.problems import install
from nest_runtime.serve.http.service import E_co
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.pools import Pool, apart
from nest_runtime.serve.requests.sampling import SamplingParams
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.switching.broken import Broken
from nest_runtime.serve.switching.table import PatchTable, ServedPatch, Switch
from nest_runtime.serve.tokens import AccessTokens, read_tokens
from nest_runtime.serve.transformers.engine import TransformersEngine
from nest_runtime.serve.transformers.own_rules import not_honoured, own_rules
from nest_runtime.serve.transformers.tryout import Tryout
from nest_runtime.store.entries import is_repository
from nest_runtime.store.history import actor
from nest_runtime.store.store import Store
from nest_runtime.trust.guard import Guard, guard_for

SELFCHECK_TEXT = "One two three four five six seven eight nine ten, and so on to a hundred."

log = logging.getLogger("nest_runtime.serve.server")


@dataclass
class Server(Generic[E_co]):
    """A loaded model with its engine, patches and app; ``start`` and ``stop`` it on one event loop.

    ``crowd`` are the clients' connections, ``admin_crowd`` those of a listener that is the admin API's own.
    """

    config: ServeConfig
    service: Service[E_co]
    audit: AuditLog
    secrets: Secrets
    following: Following | None = None
    crowd: Crowd = field(init=False)
    admin_crowd: Crowd = field(init=False)
    _rereading: Pool = field(default_factory=lambda: Pool("reread", 1), init=False)

    def __post_init__(self) -> None:
        limits, most = self.config.limits, descriptors()
        if limits.connections is not None and most is not None and limits.connections >= most:
            raise UsageError(
                f"{limits.connections} connections are to be taken, and the system lets this process open {most} files",
                "allow more with `ulimit -n`, or give a lower --max-connections",
            )
        times = (limits.header_seconds, limits.idle_seconds, limits.idle_seconds)
        self.crowd = Crowd(limits.connections or clients_share(most), *times)
        self.admin_crowd = Crowd(ADMIN, *times)

    async def start(self) -> ServedPatch:
        """Load the patches and start the engine; returns the active patch.

        If the store's active patch is not trusted any more, the followed channel's replaces it.

        Raises:
            NestError: a patch cannot be loaded. Then nothing is served, and never the bare base.
        """
        table, config = self.service.table, self.config
        table.home, starting = asyncio.get_running_loop(), Pool("start", 1)
        if config.engine == "transformers" and not config.allowed.special_tokens:
            # Now, so that the first prompt that spells a control token does not wait for it.
            await starting.run(controls(self.service.tokenizer).reader.prepare)
        first = await starting.run(_first_patch, config, table, Store())
        who = f"server start by {actor()}"
        if first is not None:
            try:
                await table.activate(first, who)
            except TrustError as error:
                if self.following is None or config.patch is not None:
                    raise
                log.warning("not started with the store's patch: %s", error)
        if self.following is not None:
            outcome = await self.following.first()
            if table.active.key is None:
                raise outcome.error or HubError(f"{config.follow} gave no patch", "start with --patch as well")
        for ref in config.expose:
            table.expose(await table.load(ref, who))
        if config.expose_base:
            table.expose(table.base)
        await self.service.engine.start()
        table.engine_control = self.service.engine
        if self.following is not None:
            self.following.start()
        return table.active

    async def stop(self) -> None:
        """Drain, then end the engine."""
        if self.following is not None:
            await self.following.stop()
        await self.service.engine.stop(self.config.limits.drain_seconds)

    async def reread(self) -> list[str]:
        """Read key files, token files and the trust policy again; returns what an operator should know.

        Raises:
            UsageError: a file is wrong; the old values stay in force.
        """
        table, config = self.service.table, self.config
        api_keys, admin = await self._rereading.run(secrets_of, config)
        guard = await self._rereading.run(guard_of, config, Store())
        if (guard is None) != (table.guard is None) and (guard is None or self.following is not None):
            raise UsageError(
                f"the trust policy {'is gone' if guard is None else 'is new, and a channel is followed without one'}",
                "restart the server if that is meant",
            )
        if guard is not None and table.guard is not None:
            table.guard.policy = guard.policy  # in place: the follower holds the same guard
        else:
            table.guard = guard
        self.secrets.api_keys, self.secrets.admin = api_keys, admin
        event = {"what": "reload", "who": f"signal to {actor()}", "done": True}
        await self._rereading.run(self.audit.record, event)
        return await table.recheck()


def build(config: ServeConfig) -> Server[TransformersEngine]:
    """Load the model and build everything around it, in a thread of its own (pools.apart). Raises NestError."""
    return apart("build", _build, config)


def _build(config: ServeConfig) -> Server[TransformersEngine]:
    api_keys, admin = secrets_of(config)
    store = Store()
    guard = guard_of(config, store)
    check_refs(config, store)
    loaded = load_model(
        config.model, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
    name = config.served_name or loaded.name
    audit = AuditLog(config.audit_file or nest_home() / "audit.jsonl")
    table = PatchTable(
        runtime,
        name,
        loaded.hash,
        store,
        audit,
        guard=guard,
        follows_store=config.patch is None,
        policy=config.swap_policy,
    )
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    own = loaded.model.generation_config
    for name in not_honoured(own):
        log.warning("the model's generation config asks for %s, which answers here do without", name)
    engine = TransformersEngine(
        loaded.model,
        runtime,
        config.limits,
        config.max_queue,
        ends=ends,
        rules=own_rules(own, ends, loaded.model.device),
        kind=config.engine,
        text=loaded.tokenizer(SELFCHECK_TEXT, add_special_tokens=False)["input_ids"] or [0],
    )
    service = Service(
        engine,
        table,
        loaded.tokenizer,
        config.limits,
        Metrics(),
        defaults=sampling_defaults(loaded.model),
        max_new_tokens=getattr(loaded.model.generation_config, "max_new_tokens", None),
        log_prompts=config.log_prompts,
        allowed=config.allowed,
        grammars=Grammars(loaded.tokenizer, engine.rows, ends),
    )
    measure(service, name, loaded.hash)
    table.loader.tryout = Tryout(loaded.model, runtime, loaded.tokenizer, engine.beside)
    engine.on_blame = Broken(table, service.metrics).blamed
    following = None
    if config.follow is not None:
        following = Following(config.follow, service, store, audit, guard, model_name=loaded.name)
        service.following = following.state
    return Server(config, service, audit, Secrets(api_keys, admin), following)


def sampling_defaults(model: Any) -> SamplingParams:
    """The model's own sampling settings: greedy unless its generation config says ``do_sample``."""
    config = model.generation_config
    if config is None or not config.do_sample:
        return SamplingParams()
    return SamplingParams(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or None,
        min_p=config.min_p or 0.0,
    )


def asgi_app(server: Server[TokenEngine]) -> ASGIApp:
    """What clients are answered, and operators unless they have a listener of their own.

    Ending it (ASGI lifespan) stops the server.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await server.stop()

    admin_here = server.config.admin_token_file is not None and server.config.admin_address is None
    watch, crowd = server.service.metrics.watch, server.crowd
    watch("nest_connections", "Connections of clients.", lambda: crowd.open)
    watch("nest_connections_limit", "Connections that clients may have.", lambda: crowd.limit)
    watch("nest_connections_turned_away", "Closed to keep to that limit, so far.", lambda: crowd.turned_away)
    watch("nest_connections_slow", "Closed because their client was slow, so far.", lambda: crowd.slow)
    routers = [routes(server.service), probes(server.service), pages(server.service, keyed=server.config.keyed)]
    if admin_here:
        routers.append(admin_routes(server.service, server.audit))
    return framed(server, fastapi_app(routers, lifespan), server.config.host, admin_here=admin_here)


def admin_app(server: Server[Engine]) -> ASGIApp:
    """What operators are answered on a listener of their own: the admin API and the probes."""
    routers = [admin_routes(server.service, server.audit), probes(server.service)]
    address = server.config.admin_address
    return framed(server, fastapi_app(routers), server.config.host if address is None else address[0], admin_here=True)


def fastapi_app(routers: list[APIRouter], lifespan: Any = None) -> FastAPI:
    """An app of some routes, whose errors have OpenAI's shape; its /docs load nothing from elsewhere."""
    app = FastAPIOffline(
        title="nest-runtime",
        version=__version__,
        description="OpenAI-compatible API; every answer names the safety patch that it was given under.",
        docs_url="/docs",
        redoc_url=None,
        lifespan=lifespan,
    )
    install(app)
    for router in routers:
        app.include_router(router)
    return app


def framed(server: Server[Engine], app: ASGIApp, host: str, *, admin_here: bool) -> ASGIApp:
    """An app behind the access checks of a listener on ``host``, with the patch headers, metrics and log around it."""
    config, service = server.config, server.service
    names = tuple(name.lower() for name in config.allowed_hosts)

    def welcome(name: str) -> bool:
        return is_loopback(name) or name in names

    return RequestFrame(
        app,
        service.table,
        Access(server.secrets, server.audit, admin_here, networks_of(config.trusted_proxies)),
        service.metrics,
        config.limits,
        welcome=welcome if is_loopback(host) else None,
        origins=config.cors_origins,
    )


def _first_patch(config: ServeConfig, table: PatchTable, store: Store) -> str | None:
    """The reference of the patch to start with: the one asked for, else the store's active one."""
    if config.patch is not None:
        return config.patch
    entry = store.active(table.model_hash)
    return None if entry is None else entry.digest


def guard_of(config: ServeConfig, store: Store) -> Guard | None:
    """Who decides which patches are trusted, as the configuration says."""
    return guard_for(
        store,
        config.trust,
        require_signature=config.require_signature,
        policy_file=config.trust_policy,
        allow_downgrade=config.allow_downgrade,
    )


def check_refs(config: ServeConfig, store: Store) -> None:
    """See that what the configuration names is there, as far as it can be said without model and network.

    Raises:
        UsageError: what is to be followed is no channel of a repository.
        NestError: there is no such patch, for any model, or its file cannot be read.
    """
    if config.follow is not None:
        follow_ref(config.follow.ref)
    for ref in (config.patch, *config.expose):
        if ref is not None and not is_repository(ref):
            with suppress(UsageError):  # several models have one called so; which is meant is known with the model
                load_patch(ref, store=store)


def secrets_of(config: ServeConfig) -> tuple[AccessTokens | None, AccessTokens | None]:
    """API keys and admin tokens, read from their files. Raises UsageError."""
    api_keys = None if config.api_key_file is None else read_tokens(config.api_key_file, "API key file")
    if config.api_keys:
        api_keys = AccessTokens((*(api_keys.secrets if api_keys else ()), *config.api_keys))
    admin = None
    if config.admin_token_file is not None:
        admin = read_tokens(config.admin_token_file, "admin token file", secret=True)
    return api_keys, admin


def measure(service: Service[Engine], model_name: str, model_hash: str) -> None:
    """Let the metrics read the engine and hear of every switch."""
    metrics, engine, table = service.metrics, service.engine, service.table
    metrics.watch("nest_sequences_live", "Sequences running or waiting.", lambda: engine.live)
    metrics.watch("nest_sequences_waiting", "Sequences beyond what one batch takes.", lambda: engine.waiting)
    metrics.watch("nest_queue_capacity", "Sequences that may run or wait; more get 429.", lambda: engine.capacity)
    metrics.watch(
        "nest_patch_folded", "1 while the patch of all that runs stands in the weights.", lambda: engine.folded
    )
    metrics.watch("nest_prompt_tokens_reused", "Prompt tokens found in the cache.", lambda: engine.reused_tokens)
    metrics.watch("nest_failed_passes", "Passes that failed and were dropped.", lambda: engine.failed_passes)
    metrics.watch("nest_engine_alive", "1 while the engine's thread runs.", lambda: engine.alive)
    metrics.server.info({"version": __version__, "model": model_name, "model_hash": model_hash})

    def switched(switch: Switch) -> None:
        metrics.swaps.labels(switch.what).inc()
        metrics.swap_seconds.observe(switch.seconds)
        metrics.active.info({"patch": switch.active.label, "digest": switch.active.digest})

    def refused(what: str, error: NestError) -> None:
        metrics.patch_failures.labels(type(error).__name__).inc()
        if isinstance(error, TrustError):
            metrics.verification_failures.labels(type(error).__name__).inc()

    table.on_switch, table.on_refusal = switched, refused
    metrics.active.info({"patch": table.active.label, "digest": table.active.digest})
