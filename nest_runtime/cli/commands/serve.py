"""The command serve: an OpenAI-compatible server with one patch active. The server itself is in serve/."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands.trust import DowngradeOption, PolicyOption, RequireOption, TrustOption
from nest_runtime.cli.common import examples, model_for, source_of
from nest_runtime.cli.options import Flags, with_flags
from nest_runtime.cli.output import DeviceOption, DtypeOption, ModelOption, Output
from nest_runtime.errors import UsageError
from nest_runtime.serve.config import ServeConfig

VARIABLES = "NEST_SERVE"  # begins the names of the options' environment variables
# Settings whose options are those of other commands too.
SHARED = (
    *("model", "device", "dtype", "json"),
    *("trust", "require_signature", "trust_policy", "allow_downgrade"),
)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "serve",
        rich_help_panel="Run",
        epilog=examples(
            "nest-runtime serve --patch v3",
            "nest-runtime serve org/name --patch v1",
            "nest-runtime serve --patch v3 --expose v2 --expose-base --port 8080",
            "nest-runtime serve --trust nest.pub --require-signature",
            "nest-runtime serve --follow hf://my-org/my-safety@stable --every 60s",
            "nest-runtime serve --admin-token-file token --admin-port 8001",
            "nest-runtime serve --engine vllm --model org/name --patch v3",
        ),
        context_settings={"auto_envvar_prefix": VARIABLES},  # --max-queue is NEST_SERVE_MAX_QUEUE
    )(with_flags(serve))


def serve(
    ctx: typer.Context,
    *,
    model_named: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", autocompletion=complete.models, help="The same as --model."),
    ] = None,
    model: ModelOption = "reference",
    settings: Annotated[Mapping[str, Any], Flags(ServeConfig, apart=SHARED)],
    trust: TrustOption = None,
    require_signature: RequireOption = False,
    trust_policy: PolicyOption = None,
    allow_downgrade: DowngradeOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", envvar="NEST_SERVE_JSON", help="Print events on stdout, one JSON line each.")
    ] = False,
) -> None:
    """Serve a model with a safety patch, with OpenAI's API.

    It says when it is ready. Ctrl-C lets running requests end, then stops. Every option has an environment
    variable: NEST_SERVE_MAX_QUEUE=64 is --max-queue 64.
    """
    out = Output.of(ctx, as_json)
    for unknown in unknown_variables(ctx.command, os.environ):
        out.note(f"warning: {unknown}")
    config = ServeConfig(
        model=_model_named(ctx, model_named, model) or model_for(ctx, out, model, settings["patch"]),
        json=as_json,
        device=device,
        dtype=dtype,
        trust=tuple(trust or ()),
        require_signature=require_signature,
        trust_policy=trust_policy,
        allow_downgrade=allow_downgrade,
        **settings,
    )
    from nest_runtime.serve.ports import bind, bind_admin

    with contextlib.closing(bind(config)), bind_admin(config):
        pass  # a taken port is told at once, and not after torch was imported
    from nest_runtime.serve.events import json_events
    from nest_runtime.serve.server import serve as run_server

    silent = out.quiet and not as_json
    on_event = json_events(out.event) if as_json else (lambda event: None) if silent else None
    if config.engine == "vllm":
        from nest_runtime.serve.vllm.server import serve as run_vllm

        run_vllm(config, on_event=on_event)
    else:
        run_server(config, on_event=on_event)


def _model_named(ctx: typer.Context, named: str | None, option: str) -> str | None:
    """The model given as an argument, or None. Raises UsageError if --model names another one."""
    if named is not None and named != option and source_of(ctx, "model") == "COMMANDLINE":
        raise UsageError(f"two models are named: {named} and --model {option}", "name one")
    return named


def unknown_variables(command: Any, environment: Mapping[str, str]) -> list[str]:
    """Of the variables that look like options of this command, those that are none, each with the nearest that is."""
    known = [option.name.upper() for option in command.params if option.name]
    begins = f"{VARIABLES}_"
    given = {name.removeprefix(begins) for name in environment if name.startswith(begins)}
    found = []
    for name in sorted(given - set(known)):
        nearest = difflib.get_close_matches(name, known, n=1)
        found.append(f"{begins}{name} is no option{f'; did you mean {begins}{nearest[0]}?' if nearest else ''}")
    return found
