"""Fetching patches from repositories: a reference becomes a commit, its files, and a checked Patch.

It works the same for the Hub and for mirrors. A tag is resolved to a commit first, and the commit is remembered.
Everything is verified after fetching, from the cache too: the bytes against the Hub's hash, the signature and the
manifest by trust/check.py, the format and the digest by patch/file.py, the version against the tag. Nothing enters
the store before all of it holds. Publishing is in publish.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import HubError, SignatureError, TrustError
from nest_runtime.hints import did_you_mean
from nest_runtime.hub.channels import Channel
from nest_runtime.hub.connect import connect
from nest_runtime.hub.news import News, channels_like, read_channel, read_revocations
from nest_runtime.hub.origins import Origins
from nest_runtime.hub.repository import (
    LATEST,
    USUAL_CHANNELS,
    Refs,
    Remote,
    RepoRef,
    may_be_channel,
    parse_repo,
    size_limit,
)
from nest_runtime.trust.material import MANIFEST_FILE, PATCH_FILE, SIGNATURE_FILE, Material

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Entry, Store
    from nest_runtime.trust.check import Verified
    from nest_runtime.trust.guard import Guard

__all__ = ["Fetched", "connect", "fetch", "fetch_revision", "load", "parse_repo", "pull"]

_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """A patch as a repository serves it, checked.

    Attributes:
        ref: what was asked for.
        revision: the commit's sha, or a mirror's folder.
        patch: the patch.
        material: its manifest and signature, or None for an unsigned one.
        verified: what the guard says; None without one: the signature is then there, but was not checked.
        url: where people can look at it.
    """

    ref: RepoRef
    revision: str
    patch: Patch
    material: Material | None
    verified: Verified | None
    url: str

    def to_json(self) -> dict[str, Any]:
        """For ``--json``: repo, revision, digest, url, name, version, serial, base_hash, signed_by, verified."""
        patch = self.patch
        return {
            "repo": self.ref.place,
            "revision": self.revision,
            "digest": patch.digest,
            "url": self.url,
            "name": patch.name,
            "version": patch.version,
            "serial": patch.serial,
            "base_hash": patch.base_hash,
            "signed_by": self.material.key_id if self.material else None,
            "verified": self.verified is not None and self.verified.signed_by is not None,
        }


def load(ref: str, store: Store | None = None) -> Patch:
    """The patch of ``hf://org/repo[@v3]``; its signature is kept, so that it can be judged when it is activated."""
    from nest_runtime.store.store import Store

    return fetch(ref, store=store or Store()).patch


def pull(ref: str, *, store: Store, guard: Guard | None = None, why: str = "", **options: Any) -> tuple[Fetched, Entry]:
    """Fetch a patch and keep it in the store; returns also its entry.

    Args:
        ref, guard: as in ``fetch``, and so are ``options``.
        store: where it goes.
        why: for the history, beside where it came from.

    Raises:
        StoreError: the store has other content under that version.
        NestError: as ``fetch``.
    """
    fetched = fetch(ref, guard=guard, store=store, **options)
    source = f"pulled from {fetched.ref.place} at {fetched.revision[:12]}"
    return fetched, store.add(fetched.patch, why=f"{why}; {source}" if why else source)


def fetch(
    ref: str | RepoRef,
    *,
    store: Store,
    guard: Guard | None = None,
    allow_downgrade: bool = False,
    timeout: float | None = None,
) -> Fetched:
    """Find, fetch and check a patch. The store gets its signature and where it was seen, not the patch.

    Args:
        ref: a repository (see ``parse_repo``) with a version, a channel, a commit, or nothing for the newest.
        store: its home remembers commits and signatures.
        guard: whom to trust; without one, signatures are kept but not checked.
        allow_downgrade: let a lower serial than one accepted here pass.
        timeout: seconds that any one step may take.

    Raises:
        UsageError: the reference is none.
        HubError: the repository, version or file is not there, or cannot be reached.
        TrustError: wrong bytes, false signature, revoked, downgrade, expired channel, moved tag.
        PatchFormatError: the file breaks the format.
    """
    ref = parse_repo(ref) if isinstance(ref, str) else ref
    remote, origins = connect(ref, timeout=timeout), Origins(store.root)
    if ref.on_hub and _offline():
        revision, tag = _offline_revision(ref, origins)
        fetched = fetch_revision(remote, ref, revision, store=store, guard=guard, allow_downgrade=allow_downgrade)
    else:
        refs = remote.refs()
        revocations = read_revocations(remote, refs.head, guard)
        revision, channel = _revision(ref, remote, refs, guard, revocations)
        fetched = fetch_revision(remote, ref, revision, store=store, guard=guard, allow_downgrade=allow_downgrade)
        revocations.check(fetched.patch)
        if channel is not None:
            channel.check_patch(fetched.patch)
        tag = channel.version if channel is not None else ref.revision
    patch = fetched.patch
    if tag not in (None, LATEST, patch.version) and not (ref.on_hub and _SHA.fullmatch(str(tag))):
        raise TrustError(
            f"{ref} holds version {patch.version} of {patch.name}; expected {tag}",
            "the tag was moved or set wrongly: ask its publisher, and use the digest you trust",
        )
    _remember(origins, fetched)
    return fetched


def fetch_revision(
    remote: Remote,
    ref: RepoRef,
    revision: str,
    *,
    store: Store,
    guard: Guard | None = None,
    allow_downgrade: bool = False,
) -> Fetched:
    """The patch at one revision, checked by itself: bytes, signature, format. Raises as ``fetch``."""
    material = _material(remote, ref, revision)
    # What the manifest announces bounds what is fetched: nobody's promise yet, but more bytes could not be right.
    limit = None if material is None else min(material.announced, size_limit(PATCH_FILE))
    data = remote.read(PATCH_FILE, revision, limit)
    if data is None:
        raise HubError(f"{ref} has no file {PATCH_FILE}", "is it a repository of a nest-runtime patch?")
    verified = None
    if guard is None:
        from nest_runtime.patch.file import from_bytes

        patch = from_bytes(data, f"{ref}: {PATCH_FILE}")
    else:
        from nest_runtime.trust.check import open_patch

        patch, verified = open_patch(
            data,
            material,
            guard.policy,
            guard.state,
            where=f"{ref}: {PATCH_FILE}",
            allow_downgrade=allow_downgrade or guard.allow_downgrade,
        )
    Origins(store.root).check_name(ref, patch.name)
    Origins(store.root).check(ref, patch.version, revision, patch.digest)
    if material is not None:
        from nest_runtime.trust.kept import keep_signature

        keep_signature(store.root, patch, material, verified=verified is not None)
    return Fetched(ref, revision, patch, material, verified, remote.url(revision))


def _material(remote: Remote, ref: RepoRef, revision: str) -> Material | None:
    manifest, signature = remote.read(MANIFEST_FILE, revision), remote.read(SIGNATURE_FILE, revision)
    if manifest is None and signature is None:
        return None
    if manifest is None or signature is None:
        missing = MANIFEST_FILE if manifest is None else SIGNATURE_FILE
        raise SignatureError(f"{ref} has no {missing}, but the other half of its signature", "ask its publisher")
    return Material(manifest, signature, f"the signature of {ref}")


def _revision(
    ref: RepoRef, remote: Remote, refs: Refs, guard: Guard | None, revocations: News
) -> tuple[str, Channel | None]:
    """Where the wanted patch lies, and the channel that said so, if one did.

    A name that can be a channel's is one where the repository has such a channel: anybody can set a tag, unsigned.
    """
    wanted = ref.revision
    if wanted is None or wanted == LATEST:
        return refs.head, None
    if _SHA.fullmatch(wanted) and ref.on_hub:
        return refs.tags.get(wanted, wanted), None
    channel = read_channel(remote, refs.head, wanted, guard) if may_be_channel(wanted) else None
    if channel is not None:
        channel.check_fresh(revocations=revocations.serial(channel.name))
        if channel.version in refs.tags:
            return refs.tags[channel.version], channel
        raise HubError(f"{ref} names {channel.version}, which {ref.place} does not have", _versions(refs))
    if wanted in USUAL_CHANNELS:
        near = did_you_mean(wanted, channels_like(remote, refs.head, wanted))
        raise HubError(f"{ref.place} has no channel {wanted!r}", near + "its publisher sets it with `channel set`")
    if wanted in refs.tags:
        return refs.tags[wanted], None
    if not ref.on_hub and not refs.tags:  # a plain download of one unsigned version
        return refs.head, None
    near = did_you_mean(wanted, [*channels_like(remote, refs.head, wanted), *refs.tags])
    raise HubError(f"{ref.place} has no revision {wanted!r}", near + _versions(refs))


def _versions(refs: Refs) -> str:
    if not refs.tags:
        return "it has no versions yet; leave the revision out"
    return f"it has {', '.join(sorted(refs.tags)[-8:])}"


def _offline() -> bool:
    from nest_runtime.hub.huggingface import is_offline

    return is_offline()


def _offline_revision(ref: RepoRef, origins: Origins) -> tuple[str, str | None]:
    """The commit that this machine last saw a version or channel at, and the version that it must hold, if known.

    What is not known the client's own cache may know.
    """
    wanted = ref.revision or LATEST
    known = origins.find(ref.place, wanted)
    if known is None:
        return wanted, wanted
    return known.revision, None if may_be_channel(wanted) else wanted


def _remember(origins: Origins, fetched: Fetched) -> None:
    ref, patch = fetched.ref, fetched.patch
    names = {patch.version}
    if ref.revision is None:
        names.add(LATEST)
    elif not _SHA.fullmatch(ref.revision):
        names.add(ref.revision)
    for name in sorted(names):
        origins.record(ref.place, name, fetched.revision, patch.digest, patch.name)
