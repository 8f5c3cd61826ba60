"""Commands of trust: keygen, sign, verify, revoke, revocations. Who is trusted with what is trust/policy.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands import claim
from nest_runtime.cli.commands.claim import AllowJudge, BehaviorsOption
from nest_runtime.cli.common import base_hash_of, examples
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, Output
from nest_runtime.escape import short
from nest_runtime.io import expand

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.trust.check import Verified
    from nest_runtime.trust.policy import Policy

PASSPHRASE = "NEST_KEY_PASSPHRASE"

PatchOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="PATCH",
        autocompletion=complete.patches,
        help="A .safetensors file, a folder with patch.safetensors, v3 or name@v3.",
    ),
]
WhoseModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=complete.models,
        help="The model whose v3 is meant, where several models have one.",
    ),
]
PrivateKey = Annotated[Path, typer.Option("--key", metavar="KEY", help="The private key; its owner's alone to read.")]
TrustOption = Annotated[
    list[Path] | None,
    typer.Option("--trust", metavar="KEY.pub", help="A public key whose signatures count. May be repeated."),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--trust-policy", metavar="FILE", help="A trust policy; $NEST_HOME/trust.toml by default."),
]
RequireOption = Annotated[bool, typer.Option("--require-signature", help="Refuse unsigned patches.")]
DowngradeOption = Annotated[
    bool, typer.Option("--allow-downgrade", help="Let an older patch than one already accepted pass; it is recorded.")
]


def register(app: typer.Typer) -> None:
    """Add the trust commands to the app."""
    panel = "Trust"
    add = app.command
    add("keygen", rich_help_panel=panel, epilog=examples("nest-runtime keygen ~/keys"))(keygen)
    add(
        "sign",
        rich_help_panel=panel,
        epilog=examples("nest-runtime sign v3.safetensors --key ~/keys/nest.key"),
    )(sign)
    add(
        "verify",
        rich_help_panel=panel,
        epilog=examples(
            "nest-runtime verify v3.safetensors --trust nest.pub",
            "nest-runtime verify v3 --claims --model ./my-model",
        ),
    )(verify)
    add(
        "revocations",
        rich_help_panel=panel,
        epilog=examples("nest-runtime revocations", "nest-runtime revocations ./mirror --trust nest.pub"),
    )(revocations)


def keygen(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the two files go; never overwritten.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="NAME.key and NAME.pub.")] = "nest",
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help=f"Ask for a passphrase for the private key, or take ${PASSPHRASE}.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key pair for signing patches: elliptic curve P-256, the private key readable by its owner alone."""
    from nest_runtime.errors import UsageError
    from nest_runtime.trust.keys import generate_keys

    out = Output.of(ctx, as_json)
    if not name or Path(name).name != name:
        raise UsageError(f"the name is {name!r}; expected the stem of a file", "give a name without slashes")
    passphrase = os.environ.get(PASSPHRASE, "")
    if encrypt and not passphrase:
        passphrase = _ask(confirm=True)
    private, public, key = generate_keys(expand(folder), name, passphrase if encrypt else "")

    def render() -> None:
        out.pairs({"private key": private, "public key": public, "key id": key.id})
        out.note("keep the private key off machines that serve; hand out the public one")

    out.result({"private": str(private), "public": str(public), "key_id": key.id, "encrypted": encrypt}, render)


def sign(
    ctx: typer.Context,
    patch: PatchOrFolder,
    key: PrivateKey,
    model: WhoseModel = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a patch: writes its manifest and signature beside the file, or into the store for a stored one.

    The signature binds name, version, serial, model hash, digest and every byte of the patch.
    """
    from nest_runtime.trust.check import sign_patch

    out, path, key = Output.of(ctx, as_json), _path(patch), expand(key)
    passphrase = passphrase_of(key)
    if path is not None:
        signed, *written = sign_patch(path, key, passphrase)
        files = [str(item) for item in written]
    else:
        signed, files = _sign_stored(patch, model, key, passphrase)
    manifest = signed.manifest
    document = {
        "ok": True,
        "signed_by": signed.key.id,
        **{field: getattr(manifest, field) for field in ("digest", "name", "version", "serial", "base_hash")},
        "files": files,
    }

    def render() -> None:
        out.line(f"signed {manifest.name}@{manifest.version} ({short(manifest.digest)}) with {short(signed.key.id)}")
        for file in files:
            out.line(f"wrote {file}")

    out.result(document, render)


def verify(
    ctx: typer.Context,
    patch: PatchOrFolder,
    trust: TrustOption = None,
    trust_policy: PolicyOption = None,
    model: WhoseModel = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Measure its claims again, on --model or the base that it was made on.")
    ] = False,
    behaviors: BehaviorsOption = None,
    judge: AllowJudge = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check a patch's signature, and that it is not revoked. Exit status 3 where it must not be trusted.

    With --trust those keys alone count; without it, those of the trust policy. With --claims the exit status is 1
    unless every claim could be measured and holds; where no key is trusted the signature is not checked then.
    """
    from nest_runtime.errors import UsageError

    out, path = Output.of(ctx, as_json), _path(patch)
    if not claims and (behaviors or judge):
        raise UsageError("--behaviors and --judge are for claims", "give --claims, or leave them out")
    policy = _only(trust, trust_policy) if not claims or trust or trust_policy else _policy_or_none()
    verified = _verified(patch, path, model, policy) if policy is not None else None

    def render() -> None:
        if verified is not None:
            by = f"{verified.key} ({short(verified.signed_by)})"
            out.line(f"good signature on {verified.name}@{verified.version} ({short(verified.digest)}) by {by}")

    if not claims:
        assert verified is not None  # _only gives a policy, or raises
        out.result(verified.to_json(), render)
        return
    subject = _subject(patch, path, model, verified)
    rows = claim.check(out, subject, claim.means_for(subject, model, behaviors, judge, device, dtype))
    identity = {field: getattr(subject, field) for field in ("name", "version", "serial", "digest", "base_hash")}
    signed = {"signed_by": None, "key": ""} if verified is None else verified.to_json()
    ok = all(row.ok for row in rows)

    def render_all() -> None:
        """What a check of the signature alone says, then the table of claims."""
        render()
        claim.render_checked(out, rows)
        held = sum(row.ok for row in rows)
        out.line(f"{held} of {len(rows)} claims of {subject.name}@{subject.version} hold")
        if verified is None:
            out.note("no key is trusted here, so the signature was not checked: give --trust KEY.pub")

    out.result({**signed, **identity, "ok": ok, "claims": [row.to_json() for row in rows]}, render_all)
    if not ok:
        raise typer.Exit(1)


def revocations(
    ctx: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Take in the list published in this folder first.")
    ] = None,
    trust: TrustOption = None,
    trust_policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the revocations this machine knows from trusted keys, after taking in a published list where one is named.

    A list that is older than the known one, or that has lost an entry, is refused.
    """
    from nest_runtime.trust.revocations import read_list
    from nest_runtime.trust.state import TrustState

    out, policy, state = Output.of(ctx, as_json), _only(trust, trust_policy), TrustState()
    if folder is not None:
        state.update_revocations(*read_list(expand(folder)), policy)
    known = state.revocations(policy)
    rows: list[dict[str, Any]] = [{**entry.model_dump(), "revoked_by": rule.name} for entry, rule in known]

    def render() -> None:
        """The revocations in a table."""
        if not rows:
            out.note("no revocations are known from these keys")
            return
        cells = [
            (r["date"][:10], f"{r['name']}@{r['version']}", short(r["digest"]), r["revoked_by"], r["reason"])
            for r in rows
        ]
        out.table(("DATE", "PATCH", "DIGEST", "BY", "REASON"), cells, whole_in_pipe=True)

    out.result({"revocations": rows}, render)


def _sign_stored(ref: str, model: str | None, key: Path, passphrase: str) -> tuple[Any, list[str]]:
    from nest_runtime.patch.write import to_bytes
    from nest_runtime.store.signatures import signature_folder
    from nest_runtime.store.store import Store
    from nest_runtime.trust.check import sign_bytes
    from nest_runtime.trust.kept import keep_signature

    store = Store()
    patch = store.get(ref, model_hash=base_hash_of(model))
    signed = sign_bytes(to_bytes(patch), key, passphrase, patch.label)
    keep_signature(store.root, patch, signed.material, verified=True)
    folder = signature_folder(store.root, patch.digest)
    return signed, [str(folder / "manifest.json"), str(folder / f"{signed.key.id.partition(':')[2]}.sig")]


def _verify_stored(ref: str, model: str | None, policy: Policy) -> Verified:
    from nest_runtime.store.store import Store
    from nest_runtime.trust.guard import Guard

    store = Store()
    patch = store.get(ref, model_hash=base_hash_of(model))
    return Guard(policy, store).check(patch, allow_downgrade=True)


def _verified(ref: str, path: Path | None, model: str | None, policy: Policy) -> Verified:
    from nest_runtime.trust.check import check_revoked, verify_patch
    from nest_runtime.trust.state import TrustState

    verified = verify_patch(path, policy) if path is not None else _verify_stored(ref, model, policy)
    # What was accepted here does not count: to look at an old patch is no downgrade.
    check_revoked(verified.name, verified.version, verified.digest, policy, TrustState())
    return verified


def _subject(ref: str, path: Path | None, model: str | None, verified: Verified | None) -> Patch:
    """The patch to measure: the very one that was verified. Raises DigestMismatch if it is another by now."""
    from nest_runtime.errors import DigestMismatch
    from nest_runtime.resolve import load_patch
    from nest_runtime.trust.material import patch_path

    name = ref if path is None else patch_path(path)
    patch = load_patch(name, model_hash=base_hash_of(model))
    if verified is not None and patch.digest != verified.digest:
        raise DigestMismatch(f"{ref} was changed while it was looked at", "see who writes to it, and try again")
    return patch


def _policy_or_none() -> Policy | None:
    """The trust policy of this machine with a signature required, or None if no key is trusted."""
    from nest_runtime.trust.policy import default_policy

    policy = default_policy()
    return _only(None, None) if policy is not None and policy.keys else None


def _only(keys: list[Path] | None, file: Path | None) -> Policy:
    """The policy of --trust alone, or of the policy file; a signature is required in any case."""
    from nest_runtime.errors import UsageError
    from nest_runtime.trust.keys import read_public_key
    from nest_runtime.trust.policy import Policy, default_policy, read_policy, with_keys

    if keys and file is not None:
        raise UsageError("--trust and --trust-policy exclude each other here", "give one of them")
    if keys:
        return with_keys(
            Policy(require_signature=False), [read_public_key(expand(key)) for key in keys], require_signature=True
        )
    policy = read_policy(expand(file)) if file is not None else default_policy()
    if policy is None or not policy.keys:
        raise UsageError("no key is trusted", "give --trust KEY.pub, or write $NEST_HOME/trust.toml")
    return with_keys(policy, [], require_signature=True)


def _path(ref: str) -> Path | None:
    """The file or folder that a reference means, or None for one that the store answers."""
    from nest_runtime.errors import UsageError
    from nest_runtime.store.entries import is_path, is_repository

    if is_repository(ref):
        raise UsageError(f"{ref} is in a repository; expected a file, a folder or a stored patch", "pull it first")
    return expand(ref) if is_path(ref) else None


def passphrase_of(key: Path) -> str:
    """The passphrase of a private key: none, from the environment, or asked for on a terminal."""
    from nest_runtime.trust.keys import is_encrypted

    if not is_encrypted(key):
        return ""
    return os.environ.get(PASSPHRASE, "") or _ask(confirm=False)


def _ask(*, confirm: bool) -> str:
    from nest_runtime.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError("a passphrase is needed, and there is no terminal to ask on", f"set {PASSPHRASE}")
    return str(typer.prompt("passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
