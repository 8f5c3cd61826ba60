"""vLLM's plugin entry points: how the parts get into vLLM's processes, however it was started.

``vllm.general_plugins`` → ``register``, in every process: workers get our methods.
``vllm.endpoint_plugins`` → ``Endpoints``, in the API server: our routes, and the layer in front of vLLM's.
Both act only if ``VLLM_PLUGINS`` names ``nest_runtime``. ``nest-runtime serve --engine vllm`` sets it. For a vLLM
started by its own command, settings come from the environment (``config_from``).
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from nest_runtime.errors import UsageError
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.limits import Allowed, Limits
from nest_runtime.serve.vllm.slots import BASE_NAME, PLUGIN

EXTENSION = "nest_runtime.serve.vllm.worker.PatchExtension"

log = logging.getLogger("nest_runtime.serve.vllm")

Started = Callable[[Any, Any], Awaitable[None]]


class PluginPlan:
    """What ``nest-runtime serve`` asks of the plugin in its own process; nothing, where vLLM was started otherwise.

    Attributes:
        config: how to serve.
        on_start: called with the server and the app once patches are on, before anybody is answered.
        on_stop: called when the app ends.
    """

    config: ServeConfig | None = None
    on_start: Started | None = None
    on_stop: Callable[[], Awaitable[None]] | None = None


PLAN = PluginPlan()


def register() -> None:
    """Give workers our methods; called by vLLM in every process, more than once."""
    if not named(os.environ.get("VLLM_PLUGINS")):
        return
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # who asks is for http/clients.py to say, and not for uvicorn
    from vllm.engine.arg_utils import EngineArgs

    from nest_runtime.serve.vllm.packing import keep_weights

    keep_weights()
    original = EngineArgs.create_engine_config
    if getattr(original, "nest_runtime", False):
        return

    def create_engine_config(self: Any, *arguments: Any, **settings: Any) -> Any:
        """The engine's configuration, with our extension of its workers."""
        if self.worker_extension_cls not in ("", EXTENSION):
            raise UsageError(
                f"the workers' extension is {self.worker_extension_cls}; patches need {EXTENSION}",
                "leave --worker-extension-cls out, or nest_runtime out of VLLM_PLUGINS",
            )
        self.worker_extension_cls = EXTENSION
        return original(self, *arguments, **settings)

    create_engine_config.nest_runtime = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def named(plugins: str | None) -> bool:
    """Whether ``VLLM_PLUGINS`` asks for us."""
    return plugins is not None and PLUGIN in [plugin.strip() for plugin in plugins.split(",")]


class Endpoints:
    """vLLM's endpoint plugin: attaches the layer, and puts the first patch on before the server listens."""

    name = PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._outer: dict[str, Any] = {}

    def attach_router(self, app: Any) -> None:
        """Put our layer around vLLM's routes; it is filled in ``init_state``, before anybody can ask."""
        app.add_middleware(_Outer, parts=self._outer)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Build the server, and put the patch on. What raises ends vLLM's start."""
        from nest_runtime.serve.vllm.build import asgi_app, build

        config = PLAN.config or config_from(args, os.environ)
        check_arguments(args)
        server = await build(config, engine_client, state.openai_serving_models)
        active = await server.start()
        if active.key is None and PLAN.on_start is None:
            log.warning("no patch is active: answers come from the bare base model")
        self._outer |= {"server": server, "make": lambda app: asgi_app(server, app)}
        if PLAN.on_start is not None:
            await PLAN.on_start(server, state)


class _Outer:
    """The middleware: ours once it is built; the lifespan passes through, and ends the server."""

    def __init__(self, app: Any, parts: dict[str, Any]) -> None:
        self._app = app
        self._parts = parts
        self._made: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self._made = self._made or self._parts["make"](self._app)
            await self._made(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, self._ending(send))
        else:  # realtime sessions would answer past the table of patches
            await send({"type": "websocket.close", "code": 1008})

    def _ending(self, send: Any) -> Any:
        async def ending(message: Any) -> None:
            """Stop what is ours before vLLM hears that the lifespan has ended."""
            if message["type"].startswith("lifespan.shutdown"):
                await self._parts["server"].stop()
                if PLAN.on_stop is not None:
                    await PLAN.on_stop()
            await send(message)

        return ending


def check_arguments(args: Namespace) -> None:
    """Raise UsageError for what would answer, or name the model, past the table of patches."""
    if args.served_model_name != [BASE_NAME]:
        raise UsageError(
            f"the engine serves the model as {args.served_model_name or args.model!r}",
            f"give --served-model-name {BASE_NAME}: clients are given the model's own name by nest-runtime",
        )


def switch_of(environ: Mapping[str, str], key: str) -> bool:
    """Whether a variable switches something on; unset and empty mean off. Raises UsageError for any other word."""
    word = environ.get(key, "").strip().lower()
    if word in ("1", "true", "yes", "on", "y", "t"):
        return True
    if word in ("", "0", "false", "no", "off", "n", "f"):
        return False
    raise UsageError(f"{key} is {environ[key]!r:.60}; expected true or false", "write 1 or 0")


def config_from(args: Namespace, environ: Any) -> ServeConfig:
    """The settings of a vLLM that was started the ordinary way.

    Args:
        args: vLLM's own; its model, host, port and limits count.
        environ: ``NEST_PATCH``, ``NEST_EXPOSE`` (versions, with commas between), ``NEST_EXPOSE_BASE`` (a switch),
            ``NEST_ADMIN_TOKEN_FILE``, ``NEST_API_KEY_FILE``, ``NEST_AUDIT_FILE``, ``NEST_TRUST`` (files, with commas),
            ``NEST_REQUIRE_SIGNATURE`` (a switch), ``NEST_SWAP_POLICY``, ``NEST_TRUSTED_PROXY`` (addresses, commas),
            ``NEST_ALLOW`` (of completions, prefill and special-tokens, with commas).

    Raises:
        UsageError: values make no sense.
    """

    def path(key: str) -> Path | None:
        return Path(environ[key]) if environ.get(key) else None

    def parts(key: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in environ.get(key, "").split(",") if part.strip())

    revision = f"@{args.revision}" if getattr(args, "revision", None) else ""
    return ServeConfig(
        model=f"{args.model}{revision}",
        engine="vllm",
        patch=environ.get("NEST_PATCH") or None,
        expose=parts("NEST_EXPOSE"),
        expose_base=switch_of(environ, "NEST_EXPOSE_BASE"),
        host=args.host or "0.0.0.0",
        port=args.port,
        admin_token_file=path("NEST_ADMIN_TOKEN_FILE"),
        api_key_file=path("NEST_API_KEY_FILE"),
        audit_file=path("NEST_AUDIT_FILE"),
        trust=tuple(Path(part) for part in parts("NEST_TRUST")),
        require_signature=switch_of(environ, "NEST_REQUIRE_SIGNATURE"),
        swap_policy=environ.get("NEST_SWAP_POLICY") or "drain",
        trusted_proxies=parts("NEST_TRUSTED_PROXY"),
        allowed=_allowed(parts("NEST_ALLOW")),
        trust_remote_code=bool(args.trust_remote_code),
        limits=Limits(running=args.max_num_seqs or Limits().running, drain_seconds=float(args.shutdown_timeout or 30)),
    )


def _allowed(names: tuple[str, ...]) -> Allowed:
    known = {"completions", "prefill", "special-tokens"}
    if unknown := sorted(set(names) - known):
        raise UsageError(f"NEST_ALLOW names {unknown[0]!r}", f"give some of {', '.join(sorted(known))}")
    return Allowed(**{name.replace("-", "_"): True for name in names})
