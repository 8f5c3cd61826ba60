"""The command demo: a page in the browser that shows what a patch does and where it acts (demo/)."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.case_options import MaxTokensOption
from nest_runtime.cli.common import examples, model_for, source_of
from nest_runtime.cli.output import DeviceOption, DtypeOption, ModelOption, Output
from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.demo.state import DemoState


FirstPatchOption = Annotated[
    str | None,
    typer.Option(
        "--patch",
        metavar="PATCH",
        autocompletion=complete.patches,
        help="The patch to show first; the active one, else the newest.",
    ),
]
UrlOption = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Ask a running `nest-runtime serve`; load no model.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="With --url: the server's API key.")
]
AdminOption = Annotated[bool, typer.Option("--admin", help="With buttons that activate, roll back, push and pull.")]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--admin-token-file", metavar="FILE", help="With --url and --admin: the server's admin token."),
]
HostOption = Annotated[str, typer.Option("--host", metavar="HOST", help="Where to listen.")]
PortOption = Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 takes a free one.")]
LoginFileOption = Annotated[
    Path | None, typer.Option("--login-file", metavar="FILE", help="Logins, user:password, one a line.")
]
RootPathOption = Annotated[
    str, typer.Option("--root-path", metavar="PATH", help="What a proxy puts before every path, such as /demo.")
]
TrustedHostOption = Annotated[
    list[str] | None,
    typer.Option("--trusted-host", metavar="NAME", help="A name by which a proxy calls it; may be repeated."),
]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
EventsOption = Annotated[bool, typer.Option("--json", help="Print events on stdout, one JSON line each.")]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "demo",
        rich_help_panel="Run",
        epilog=examples(
            "nest-runtime demo",
            "nest-runtime demo --model ./my-model --patch my.safetensors",
            "nest-runtime demo --url http://127.0.0.1:8000",
            "nest-runtime demo --admin",
        ),
    )(demo)


def demo(
    ctx: typer.Context,
    model: ModelOption = "reference",
    patch: FirstPatchOption = None,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
    admin: AdminOption = False,
    admin_token_file: TokenFileOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    login_file: LoginFileOption = None,
    root_path: RootPathOption = "",
    trusted_host: TrustedHostOption = None,
    max_tokens: MaxTokensOption = 128,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    as_json: EventsOption = False,
) -> None:
    """Show in the browser what a patch does and where it acts: chat, patches, neurons, evidence.

    It listens on this machine only unless --host says otherwise, and loads nothing from elsewhere. Ctrl-C ends it.
    """
    out = Output.of(ctx, as_json)
    if url is not None and source_of(ctx, "model") == "COMMANDLINE":  # settings may name a model for other commands
        raise UsageError("--url and --model exclude each other", "the server has its own model; leave --model out")
    _check(url, patch, admin, api_key_file, admin_token_file)
    from nest_runtime.demo.server import Listen, bind, read_logins, serve
    from nest_runtime.demo.start import Source, open_demo, require_gradio

    require_gradio()
    listen = Listen(
        host,
        port,
        read_logins(login_file) if login_file is not None else {},
        key=secrets.token_urlsafe(32) if admin else "",
        root_path=root_path,
        trusted=tuple(trusted_host or ()),
    )
    if not listen.loopback and not listen.logins:
        if admin:
            raise UsageError(
                f"--admin on {host} without a login would let anybody switch patches", "give --login-file as well"
            )
        out.note(f"warning: anybody who reaches {host} may use the demo (see --login-file)")
    model = model if url is not None else model_for(ctx, out, model, patch)
    source = Source(model, patch, url, api_key_file, admin_token_file, device, dtype, trust_remote_code)
    from nest_runtime.cli.commands.hub import quiet_client

    quiet_client(ctx)
    with bind(listen) as taken:
        state = open_demo(source, admin=admin, max_tokens=max_tokens)
        serve(state, listen, taken, lambda place: _ready(out, state, place, listen.key))


def _check(url: str | None, patch: str | None, admin: bool, key: Path | None, token: Path | None) -> None:
    """Refuse options that do not go together. Raises UsageError."""
    if url is not None and patch is not None:
        raise UsageError("--url and --patch exclude each other", "the server knows its patches; choose one in the page")
    for name, value in (("--api-key-file", key), ("--admin-token-file", token)):
        if value is not None and url is None:
            raise UsageError(f"{name} is for servers, and no --url is given", "give --url, or leave it out")
    if token is not None and not admin:
        raise UsageError("--admin-token-file is given without --admin", "give both, or neither")


def _ready(out: Output, state: DemoState, url: str, key: str) -> None:
    first = state.backend.preferred()
    event: dict[str, Any] = {"event": "ready", "url": url, "model": state.backend.name, "admin": state.admin}
    event |= {"patch": first.title if first else "base", "digest": first.digest if first else None}
    link = f"{url}/?token={key}" if key else url
    if out.json:
        out.event(event | ({"link": link} if key else {}))
    else:
        out.line(f"{link}  shows {state.backend.name} {state.backend.place}  (Ctrl-C ends it)")
