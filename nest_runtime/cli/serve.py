"""The command serve: an OpenAI-compatible server with one patch active. The server itself is in serve/."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import examples, model_for, seconds_of
from nest_runtime.cli.output import DeviceOption, DtypeOption, ModelOption, Output
from nest_runtime.cli.trust import DowngradeOption, PolicyOption, RequireOption, TrustOption


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
        context_settings={"auto_envvar_prefix": "NEST_SERVE"},  # --max-queue is NEST_SERVE_MAX_QUEUE
    )(serve)


def serve(
    ctx: typer.Context,
    model_named: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", autocompletion=complete.models, help="The same as --model."),
    ] = None,
    model: ModelOption = "reference",
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch",
            metavar="PATCH",
            autocompletion=complete.patches,
            help="The patch that answers; the store's active one by default.",
        ),
    ] = None,
    expose: Annotated[
        list[str] | None,
        typer.Option(
            "--expose",
            metavar="PATCH",
            autocompletion=complete.patches,
            help="Let clients name this patch too, as NAME@v2.",
        ),
    ] = None,
    expose_base: Annotated[
        bool, typer.Option("--expose-base", help="Let clients name the bare base, as NAME@base.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="transformers|generate|vllm",
            autocompletion=complete.engines,
            help="What computes the answers.",
        ),
    ] = "transformers",
    engine_args: Annotated[
        str, typer.Option("--engine-args", metavar="'ARGS'", help="More of vLLM's own arguments, in one string.")
    ] = "",
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 takes a free one.")] = 8000,
    admin_token_file: Annotated[
        Path | None,
        typer.Option("--admin-token-file", metavar="FILE", help="Tokens, one a line; switches the admin API on."),
    ] = None,
    admin_host: Annotated[
        str | None, typer.Option("--admin-host", metavar="HOST", help="Where --admin-port listens: 127.0.0.1.")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            "--admin-port", metavar="PORT", min=0, max=65535, help="Answer the admin API here, and nowhere else."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line; clients must send one.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", metavar="KEY", help="A key that clients may send; others on this machine can see it."
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option("--ssl-certfile", metavar="FILE", help="Speak TLS, with this certificate and its chain (PEM)."),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option("--ssl-keyfile", metavar="FILE", help="Its private key, where it is not in the same file."),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxy", metavar="ADDRESS", help="A proxy's address or network whose X-Forwarded-For counts."
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option("--served-name", metavar="NAME", help="What clients call the model; its own name by default."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", metavar="URL", help="Let pages of this site ask from a browser; * for all."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host", metavar="NAME", help="A name of this machine's that a proxy here hands on, as loopback."
        ),
    ] = None,
    swap_policy: Annotated[
        str,
        typer.Option(
            "--swap-policy",
            metavar="drain|enforce",
            autocompletion=complete.swap_policies,
            help="At a switch: let requests in flight end under the old patch, or begin them again under the new one.",
        ),
    ] = "drain",
    max_running: Annotated[
        int, typer.Option("--max-running", metavar="N", min=1, help="Sequences in one batch of the engine.")
    ] = 64,
    max_queue: Annotated[
        int, typer.Option("--max-queue", metavar="N", min=0, help="Requests that may wait; more get 429.")
    ] = 256,
    max_body: Annotated[
        int, typer.Option("--max-body", metavar="BYTES", min=1, help="Bytes of a request's body; more get 413.")
    ] = 4 * 1024 * 1024,
    max_values: Annotated[
        int, typer.Option("--max-values", metavar="N", min=1, help="Values in the lists and objects of a body.")
    ] = 131_072,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", metavar="N", min=1, help="Tokens of a prompt; the context's.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="New tokens of an answer; what is left.")
    ] = None,
    max_choices: Annotated[
        int, typer.Option("--max-choices", metavar="N", min=1, help="Answers to one request: prompts times n.")
    ] = 32,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", metavar="SECONDS", help="For one request; then 504.")
    ] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", metavar="SECONDS", help="For what runs when the server is stopped.")
    ] = 30.0,
    max_connections: Annotated[
        int | None,
        typer.Option("--max-connections", metavar="N", min=1, help="Of clients; by the open files that are allowed."),
    ] = None,
    header_timeout: Annotated[
        float, typer.Option("--header-timeout", metavar="SECONDS", help="For the head of a request to come whole.")
    ] = 10.0,
    idle_timeout: Annotated[
        float, typer.Option("--idle-timeout", metavar="SECONDS", help="For a client to ask again, or take its answer.")
    ] = 30.0,
    cache_tokens: Annotated[
        int | None,
        typer.Option("--cache-tokens", metavar="N", min=1, help="Tokens whose keys and values are kept; by the model."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", metavar="N", min=1, help="Tokens in one pass of the model.")
    ] = 512,
    allow_completions: Annotated[
        bool,
        typer.Option("--allow-completions", help="Answer /v1/completions, which goes around the chat template."),
    ] = False,
    allow_prefill: Annotated[
        bool, typer.Option("--allow-prefill", help="Take conversations that end with the assistant's turn.")
    ] = False,
    allow_special_tokens: Annotated[
        bool, typer.Option("--allow-special-tokens", help="Read control tokens in prompts as such, and not as text.")
    ] = False,
    allow_json_schema: Annotated[
        bool, typer.Option("--allow-json-schema", help="Let clients hold answers to a JSON schema (response_format).")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", min=1, help="Tokens of a prompt and its answer; what the model holds."),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what clients ask into the log.")] = False,
    audit_file: Annotated[
        Path | None,
        typer.Option("--audit-file", metavar="FILE", help="The audit log; $NEST_HOME/audit.jsonl by default."),
    ] = None,
    trust: TrustOption = None,
    require_signature: RequireOption = False,
    trust_policy: PolicyOption = None,
    allow_downgrade: DowngradeOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    follow: Annotated[
        str | None,
        typer.Option("--follow", metavar="REPO@CHANNEL", help="Keep to what a channel names: hf://org/repo@stable."),
    ] = None,
    every: Annotated[str, typer.Option("--every", metavar="TIME", help="How often to look: 30s, 5m.")] = "60s",
    gate_probes: Annotated[
        Path | None,
        typer.Option(
            "--gate-probes", metavar="FILE", help='JSON: {"harmful": […], "benign": […]}; built-in by default.'
        ),
    ] = None,
    gate_min_refused: Annotated[
        float, typer.Option("--gate-min-refused", min=0, max=1, help="Share of harmful probes a new patch must refuse.")
    ] = 0.75,
    gate_max_refused: Annotated[
        float, typer.Option("--gate-max-refused", min=0, max=1, help="Share of benign probes it may refuse.")
    ] = 0.25,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Switch to followed patches without trying them.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", envvar="NEST_SERVE_JSON", help="Print events on stdout, one JSON line each.")
    ] = False,
) -> None:
    """Serve a model with a safety patch, with OpenAI's API.

    It says when it is ready. Ctrl-C lets running requests end, then stops. Every option has an environment
    variable: NEST_SERVE_MAX_QUEUE=64 is --max-queue 64.
    """
    out = Output.of(ctx, as_json)
    from nest_runtime.serve.config import Allowed, FollowConfig, Limits, ServeConfig
    from nest_runtime.serve.events import json_events
    from nest_runtime.serve.server import serve as run_server

    following = None
    if follow is not None:
        following = FollowConfig(
            follow,
            every=seconds_of(every, "--every"),
            gate=not no_gate,
            probes=gate_probes,
            min_refused=gate_min_refused,
            max_refused=gate_max_refused,
        )
    config = ServeConfig(
        model=_model_named(ctx, model_named, model) or model_for(ctx, out, model, patch),
        patch=patch,
        expose=tuple(expose or ()),
        expose_base=expose_base,
        host=host,
        port=port,
        admin_token_file=admin_token_file,
        admin_host=admin_host,
        admin_port=admin_port,
        api_key_file=api_key_file,
        api_keys=tuple(api_key or ()),
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        served_name=served_name,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        swap_policy=swap_policy,  # type: ignore[arg-type]  # checked there
        log_prompts=log_prompts,
        max_queue=max_queue,
        limits=Limits(
            running=max_running,
            max_body_bytes=max_body,
            max_values=max_values,
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            max_choices=max_choices,
            request_seconds=request_timeout,
            drain_seconds=drain_timeout,
            cache_tokens=cache_tokens,
            batch_tokens=batch_tokens,
            connections=max_connections,
            header_seconds=header_timeout,
            idle_seconds=idle_timeout,
            context=context,
        ),
        allowed=Allowed(allow_completions, allow_prefill, allow_special_tokens, allow_json_schema),
        json=as_json,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        trusted_proxies=tuple(trusted_proxy or ()),
        audit_file=audit_file,
        trust=tuple(trust or ()),
        require_signature=require_signature,
        trust_policy=trust_policy,
        allow_downgrade=allow_downgrade,
        follow=following,
        engine=engine,
        engine_args=engine_args,
    )
    silent = out.quiet and not as_json
    on_event = json_events(out.event) if as_json else (lambda event: None) if silent else None
    if config.engine == "vllm":
        from nest_runtime.serve.vllm.server import serve as run_vllm

        run_vllm(config, on_event=on_event)
    else:
        run_server(config, on_event=on_event)


def _model_named(ctx: typer.Context, named: str | None, option: str) -> str | None:
    """The model that stands on the line by itself, or None. Raises UsageError where --model names another one."""
    from nest_runtime.errors import UsageError

    source = ctx.get_parameter_source("model")
    if named is not None and named != option and source is not None and source.name == "COMMANDLINE":
        raise UsageError(f"two models are named: {named} and --model {option}", "name one")
    return named
