"""Publishing to a channel that demands claims: refuses patches that lack them, or whose claims do not hold.

The demand is in the channel's present file, and carries over to the next. Measuring is the caller's task: it needs a
model, and nothing here loads one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import ClaimsRefused, RepoMissing, SignatureError
from nest_runtime.hub.channels import CHANNELS, Channel
from nest_runtime.hub.connect import connect
from nest_runtime.hub.demands import Demands, check_met, demands_of
from nest_runtime.hub.repository import Refs, Remote, RepoRef
from nest_runtime.trust.keys import public_key_of
from nest_runtime.trust.signing import read_bundle, verify_files

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

Prove = Callable[["Patch"], None]  # measures a patch's claims; raises ClaimsRefused unless all hold


def settle(
    patch: Patch,
    remote: Remote,
    refs: Refs,
    channel: str,
    *,
    demand: bool | None = None,
    key: Path | None = None,
    passphrase: str = "",
    prove: Prove | None = None,
) -> Demands | None:
    """What the next file of a channel demands, once the patch that it will name has met it.

    Args:
        patch: the patch.
        remote, refs: the repository.
        channel: its channel.
        demand: True makes the patch's own claims the demand, beside meeting the present one; False lifts it; None
            keeps what is demanded.
        key, passphrase: what the next file is signed with. A present file of that key must be a true one; one that
            names this very patch under the same demand is renewed without measuring.
        prove: measures; without it a demand cannot be met by anything new.

    Raises:
        ClaimsRefused: claims are missing, too weak, or do not hold.
        SignatureError: the present file is malformed, or bears the key's name falsely.
    """
    if demand is False:
        return None
    where = f"channel {channel} of {remote.name}"
    present, mine = _present(remote, refs, channel, where, key, passphrase)
    demands = present.claims if present is not None else None
    if demands is not None:
        check_met(patch, demands, where)
    if demand:
        if patch.claims is None:
            raise ClaimsRefused(
                f"{patch.label} carries no claims that {where} could demand",
                "make them with `nest-runtime claim`, and sign the file that it writes",
            )
        demands = demands_of(patch.claims)
    if demands is None:
        return None
    renewed = mine and present is not None and (present.digest, present.claims) == (patch.digest, demands)
    if not renewed:
        if prove is None:
            raise ClaimsRefused(
                f"{where} demands claims, and those of {patch.label} were not measured",
                "publish with `nest-runtime push` or `channel set`, on a machine that has the model",
            )
        prove(patch)
    return demands


def check_before_push(
    patch: Patch,
    ref: RepoRef,
    channel: str,
    *,
    demand: bool | None,
    key: Path | None,
    passphrase: str,
    prove: Prove,
    timeout: float | None,
) -> None:
    """The same before anything is sent; a repository that is not there yet demands nothing."""
    remote = connect(ref, timeout=timeout)
    try:
        refs = remote.refs()
    except RepoMissing:
        refs = Refs("", {})
    settle(patch, remote, refs, channel, demand=demand, key=key, passphrase=passphrase, prove=prove)


def _present(
    remote: Remote, refs: Refs, channel: str, where: str, key: Path | None, passphrase: str
) -> tuple[Channel | None, bool]:
    """The channel's present file, and whether this key signed it. Raises SignatureError."""
    data = remote.read(f"{CHANNELS}/{channel}.json", refs.head) if refs.head else None
    if data is None:
        return None, False
    hint = "see who writes to the repository; --no-demand-claims of `channel set` begins anew"
    try:
        found = Channel.parse(data, where)
        signature = remote.read(f"{CHANNELS}/{channel}.sig", refs.head)
        if key is None or signature is None:
            return found, False
        own = public_key_of(key, passphrase)
        if read_bundle(signature, f"the signature of {where}").key_id != own.id:
            return found, False
        verify_files({f"{channel}.json": data}, signature, [own], where)
    except SignatureError as error:
        raise SignatureError(error.message, hint) from error
    return found, True
