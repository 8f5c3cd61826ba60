"""The commands push and pull. A folder or URL stands in for the Hub anywhere. More: channel.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands import claim
from nest_runtime.cli.commands.claim import AllowJudge, BehaviorsOption
from nest_runtime.cli.commands.trust import (
    DowngradeOption,
    PolicyOption,
    RequireOption,
    TrustOption,
    WhoseModel,
    passphrase_of,
)
from nest_runtime.cli.common import base_flag, base_hash_of, base_id, examples
from nest_runtime.cli.output import JsonOption, Output
from nest_runtime.escape import short
from nest_runtime.io import expand

if TYPE_CHECKING:
    from nest_runtime.hub.publish import Pushed
    from nest_runtime.hub.repository import RepoRef
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store
    from nest_runtime.trust.material import Material

KEY_VARIABLE = "NEST_KEY"

Repo = Annotated[
    str, typer.Argument(metavar="REPO", help="org/name on the Hub, a folder such as ./mirror, or an fsspec URL.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", metavar="KEY", help=f"The private key to sign with; ${KEY_VARIABLE} by default.")
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", min=1, help="How long one step may take; 120 s.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ORG/NAME", help="What the Hub calls the base, for the card."),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make the repository private, where it has to be made.")]
ThenChannelOption = Annotated[
    str | None,
    typer.Option(
        "--channel",
        metavar="NAME",
        autocompletion=complete.channels,
        help="Then point this channel, e.g. stable, to it.",
    ),
]
LicenseOption = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="For the card, e.g. apache-2.0; kept from the last one."),
]
ResultsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        metavar="FILE",
        help="For the card: what `eval --json` or benchmarks/adaptive.py wrote; repeat it.",
    ),
]
DemandOption = Annotated[
    bool,
    typer.Option("--demand-claims", help="The channel demands claims as strict as this patch's from now on."),
]
WhatPatch = Annotated[
    str,
    typer.Argument(
        metavar="PATCH",
        autocompletion=complete.patches,
        help="v3, name@v3, sha256:HEX, a file, a folder, or hf://org/repo@v3.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the Hub's commands to the app."""
    panel = "Hub"
    add = app.command
    add(
        "push",
        rich_help_panel=panel,
        epilog=examples("nest-runtime push v3 my-org/my-safety", "nest-runtime push v3 ./mirror --key ~/keys/nest.key"),
    )(push)
    add(
        "pull",
        rich_help_panel=panel,
        epilog=examples("nest-runtime pull my-org/my-safety@v3", "nest-runtime pull ./mirror@stable --trust nest.pub"),
    )(pull)


def push(
    ctx: typer.Context,
    patch: WhatPatch,
    repo: Repo,
    private: PrivateOption = False,
    key: KeyOption = None,
    channel: ThenChannelOption = None,
    license_id: LicenseOption = None,
    results: ResultsOption = None,
    base_model: BaseModelOption = None,
    demand_claims: DemandOption = False,
    behaviors: BehaviorsOption = None,
    judge: AllowJudge = None,
    model: WhoseModel = None,
    allow_downgrade: DowngradeOption = False,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a patch: one commit and one tag, with its card and, if it has one, its signature.

    A published version never changes. The signature is the one beside the file or in the store, or made with --key.
    Where the channel demands claims, they are measured first; nothing is sent if they are missing or do not hold.
    """
    from nest_runtime.errors import UsageError
    from nest_runtime.hub.publish import push as publish
    from nest_runtime.store.store import Store

    out, store, ref = Output.of(ctx, as_json), Store(), repository(repo)
    quiet_client(ctx)
    private_key = signing_key(key)
    if demand_claims and channel is None:
        raise UsageError("--demand-claims is for a channel", "name it with --channel")
    named_base = base_id(base_model)
    chosen, material = patch_and_material(patch, store, model, private_key)
    measured = _results(results or (), chosen)
    move = None
    if channel is not None:
        prove = claim.prover(out, model, behaviors, judge)
        move = ChannelMove(ref, channel, True if demand_claims else None, private_key, prove, timeout)
        move.check(chosen)
    done = publish(
        chosen,
        ref,
        store=store,
        material=material,
        private=private,
        license_id=license_id,
        results=measured,
        base_model=named_base,
        allow_downgrade=allow_downgrade,
        timeout=timeout,
    )
    document = done.to_json()
    if move is not None:
        move.make(done.version, store)
        document["channel"] = channel
    out.result(document, lambda: _say_pushed(out, chosen.name, done, ref, channel))


@dataclass(frozen=True)
class ChannelMove:
    """A channel that is to name what is pushed: first its demands are checked, then it is set.

    Attributes:
        ref: the repository.
        channel: its name.
        demand: whether it demands claims from now on; None leaves that as it is.
        key: the private key to sign its file with, or None.
        prove: measures a patch's claims, and raises ClaimsRefused unless all hold.
        timeout: seconds that one step may take, or None.
    """

    ref: RepoRef
    channel: str
    demand: bool | None
    key: Path | None
    prove: Callable[[Patch], None]
    timeout: float | None

    @cached_property
    def passphrase(self) -> str:
        """The key's; asked for once."""
        return passphrase_of(self.key) if self.key is not None else ""

    def check(self, patch: Patch) -> None:
        """Raise, before anything is sent, what setting the channel would raise. ClaimsRefused: claims do not hold."""
        from nest_runtime.hub.demanded import check_before_push

        check_before_push(patch, self.ref, self.channel, **self._how())

    def make(self, version: str, store: Store) -> None:
        """Let the channel name a version that has been pushed."""
        from nest_runtime.hub.publish import set_channel

        set_channel(self.ref, self.channel, version, store=store, **self._how())

    def _how(self) -> dict[str, Any]:
        given = {"key": self.key, "passphrase": self.passphrase, "prove": self.prove, "timeout": self.timeout}
        return {"demand": self.demand, **given}


def _say_pushed(out: Output, name: str, done: Pushed, ref: RepoRef, channel: str | None) -> None:
    verb = "is there already" if done.unchanged else "pushed"
    out.line(f"{name}@{done.version} ({short(done.digest)}) {verb}: {ref.place}@{done.version}")
    out.line(f"revision {done.revision}  {done.url}")
    if done.signed_by is None:
        out.note("it is not signed: servers that require signatures refuse it (see --key)")
    if channel is not None:
        out.line(f"channel {channel} is {done.version} now")


def pull(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="REPO[@VERSION]", help="With a version, a channel or a commit; else the newest.")
    ],
    trust: TrustOption = None,
    require_signature: RequireOption = False,
    trust_policy: PolicyOption = None,
    allow_downgrade: DowngradeOption = False,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="A reason, for the history.")] = "",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a patch, check it, and keep it in the local store. It is not activated."""
    from nest_runtime.hub.fetch import pull as fetch
    from nest_runtime.store.store import Store
    from nest_runtime.trust.guard import guard_for

    out, store = Output.of(ctx, as_json), Store()
    quiet_client(ctx)
    guard = guard_for(
        store,
        trust or (),
        require_signature=require_signature,
        policy_file=trust_policy,
        allow_downgrade=allow_downgrade,
    )
    fetched, entry = fetch(source, store=store, guard=guard, why=why, timeout=timeout, allow_downgrade=allow_downgrade)

    def render() -> None:
        """What was fetched from where, and whether a signature was checked."""
        out.line(f"pulled {entry.key} ({short(entry.digest)}) for {entry.base_model or 'its model'}")
        out.line(f"from {fetched.ref.place} at {fetched.revision}")
        if fetched.verified is not None and fetched.verified.signed_by is not None:
            out.line(f"good signature by {fetched.verified.key} ({short(fetched.verified.signed_by)})")
        else:
            out.note("no signature was checked: give --trust KEY.pub, or write $NEST_HOME/trust.toml")
        out.note(f"next: nest-runtime serve --patch {entry.key}{base_flag(entry.base_hash, entry.base_model)}")

    out.result(fetched.to_json(), render)


def patch_and_material(ref: str, store: Store, model: str | None, key: Path | None) -> tuple[Patch, Material | None]:
    """The patch to publish, and its signature: made now, or beside its file, or kept in the store."""
    from nest_runtime.patch.write import to_bytes
    from nest_runtime.resolve import load_patch
    from nest_runtime.store.entries import is_path
    from nest_runtime.trust.check import sign_bytes
    from nest_runtime.trust.guard import Guard
    from nest_runtime.trust.material import patch_path
    from nest_runtime.trust.policy import Policy

    if is_path(ref):
        path = expand(ref)
        named = path.with_name(f"{path.name}.safetensors")
        ref = str(named if not path.exists() and named.exists() else patch_path(path))
    patch = load_patch(ref, model_hash=base_hash_of(model), store=store)
    if key is not None:
        return patch, sign_bytes(to_bytes(patch), key, passphrase_of(key), patch.label).material
    return patch, Guard(Policy(require_signature=False), store).material(patch, ref)


def repository(text: str) -> RepoRef:
    """The repository that an argument names. Raises UsageError if it names a revision too."""
    from nest_runtime.errors import UsageError
    from nest_runtime.hub.repository import parse_repo

    ref = parse_repo(text)
    if ref.revision is not None:
        raise UsageError(f"{text!r} names a revision; expected a repository", f"give {ref.place}")
    return ref


def signing_key(given: Path | None) -> Path | None:
    """The private key's file: the option's, else ``$NEST_KEY``'s, else None."""
    named = os.environ.get(KEY_VARIABLE, "")
    chosen = given if given is not None else Path(named) if named else None
    return None if chosen is None else expand(chosen)


def _results(paths: Sequence[Path], patch: Patch) -> dict[str, Any] | None:
    """The documents of an evaluation and of adaptive attacks, as the card takes them.

    Raises:
        DataError: one cannot be read, or does not say by its digest that it was measured with this very patch.
    """
    from nest_runtime.errors import DataError, reason_of
    from nest_runtime.hub.results import ADAPTIVE
    from nest_runtime.io import MAX_RESULT, parse_json, read_text

    found: dict[str, Any] = {}
    for path in paths:
        try:
            document = parse_json(read_text(path, MAX_RESULT))
        except (OSError, ValueError) as error:
            why = reason_of(error)
            raise DataError(f"the results {path} cannot be read: {why}", "give what `eval --json` printed") from error
        if not isinstance(document, dict):
            raise DataError(f"the results {path} are no JSON object", "give what `eval --json` printed")
        digest = document.get("digest")
        if digest != patch.digest:
            whose = short(digest) if isinstance(digest, str) and digest else "no patch: they have no digest"
            raise DataError(
                f"the results {path} are of {whose}; {patch.label} is {short(patch.digest)}",
                'give what `eval --json` printed for this very patch; a file of your own form needs its "digest"',
            )
        found |= {ADAPTIVE: document} if isinstance(document.get("patch"), list) else document
    return found or None


def quiet_client(ctx: typer.Context) -> None:
    """Keep the Hub client's own warnings off stderr, where errors are two lines; --debug shows them."""
    from nest_runtime.cli.output import Settings

    settings = ctx.find_object(Settings)
    if settings is None or not settings.debug:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()
