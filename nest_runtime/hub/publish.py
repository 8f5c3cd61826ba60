"""Publishing: versions, channels and revocations, to the Hub or to a mirror.

A version is one commit and one tag. Nothing published ever changes: other content under an existing version, another
base, another name or a lower serial is refused before anything is sent. If two push at once, one wins and the other
gets an error. Those who fetch decide who may sign.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import Downgrade, HubError, RepoMissing, SignatureError, UsageError
from nest_runtime.escape import short
from nest_runtime.hints import did_you_mean
from nest_runtime.hub.card import render_card
from nest_runtime.hub.channels import CHANNELS, Channel, channel_for, sign_channel
from nest_runtime.hub.connect import connect
from nest_runtime.hub.demanded import Prove, settle
from nest_runtime.hub.fetch import fetch_revision
from nest_runtime.hub.mirror import MirrorRemote
from nest_runtime.hub.origins import Origins
from nest_runtime.hub.repository import CARD_FILE, LATEST, USUAL_CHANNELS, Refs, Remote, RepoRef, may_be_channel
from nest_runtime.trust.material import MANIFEST_FILE, PATCH_FILE, SIGNATURE_FILE, Manifest, Material
from nest_runtime.trust.revocations import LIST_FILE, LIST_SIGNATURE, RevocationList, read_list, revoke

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store

CHANNEL_VALID = timedelta(days=30)
TRIES = 3
NEWEST = (LATEST, "latest", "head", "master")  # what people may take for the newest version


@dataclass(frozen=True)
class Pushed:
    """A version that is published.

    Attributes:
        repo, revision, url: where.
        digest: of the patch.
        version: its name there.
        signed_by: id of the key, or None.
        unchanged: it was there already.
    """

    repo: str
    revision: str
    url: str
    digest: str
    version: str
    signed_by: str | None
    unchanged: bool = False

    def to_json(self) -> dict[str, Any]:
        """The result's fields as JSON values."""
        return dict(self.__dict__)


def push(
    patch: Patch,
    ref: RepoRef,
    *,
    store: Store,
    material: Material | None = None,
    private: bool = False,
    license_id: str | None = None,
    results: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    allow_downgrade: bool = False,
    timeout: float | None = None,
) -> Pushed:
    """Publish a patch as a version of a repository, which is made if it is missing.

    Pushing again what is there changes nothing, and finishes a push that was cut off before its tag.

    Args:
        patch: the patch; its own version becomes the tag.
        ref: the repository.
        store: remembers the commit, and keeps the signature of what is published.
        material: manifest and signature; None publishes it unsigned.
        private: for a repository that has to be made.
        license_id, results, base_model: for the card, see ``render_card``.
        allow_downgrade: publish a lower serial than the repository's newest.
        timeout: seconds that any one step may take.

    Raises:
        UsageError: the version is called like a channel.
        HubError: the version is taken by other content, the repository is of another base or name, somebody else
            was faster, or the Hub refused or cannot be reached.
        Downgrade: the repository has a higher serial.
        SignatureError: the signature is not this patch's.
    """
    from nest_runtime.patch.write import to_bytes

    data = to_bytes(patch)
    if material is not None:
        from nest_runtime.trust.kept import check_material

        check_material(patch, material)
    remote = connect(ref, timeout=timeout)
    refs = _refs_or_create(remote, private)
    _check_version(remote, refs, ref, patch.version)
    done = _already(remote, ref, refs, patch, store)
    if done is None:
        _check_follows(remote, refs, patch, ref, allow_downgrade)
        files = _files(patch, data, material, remote, refs, ref, license_id, results, base_model)
        done = remote.publish(files, f"{patch.name} {patch.version}", parent=refs.head, tag=patch.version)
        unchanged = False
    else:
        unchanged = True
        if not ref.on_hub:
            _mend(remote, refs, ref, patch, done)
    if material is not None:
        from nest_runtime.trust.kept import keep_signature

        keep_signature(store.root, patch, material)  # not before: a push that is refused leaves nothing behind
    Origins(store.root).record(ref.place, patch.version, done, patch.digest, patch.name)
    signed_by = material.key_id if material else None
    return Pushed(ref.place, done, remote.url(done), patch.digest, patch.version, signed_by, unchanged)


def set_channel(
    ref: RepoRef,
    channel: str,
    version: str,
    *,
    store: Store,
    key: Path | None = None,
    passphrase: str = "",
    valid: timedelta = CHANNEL_VALID,
    demand: bool | None = None,
    prove: Prove | None = None,
    timeout: float | None = None,
) -> tuple[Channel, str]:
    """Point a channel to a version, or renew it; returns the new file and the commit.

    Args:
        ref: the repository.
        channel: ``stable``, ``canary``, ….
        version: one that the repository has.
        store: as in ``push``.
        key, passphrase: the private key; without one the file is unsigned, and counts only where no key is trusted.
        valid: until when followers may go by it.
        demand, prove: what claims the channel demands, and how they are measured: see ``demanded.settle``.
        timeout: as in ``push``.

    Raises:
        UsageError: the name or the key cannot be used.
        ClaimsRefused: the version's claims are not what is demanded.
        HubError: the Hub refused or cannot be reached.
    """
    if not may_be_channel(channel):
        raise UsageError(f"{channel!r:.60} is a version's name, no channel's", "call it stable, canary, …")
    remote = connect(ref, timeout=timeout)
    for attempt in range(TRIES):
        refs = remote.refs()
        if version not in refs.tags:
            known = ", ".join(sorted(refs.tags)[-8:]) or "none"
            near = did_you_mean(version, refs.tags)
            raise HubError(f"{ref.place} has no version {version!r}; it has {known}", near + "push it first")
        patch = fetch_revision(remote, ref, refs.tags[version], store=store).patch
        demands = settle(patch, remote, refs, channel, demand=demand, key=key, passphrase=passphrase, prove=prove)
        new = channel_for(patch, channel, valid, revocations=_list_serial(remote, refs), claims=demands)
        if key is None and remote.read(f"{CHANNELS}/{channel}.sig", refs.head) is not None:
            raise SignatureError(
                f"channel {channel} of {ref.place} is signed", "give --key: an unsigned file would be refused"
            )
        data, signature = sign_channel(new, key, passphrase) if key is not None else (new.to_bytes(), None)
        files = {f"{CHANNELS}/{channel}.json": data}
        if signature is not None:
            files[f"{CHANNELS}/{channel}.sig"] = signature
        try:
            return new, remote.publish(files, f"{channel} is {version}", parent=refs.head)
        except HubError:
            if attempt == TRIES - 1 or remote.refs().head == refs.head:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def publish_revocation(
    patch: Patch,
    reason: str,
    ref: RepoRef,
    *,
    key: Path,
    passphrase: str = "",
    timeout: float | None = None,
) -> tuple[RevocationList, str]:
    """Add a patch to a repository's signed revocation list; returns the new list and the commit.

    Raises:
        UsageError: the reason or the key cannot be used.
        SignatureError: the list that is there is not this key's.
        HubError: the Hub refused or cannot be reached.
    """
    remote = connect(ref, timeout=timeout)
    for attempt in range(TRIES):
        refs = _refs_or_create(remote, private=False) if isinstance(remote, MirrorRemote) else remote.refs()
        with tempfile.TemporaryDirectory(prefix="nest-revoke-") as folder:
            for name in (LIST_FILE, LIST_SIGNATURE):
                if (present := remote.read(name, refs.head)) is not None:
                    (Path(folder) / name).write_bytes(present)
            revocations = revoke(patch, reason, Path(folder), key, passphrase=passphrase)
            data, signature = read_list(Path(folder))
        if remote.read(LIST_FILE, refs.head) == data:
            return revocations, refs.head
        try:
            message = f"revoke {patch.name} {patch.version}"
            files = {LIST_FILE: data, LIST_SIGNATURE: signature}
            return revocations, remote.publish(files, message, parent=refs.head)
        except HubError:
            if attempt == TRIES - 1 or remote.refs().head == refs.head:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _refs_or_create(remote: Remote, private: bool) -> Refs:
    try:
        return remote.refs()
    except RepoMissing:
        remote.create(private=private)
        return remote.refs()


def _check_version(remote: Remote, refs: Refs, ref: RepoRef, version: str) -> None:
    """Refuse a version whose tag could be taken for a channel, or for the newest. Raises UsageError."""
    reserved = version.lower() in (*USUAL_CHANNELS, *NEWEST)  # file systems and people may not tell cases apart
    if reserved or (may_be_channel(version) and remote.read(f"{CHANNELS}/{version}.json", refs.head) is not None):
        whose = "is reserved for a channel" if reserved else f"is a channel of {ref.place}"
        raise UsageError(f"the version {version!r} {whose}", "give the patch a version such as v4")


def _already(remote: Remote, ref: RepoRef, refs: Refs, patch: Patch, store: Store) -> str | None:
    """The revision where the repository has this very patch under its version; tags a commit that lacks its tag.

    Raises:
        HubError: other content stands under the version.
    """
    tagged = refs.tags.get(patch.version)
    if tagged is not None:
        there = fetch_revision(remote, ref, tagged, store=store).patch
        if there.digest != patch.digest:
            raise HubError(
                f"{ref.place} already has {patch.version}, which is {short(there.digest)}; "
                f"yours is {short(patch.digest)}",
                "a published version never changes: give yours another version",
            )
        return tagged
    newest = _newest(remote, refs, ref) if ref.on_hub else None
    if newest is None or newest.digest != patch.digest:
        return None
    return remote.publish({}, "", parent=refs.head, tag=patch.version)


def _mend(remote: Remote, refs: Refs, ref: RepoRef, patch: Patch, revision: str) -> None:
    """Make a version the root of a mirror, where a push that was cut off left the root behind it, or half written."""
    newest = _newest(remote, refs, ref)
    if newest is not None and newest.serial > patch.serial:
        return
    names = (PATCH_FILE, CARD_FILE, MANIFEST_FILE, SIGNATURE_FILE)
    whole = {name: data for name in names if (data := remote.read(name, revision)) is not None}
    if any(remote.read(name, refs.head) != data for name, data in whole.items() if name != CARD_FILE):
        remote.publish(whole, f"{patch.name} {patch.version}", parent=refs.head)


def _check_follows(remote: Remote, refs: Refs, patch: Patch, ref: RepoRef, allow_downgrade: bool) -> None:
    """Whether a patch may come after what the repository holds. Raises HubError or Downgrade."""
    newest = _newest(remote, refs, ref)
    if newest is None or newest.digest == patch.digest:
        return
    for field, hint in (
        ("base_hash", "one repository holds the versions for one base: push to another"),
        ("name", "one repository holds the versions of one patch: push to another, or train with --name"),
    ):
        found, mine = getattr(newest, field), getattr(patch, field)
        if found != mine:
            raise HubError(f"{ref.place} holds patches with {field} {found}; this one has {mine}", hint)
    if patch.serial <= newest.serial and not allow_downgrade:
        raise Downgrade(
            f"{ref.place} is at {newest.version} with serial {newest.serial}; {patch.version} has {patch.serial}",
            "give the new version a higher serial; --allow-downgrade publishes it all the same",
        )


def _newest(remote: Remote, refs: Refs, ref: RepoRef) -> Manifest | Patch | None:
    """What stands at the root, by its manifest, or by the patch itself where it is unsigned."""
    manifest = remote.read(MANIFEST_FILE, refs.head)
    if manifest is not None:
        return Manifest.parse(manifest, f"{ref.place}: {MANIFEST_FILE}")
    data = remote.read(PATCH_FILE, refs.head)
    if data is None:
        return None
    from nest_runtime.patch.file import from_bytes

    return from_bytes(data, f"{ref.place}: {PATCH_FILE}")


def _files(
    patch: Patch,
    data: bytes,
    material: Material | None,
    remote: Remote,
    refs: Refs,
    ref: RepoRef,
    license_id: str | None,
    results: Mapping[str, Any] | None,
    base_model: str | None,
) -> dict[str, bytes]:
    old = remote.read(CARD_FILE, refs.head)
    card = render_card(
        patch,
        ref.place,
        old=old.decode("utf-8", "replace") if old else None,
        license_id=license_id,
        results=results,
        signed_by=material.key_id if material else None,
        base_model=base_model,
    )
    files = {PATCH_FILE: data, CARD_FILE: card.encode()}
    if material is not None:
        files |= {MANIFEST_FILE: material.manifest, SIGNATURE_FILE: material.signature}
    elif remote.read(MANIFEST_FILE, refs.head) is not None:
        raise SignatureError(
            f"the versions of {ref.place} are signed; {patch.version} is not",
            "sign it with `nest-runtime sign`, or give --key",
        )
    return files


def _list_serial(remote: Remote, refs: Refs) -> int:
    """The serial of the list that the repository serves now; the channel file says so to those who follow."""
    data = remote.read(LIST_FILE, refs.head)
    return RevocationList.parse(data, f"the revocation list of {remote.name}").serial if data is not None else 0
