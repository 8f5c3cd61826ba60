"""Commands of the local store: list, add, remove, activate, rollback, history, gc."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands.trust import DowngradeOption, PolicyOption, RequireOption, TrustOption
from nest_runtime.cli.common import base_flag, base_hash_of, examples
from nest_runtime.cli.output import JsonOption, Output, size
from nest_runtime.cli.remote import (
    SwapOption,
    TokenOption,
    UrlOption,
    as_seen_there,
    server_of,
    servers_beside,
    show_audit,
    show_patches,
    show_switch,
    warn_of_servers,
)
from nest_runtime.escape import short

if TYPE_CHECKING:
    from nest_runtime.trust.activate import Activated

OnlyModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=complete.models,
        help="Whose patches: a model reference or sha256:HASH. All models' by default.",
    ),
]
Reference = Annotated[
    str, typer.Argument(metavar="PATCH", autocompletion=complete.patches, help="v3, name@v3, or sha256:HEX.")
]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="A reason, for the history.")]


def register(app: typer.Typer) -> None:
    """Add the store's commands to the app."""
    panel = "Local store"
    add = app.command
    add(
        "list",
        rich_help_panel=panel,
        epilog=examples(
            "nest-runtime list",
            "nest-runtime list --model reference --json",
            "nest-runtime list --url http://127.0.0.1:8000 --token-file admin.token",
        ),
    )(list_patches)
    add("add", rich_help_panel=panel, epilog=examples("nest-runtime add my-patch.safetensors"))(add_patch)
    add("remove", rich_help_panel=panel, epilog=examples("nest-runtime remove my-safety@v1"))(remove)
    add(
        "activate",
        rich_help_panel=panel,
        epilog=examples(
            "nest-runtime activate v3",
            'nest-runtime activate v2 --why "v3 refuses recipes"',
            "nest-runtime activate v2 --url http://127.0.0.1:8000 --token-file admin.token",
        ),
    )(activate)
    add(
        "rollback",
        rich_help_panel=panel,
        epilog=examples(
            'nest-runtime rollback --why "over-refusal"',
            "nest-runtime rollback --url http://127.0.0.1:8000 --token-file admin.token",
        ),
    )(rollback)
    add("history", rich_help_panel=panel, epilog=examples("nest-runtime history", "nest-runtime history --verify"))(
        history
    )
    add("gc", rich_help_panel=panel, epilog=examples("nest-runtime gc"))(gc)


def list_patches(
    ctx: typer.Context,
    model: OnlyModel = None,
    url: UrlOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the patches on this machine, those of the package included: for which base each is, and which are active.

    With --url, list what a running server has loaded.
    """
    from nest_runtime.store.store import Store

    out = Output.of(ctx, as_json)
    if (server := server_of(ctx, url, token_file)) is not None:
        show_patches(out, server)
        return
    model_hash = base_hash_of(model)
    entries, servers = Store().list(model_hash), servers_beside(None, model_hash)

    def render() -> None:
        """The patches in a table, then what the servers of this machine answer with."""
        if not entries:
            out.note("no patches yet: train one with `nest-runtime train`, or add a file with `nest-runtime add`")
            return
        rows = [
            (
                "*" if e.active else " ",
                e.key,
                f"{e.base_model or 'unnamed'} ({e.base_hash[7:15]})",
                e.digest[:15],  # as few digits as commands accept: the line has to fit
                size(e.bytes),
                _origin(e),
            )
            for e in entries
        ]
        out.table(("", "PATCH", "FOR MODEL (HASH)", "DIGEST", "SIZE", ""), rows, right=("SIZE",), whole_in_pipe=True)
        if any(e.active for e in entries):
            out.note("* active in the store")
        for server in servers:
            out.note(f"the server at {server['url']} answers with {server['patch'] or 'what it does not say'}")

    out.result({"patches": [entry.to_json() for entry in entries], "servers": servers}, render)


def add_patch(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="FILE", help="A .safetensors file, or hf://org/repo@v3.")],
    why: Why = "",
    as_json: JsonOption = False,
) -> None:
    """Keep a patch in the local store under its name and version, after checking it."""
    from nest_runtime.resolve import load_patch
    from nest_runtime.store.store import Store

    out = Output.of(ctx, as_json)
    from nest_runtime.trust.guard import keep_beside

    store, patch = Store(), load_patch(source)
    signed = keep_beside(store, patch, source)
    entry = store.add(patch, why=why)

    def render() -> None:
        """What was added, and what to do next."""
        out.line(
            f"added {entry.key} ({short(entry.digest)}) for {entry.base_model or 'its model'}"
            + (", with its signature" if signed else "")
        )
        out.note(f"next: nest-runtime serve --patch {entry.key}{base_flag(entry.base_hash, entry.base_model)}")

    out.result({**entry.to_json(), "signed": signed or entry.signed}, render)


def remove(
    ctx: typer.Context, patch: Reference, model: OnlyModel = None, why: Why = "", as_json: JsonOption = False
) -> None:
    """Forget a stored patch. The active one and those that come with the package are refused."""
    from nest_runtime.store.store import Store

    out = Output.of(ctx, as_json)
    entry = Store().remove(patch, model_hash=base_hash_of(model), why=why)
    out.result(
        entry.to_json(),
        lambda: out.line(f"removed {entry.key} ({short(entry.digest)}); `nest-runtime gc` frees the space"),
    )


def activate(
    ctx: typer.Context,
    patch: Annotated[
        str,
        typer.Argument(
            metavar="PATCH",
            autocompletion=complete.patches,
            help="v3, name@v3, sha256:HEX, a file, or hf://org/repo@v3.",
        ),
    ],
    model: OnlyModel = None,
    trust: TrustOption = None,
    require_signature: RequireOption = False,
    trust_policy: PolicyOption = None,
    allow_downgrade: DowngradeOption = False,
    why: Why = "",
    url: UrlOption = None,
    token_file: TokenOption = None,
    swap_policy: SwapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a patch the one that chat, eval and serve use for its model when none is named.

    A file or a Hub reference is added to the store first. A server that is running keeps its patch, and is named.
    With --url it is that server that is switched, and its store with it.
    Where keys are trusted, here or in $NEST_HOME/trust.toml, the patch must pass: signature, revocations, serial.
    """
    from nest_runtime.resolve import load_patch
    from nest_runtime.store.entries import is_path, is_repository
    from nest_runtime.store.store import Store
    from nest_runtime.trust.activate import SwitchRequest
    from nest_runtime.trust.activate import activate as put_in_force
    from nest_runtime.trust.guard import guard_for

    out = Output.of(ctx, as_json)
    if (server := server_of(ctx, url, token_file)) is not None:
        show_switch(out, server, server.activate(as_seen_there(patch, server.url), swap_policy))
        return
    store, model_hash = Store(), base_hash_of(model)
    guard = guard_for(
        store,
        trust or (),
        require_signature=require_signature,
        policy_file=trust_policy,
        allow_downgrade=allow_downgrade,
    )
    foreign = is_path(patch) or is_repository(patch)
    loaded = load_patch(patch) if foreign else store.get(patch, model_hash=model_hash)
    done = put_in_force(store, loaded, guard, SwitchRequest(why=why), ref=patch, model_hash=model_hash)
    _show_switch(out, done, f"activate {done.entry.key}")


def rollback(
    ctx: typer.Context,
    model: OnlyModel = None,
    trust: TrustOption = None,
    require_signature: RequireOption = False,
    trust_policy: PolicyOption = None,
    why: Why = "",
    url: UrlOption = None,
    token_file: TokenOption = None,
    swap_policy: SwapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go back to the patch that was active before the present one. Repeat it to go further back.

    A server that is running keeps its patch, and is named. With --url it is that server that goes back.
    Where keys are trusted, its signature and the revocations are checked again; its lower serial is what is asked for.
    """
    from nest_runtime.store.store import Store
    from nest_runtime.trust.activate import SwitchRequest, roll_back
    from nest_runtime.trust.guard import guard_for

    out = Output.of(ctx, as_json)
    if (server := server_of(ctx, url, token_file)) is not None:
        show_switch(out, server, server.rollback(swap_policy))
        return
    store, model_hash = Store(), base_hash_of(model)
    guard = guard_for(store, trust or (), require_signature=require_signature, policy_file=trust_policy)
    _show_switch(out, roll_back(store, guard, SwitchRequest(why=why), model_hash=model_hash), "rollback")


def history(
    ctx: typer.Context,
    model: OnlyModel = None,
    last: Annotated[int, typer.Option("--last", metavar="N", min=1, help="Only the newest N entries.")] = 1_000_000,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that no entry was changed or removed, here and in the audit log.")
    ] = False,
    audit_file: Annotated[
        Path | None,
        typer.Option("--audit-file", metavar="FILE", help="A server's audit log; $NEST_HOME/audit.jsonl by default."),
    ] = None,
    url: UrlOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who added, activated, rolled back or removed what, when and why; with --url, a server's audit log.

    With --verify the server's audit log is checked as well: an edited or missing line ends with status 1.
    """
    from nest_runtime.store.store import Store

    out = Output.of(ctx, as_json)
    if (server := server_of(ctx, url, token_file)) is not None:
        show_audit(out, server, last, verify)
        return
    store = Store()
    count = store.verify_history() if verify else None
    audited = _verify_audit(audit_file) if verify else None
    entries = store.history(base_hash_of(model))[-last:]

    def render() -> None:
        """The changes in a table; after a check, whether chain and audit log are whole."""
        rows = [(e["at"][:19].replace("T", " "), e["who"], e["what"], _what(e), e["why"]) for e in entries]
        if rows:
            out.table(
                ("WHEN (UTC)", "WHO", "WHAT", "PATCH", "WHY"), rows, whole=("WHEN (UTC)", "WHAT"), whole_in_pipe=True
            )
        if not entries:
            out.note("nothing has happened in this store yet")
        if count is not None:
            out.line(f"the chain is whole: {count} entries")
        if audited is not None:
            out.line(f"the audit log is whole: {audited['entries']} entries in {audited['path']}")
            if audited["unfinished"]:
                out.note(f"{audited['unfinished']} intents have no outcome: the server ended, or its disk was full")

    document: dict[str, Any] = {"entries": entries}
    out.result(document if count is None else {**document, "verified": count, "audit": audited}, render)


def gc(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Delete stored bytes that no name and no activation needs any more."""
    from nest_runtime.store.store import Store

    out = Output.of(ctx, as_json)
    removed = Store().gc()
    out.result({"removed": removed}, lambda: out.line(f"{len(removed)} objects deleted"))


def _verify_audit(file: Path | None) -> dict[str, Any] | None:
    """The path and the number of entries of a server's audit log; None if none was ever kept at the usual place."""
    from nest_runtime.errors import StoreError
    from nest_runtime.io import nest_home
    from nest_runtime.serve.switching.audit import AuditLog

    log = AuditLog(file or nest_home() / "audit.jsonl")
    if not log.kept:
        if file is None:
            return None
        raise StoreError(f"there is no audit log {file}", "give the file that the server was started with")
    return {"path": str(log.path), "entries": log.verify(), "unfinished": len(log.unfinished())}


def _origin(entry: Any) -> str:
    return ", ".join(word for word, yes in (("built-in", entry.builtin), ("signed", entry.signed)) if yes)


def _what(event: dict[str, Any]) -> str:
    return f"{event['name']}@{event['version']}" if event.get("name") else f"{len(event.get('removed', []))} objects"


def _show_switch(out: Output, done: Activated, command: str) -> None:
    entry, verified = done.entry, done.verified
    was = done.previous.key if done.previous else None
    text = f"active: {entry.key} ({short(entry.digest)})" + (f", was {was}" if was and was != entry.key else "")
    document = {**entry.to_json(), "previous": was}
    if verified is not None:
        text += f", signed by {verified.key}" if verified.signed_by else ", not signed"
        document |= {"signed": verified.signed_by is not None, "signed_by": verified.signed_by}
    servers = servers_beside(entry)
    out.result({**document, "servers": servers}, lambda: out.line(text))
    warn_of_servers(out, servers, command)
