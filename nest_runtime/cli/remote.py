"""The store's commands on a running server (``--url``), and what they say of servers that run beside the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import examples, source_of
from nest_runtime.cli.output import JsonOption, Output
from nest_runtime.escape import short

if TYPE_CHECKING:
    from nest_runtime.serve.client import AdminClient
    from nest_runtime.store.entries import Entry

UrlOption = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Ask the server that runs there, not the local store.")
]
TokenOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="With --url: the server's admin token file.")
]
SwapOption = Annotated[
    str | None,
    typer.Option(
        "--swap-policy",
        metavar="drain|enforce",
        autocompletion=complete.swap_policies,
        help="With --url: what becomes of requests in flight; the server's own by default.",
    ),
]
Loaded = Annotated[
    str,
    typer.Argument(metavar="PATCH", autocompletion=complete.patches, help="v3, name@v3, sha256:HEX, a file, hf://…"),
]
MAX_ENTRIES = 10_000  # of an audit log, that a server gives at once
_ANYWHERE = ("url", "token_file", "swap_policy", "as_json", "patch", "last", "verify")


def register(app: typer.Typer) -> None:
    """Add the command that only a running server has."""
    app.command(
        "load",
        rich_help_panel="Local store",
        epilog=examples("nest-runtime load v3 --url http://127.0.0.1:8000 --token-file admin.token"),
    )(load)


def load(
    ctx: typer.Context,
    patch: Loaded,
    url: UrlOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a running server load and verify a patch, without switching to it."""
    from nest_runtime.errors import UsageError

    out, server = Output.of(ctx, as_json), server_of(ctx, url, token_file)
    if server is None:
        raise UsageError(
            "load is for a running server, and no --url is given",
            f"give --url and --token-file; `nest-runtime add {patch}` keeps a patch in the local store",
        )
    row = server.load(as_seen_there(patch, server.url))
    out.result(row, lambda: out.line(f"loaded on {server.url}: {row['label']} ({short(row['digest'])})"))


def server_of(ctx: typer.Context, url: str | None, token_file: Path | None) -> AdminClient | None:
    """The server that ``--url`` names; None if the command is about the local store.

    Raises:
        UsageError: options do not go together; nothing has been asked then.
    """
    from nest_runtime.errors import UsageError
    from nest_runtime.io import expand
    from nest_runtime.serve.client import AdminClient, read_token

    if url is None:
        for option, name in (("token_file", "--token-file"), ("swap_policy", "--swap-policy")):
            if ctx.params.get(option) is not None:
                raise UsageError(f"{name} is given without --url", "say which server: --url http://HOST:PORT")
        return None
    local = [name for name in ctx.params if name not in _ANYWHERE and source_of(ctx, name) not in ("", "DEFAULT")]
    if local:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in local)
        raise UsageError(f"{names} and --url exclude each other", "the server decides with its own options")
    if token_file is None:
        raise UsageError("--url is given without --token-file", "give the server's admin token file")
    return AdminClient(url, read_token(expand(token_file)))


def as_seen_there(ref: str, url: str) -> str:
    """A reference as a server reads it: a file of this machine by its whole path, where the server is here too."""
    from urllib.parse import urlsplit

    from nest_runtime.addresses import is_loopback
    from nest_runtime.io import expand
    from nest_runtime.store.entries import is_path, is_repository

    here = is_path(ref) or (is_repository(ref) and "://" not in ref)
    return os.path.abspath(expand(ref)) if here and is_loopback(urlsplit(url).hostname or "") else ref


def show_switch(out: Output, server: AdminClient, done: dict[str, Any]) -> None:
    """Say what a server has switched to."""
    was = "" if done["previous"] == done["active"] else f", was {done['previous']}"
    replaced = f"; {done['replaced']} requests began again or ended" if done.get("replaced") else ""
    text = f"active on {server.url}: {done['active']} ({short(done['digest'])}){was}{replaced}"
    out.result(done, lambda: out.line(text))


def show_patches(out: Output, server: AdminClient) -> None:
    """List what a server has loaded, and where its store has parted from it."""
    found = server.patches()

    def render() -> None:
        """The server's patches in a table, and whether its store agrees."""
        rows = [
            (
                "*" if row["active"] else " ",
                row["label"],
                f"{row['name']}@{row['version']}",
                row["digest"][:15],
                row["in_flight"],
                "exposed" if row["exposed"] else "",
            )
            for row in found["patches"]
        ]
        if rows:
            out.table(("", "LABEL", "PATCH", "DIGEST", "IN FLIGHT", ""), rows, right=("IN FLIGHT",), whole_in_pipe=True)
        out.note(f"* active on {server.url}" if found["active"] != "base" else "the bare base answers")
        store = found.get("store") or {}
        if store.get("active") and not store["agrees"]:
            out.note(
                f"its store names {store['active']} as active"
                + ("" if store["followed"] else "; the server was started with --patch, and does not follow it")
            )

    out.result(found, render)


def show_audit(out: Output, server: AdminClient, last: int, verify: bool) -> None:
    """Show what the server's audit log has of changes and refusals: not of calls that only read, nor of intents.

    Raises:
        StoreError: ``verify`` is asked for, and the chain is broken.
    """
    from nest_runtime.errors import StoreError

    found = server.audit(MAX_ENTRIES)
    entries = [entry for entry in found["entries"] if entry.get("what") not in ("call", "intent")][-last:]
    if verify and not found["verified"]:
        raise StoreError(f"the audit log of {server.url} does not verify", "its server's log says which line is wrong")

    def render() -> None:
        """The entries in a table, the reason of a refusal as its outcome."""
        rows = [
            (
                str(entry.get("at", ""))[:19].replace("T", " "),
                entry.get("who", ""),
                entry.get("what", ""),
                entry.get("version") or entry.get("ref") or entry.get("path") or "",
                "done" if entry.get("done") else entry.get("reason") or entry.get("error") or "",
            )
            for entry in entries
        ]
        if rows:
            out.table(
                ("WHEN (UTC)", "WHO", "WHAT", "PATCH", "OUTCOME"),
                rows,
                whole=("WHEN (UTC)", "WHAT"),
                whole_in_pipe=True,
            )
        else:
            out.note("nothing has happened on this server yet")
        if verify:
            out.line(f"the audit log of {server.url} is whole")

    out.result({**found, "entries": entries}, render)


def servers_beside(entry: Entry | None, model_hash: str | None = None) -> list[dict[str, Any]]:
    """The servers of this store that run now, and what each answers with.

    Args:
        entry: only those that answer with another patch of its model.
        model_hash: only those of this model.
    """
    from nest_runtime.serve.client import answering
    from nest_runtime.serve.running import running

    found = []
    for note in running(entry.base_hash if entry is not None else model_hash):
        said = answering(note.url)
        if entry is None or said is None or said[1] != entry.digest:
            found.append({**vars(note), "patch": None if said is None else said[0]})
    return found


def warn_of_servers(out: Output, servers: list[dict[str, Any]], command: str) -> None:
    """Say which servers keep their patch, and how to switch them too.

    Args:
        out: where.
        servers: from ``servers_beside``.
        command: what switches a server, without its options: ``activate v3``.
    """
    for server in servers:
        now = f"answers with {server['patch']}" if server["patch"] else "does not say what it answers with"
        out.note(f"warning: the server at {server['url']} (process {server['pid']}) {now}, and is not switched by this")
        if server["admin_url"]:
            out.note(f"to switch it: nest-runtime {command} --url {server['admin_url']} --token-file FILE")
        elif server["follows_store"]:
            out.note("it takes the store's patch when it is started again; its admin API is off")
        else:
            out.note("it was started with --patch, and its admin API is off: start it with another")
