"""What is published beside patches: the commands revoke, channel set and channel show."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands import claim
from nest_runtime.cli.commands.claim import AllowJudge, BehaviorsOption
from nest_runtime.cli.commands.hub import (
    KEY_VARIABLE,
    KeyOption,
    Repo,
    TimeoutOption,
    WhatPatch,
    patch_and_material,
    quiet_client,
    repository,
    signing_key,
)
from nest_runtime.cli.commands.trust import PolicyOption, RequireOption, TrustOption, WhoseModel, passphrase_of
from nest_runtime.cli.common import examples, seconds_of
from nest_runtime.cli.output import JsonOption, Output
from nest_runtime.escape import short

if TYPE_CHECKING:
    from nest_runtime.hub.repository import RepoRef
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store

ValidOption = Annotated[
    str, typer.Option("--valid", metavar="TIME", help="How long servers may go by it: 90s, 10m, 12h, 30d.")
]
DemandOption = Annotated[
    bool | None,
    typer.Option(
        "--demand-claims/--no-demand-claims",
        help="Demand claims as strict as this version's from now on, or none; what was demanded by default.",
    ),
]

channel_app = typer.Typer(
    help="Channels such as stable: which version of a repository servers follow.",
    epilog=examples("nest-runtime channel set my-org/my-safety stable v3 --key ~/keys/nest.key"),
)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    panel = "Hub"
    app.command(
        "revoke",
        rich_help_panel=panel,
        epilog=examples(
            'nest-runtime revoke hf://my-org/safety@v2 --reason "a leak" --key nest.key',
            'nest-runtime revoke v2 --reason "answers recipes" --to ./mirror --key nest.key',
        ),
    )(revoke)
    app.add_typer(channel_app, name="channel", rich_help_panel=panel)


def revoke(
    ctx: typer.Context,
    patch: WhatPatch,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="One line, for those who refuse the patch.")],
    key: KeyOption = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="REPO", help="Where the list is; where the patch came from or went by default."),
    ] = None,
    model: WhoseModel = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a published patch for ever: add it to the signed list that servers which follow obey."""
    from nest_runtime.errors import UsageError
    from nest_runtime.hub.publish import publish_revocation
    from nest_runtime.store.store import Store

    out, store, private_key = Output.of(ctx, as_json), Store(), signing_key(key)
    quiet_client(ctx)
    if private_key is None:
        raise UsageError("a revocation must be signed", f"give --key, or set {KEY_VARIABLE}")
    chosen, _ = patch_and_material(patch, store, model, None)
    ref = repository(to) if to is not None else _home_of(patch, chosen, store)
    passphrase = passphrase_of(private_key)
    revocations, revision = publish_revocation(
        chosen, reason, ref, key=private_key, passphrase=passphrase, timeout=timeout
    )
    entry = revocations.find(chosen.digest, chosen.name)
    assert entry is not None  # just added, or there before
    from nest_runtime.hub.connect import connect

    untold = _take_in(ref, revision, store, private_key, passphrase, timeout)
    document = {
        "repo": ref.place,
        "revision": revision,
        "url": connect(ref).url(revision),
        **entry.model_dump(),
        "serial": revocations.serial,
    }

    def render() -> None:
        """What was revoked, and what is left to do."""
        out.line(f"revoked {entry.name}@{entry.version} ({short(entry.digest)}): {entry.reason}")
        out.line(f"list {revocations.serial} of {ref.place} holds {len(revocations.revoked)}")
        out.note("point the channels that name it to another version with `nest-runtime channel set`")
        if untold is not None:
            out.note(f"this machine still trusts it: {untold}")

    out.result(document, render)


def _take_in(
    ref: RepoRef, revision: str, store: Store, key: Path, passphrase: str, timeout: float | None
) -> str | None:
    """Let this machine obey the list that it has just published; why it cannot, or None."""
    from nest_runtime.errors import NestError
    from nest_runtime.hub.connect import connect
    from nest_runtime.hub.news import read_revocations
    from nest_runtime.trust.guard import Guard
    from nest_runtime.trust.keys import public_key_of
    from nest_runtime.trust.policy import Policy, with_keys

    mine = with_keys(Policy(require_signature=False), [public_key_of(key, passphrase)], require_signature=False)
    try:
        read_revocations(connect(ref, timeout=timeout), revision, Guard(mine, store))
    except NestError as error:
        return error.message
    return None


@channel_app.command(
    "set", epilog=examples("nest-runtime channel set my-org/my-safety stable v3 --key ~/keys/nest.key")
)
def channel_set(
    ctx: typer.Context,
    repo: Repo,
    channel: Annotated[
        str, typer.Argument(metavar="CHANNEL", autocompletion=complete.channels, help="stable, canary, …")
    ],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A version that the repository has.")],
    key: KeyOption = None,
    valid: ValidOption = "30d",
    demand_claims: DemandOption = None,
    behaviors: BehaviorsOption = None,
    judge: AllowJudge = None,
    model: WhoseModel = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point a channel to a version, or renew it before it expires. Servers that follow it switch by themselves.

    Where the channel demands claims, those of the version are measured first, on --model or its base.
    """
    from nest_runtime.hub.connect import connect
    from nest_runtime.hub.publish import set_channel
    from nest_runtime.store.store import Store

    out, ref, private_key = Output.of(ctx, as_json), repository(repo), signing_key(key)
    quiet_client(ctx)
    found, revision = set_channel(
        ref,
        channel,
        version,
        store=Store(),
        key=private_key,
        passphrase=passphrase_of(private_key) if private_key else "",
        valid=timedelta(seconds=seconds_of(valid, "--valid")),
        demand=demand_claims,
        prove=claim.prover(out, model, behaviors, judge),
        timeout=timeout,
    )
    document = {
        "repo": ref.place,
        "revision": revision,
        "url": connect(ref).url(revision),
        "signed": private_key is not None,
        **found.model_dump(),
    }

    def render() -> None:
        """Which version the channel names now, until when, and what it demands."""
        out.line(f"{ref.place}: {channel} is {found.version} ({short(found.digest)}) until {found.expires}")
        if found.claims is not None:
            out.line(f"it demands claims: {len(found.claims.rows)}, judged by {found.claims.judge}")
        if private_key is None:
            out.note("it is not signed: it counts only where no signature is required")

    out.result(document, render)


@channel_app.command("show", epilog=examples("nest-runtime channel show my-org/my-safety stable --trust nest.pub"))
def channel_show(
    ctx: typer.Context,
    repo: Repo,
    channel: Annotated[
        str, typer.Argument(metavar="CHANNEL", autocompletion=complete.channels, help="stable, canary, …")
    ] = "stable",
    trust: TrustOption = None,
    require_signature: RequireOption = False,
    trust_policy: PolicyOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which version a channel names, and until when. Exit status 3 for a false signature or an expired file."""
    from nest_runtime.errors import HubError
    from nest_runtime.hints import did_you_mean
    from nest_runtime.hub.connect import connect
    from nest_runtime.hub.news import channels_like, read_channel, read_revocations
    from nest_runtime.store.store import Store
    from nest_runtime.trust.guard import guard_for

    out, ref = Output.of(ctx, as_json), repository(repo)
    quiet_client(ctx)
    guard = guard_for(Store(), trust or (), require_signature=require_signature, policy_file=trust_policy)
    remote = connect(ref, timeout=timeout)
    refs = remote.refs()
    revocations = read_revocations(remote, refs.head, guard)
    found = read_channel(remote, refs.head, channel, guard)
    if found is None:
        near = did_you_mean(channel, channels_like(remote, refs.head, channel))
        hint = f"{near}its publisher sets it with `nest-runtime channel set`"
        raise HubError(f"{ref.place} has no channel {channel!r}", hint)
    found.check_fresh(revocations=revocations.serial(found.name))
    document = {"repo": ref.place, "revision": refs.head, "url": remote.url(refs.head), **found.model_dump()}
    out.result(document, lambda: out.line(f"{ref.place}: {channel} is {found.version} until {found.expires}"))


def _home_of(ref: str, patch: Patch, store: Store) -> RepoRef:
    """The repository that a patch was named by, or the one place it was pushed to or pulled from."""
    from nest_runtime.errors import UsageError
    from nest_runtime.hub.origins import Origins
    from nest_runtime.hub.repository import RepoRef, parse_repo

    if ref.startswith("hf://"):
        return RepoRef(parse_repo(ref).place)
    places = sorted({origin.place for origin in Origins(store.root).of_patch(patch.digest)})
    if len(places) != 1:
        known = ", ".join(places) or "none is known"
        raise UsageError(f"where is {patch.label} published? ({known})", "say so with --to REPO")
    return RepoRef(places[0])
