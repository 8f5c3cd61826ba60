"""Activation with trust: check, store, activate, accept; all of it or nothing.

The command line, the demo and the server all make a patch the store's active one through this module. If a step
fails, the store names the same patch as before, and the trust memory has not accepted the new one: accepting is the
last step. Nothing is decided here: guard.py judges, store/store.py keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import BaseMismatch, StoreError
from nest_runtime.store.entries import Entry
from nest_runtime.trust.guard import keep_beside

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store
    from nest_runtime.trust.check import Verified
    from nest_runtime.trust.guard import Guard


@dataclass(frozen=True)
class SwitchRequest:
    """Who wants a switch, and why; for the histories.

    Attributes:
        who: ``user@host`` by default.
        why: their reason.
        allow_downgrade: going back to a lower serial is meant.
        serving: the digest of what a server answers with, where the switch is its own (Index.before).
    """

    who: str = ""
    why: str = ""
    allow_downgrade: bool = False
    serving: str | None = None


@dataclass(frozen=True)
class Activated:
    """A switch that was made.

    Attributes:
        entry: the patch that is active now.
        previous: the one that was, or None.
        verified: how it passed the guard; None if there is no guard.
    """

    entry: Entry
    previous: Entry | None
    verified: Verified | None


def activate(
    store: Store,
    patch: Patch,
    guard: Guard | None,
    asked: SwitchRequest,
    *,
    ref: str | Path | None = None,
    model_hash: str | None = None,
) -> Activated:
    """Make a patch the store's active one, and remember that it was accepted.

    Args:
        store: gets the patch, if it does not have it.
        patch: the patch.
        guard: whom to trust; None trusts everything.
        asked: who and why.
        ref: the reference that it was loaded by; the signature beside a file is what the patch is judged by, and is
            kept.
        model_hash: the model it has to be for; None for any.

    Raises:
        BaseMismatch: it is for another model.
        TrustError: as ``Guard.check``.
        StoreError: name and version are taken by other content, or the disk fails.
    """
    if model_hash is not None and patch.base_hash != model_hash:  # before anything of it is kept
        raise BaseMismatch(
            f"{patch.label} is for model {patch.base_hash}, not for {model_hash}",
            "activate a patch of this model; `nest-runtime list` shows them",
        )
    verified = None if guard is None else guard.check(patch, ref, allow_downgrade=asked.allow_downgrade)
    why = _with_downgrade(asked.why, verified)
    with store.transaction(who=asked.who, why=why):
        previous = store.active(patch.base_hash)
        store.add(patch, who=asked.who, why=why)
        if guard is None and ref is not None:
            keep_beside(store, patch, ref)
        entry = store.activate(patch.digest, model_hash=model_hash, serving=asked.serving, who=asked.who, why=why)
        _accept(guard, patch, verified, asked.who, why)
    return Activated(entry, previous, verified)


def roll_back(
    store: Store,
    guard: Guard | None,
    asked: SwitchRequest,
    *,
    model_hash: str | None = None,
    to: Patch | None = None,
) -> Activated:
    """Make the previously active patch active again, after the guard's checks; a lower serial is allowed.

    Args:
        store, guard, asked: as in ``activate``.
        model_hash: the model; may be left out if only one has an active patch.
        to: the patch that it must be; None for any.

    Raises:
        StoreError: there is nothing to go back to, or another patch than ``to``.
        UsageError: several models could be meant.
        TrustError: as ``Guard.check``.
    """
    target = store.previous(model_hash, serving=asked.serving)
    if target is None:
        return Activated(
            store.rollback(model_hash, serving=asked.serving), None, None
        )  # which says why there is none to go back to
    patch = store.read(target)
    verified = None if guard is None else guard.check(patch, allow_downgrade=True)
    why = _with_downgrade(asked.why, verified)
    with store.transaction(who=asked.who, why=why):
        previous = store.active(target.base_hash)
        entry = store.rollback(target.base_hash, serving=asked.serving, who=asked.who, why=why)
        if entry.digest != (to or patch).digest:
            raise StoreError(
                f"the store was changed meanwhile: it went back to {entry.key}, not to {(to or patch).version}",
                "look at `nest-runtime history`, then try again",
            )
        _accept(guard, patch, verified, asked.who, why)
    return Activated(entry, previous, verified)


def accept(
    patch: Patch, guard: Guard | None, asked: SwitchRequest, *, ref: str | Path | None = None
) -> Verified | None:
    """Check and remember a patch that becomes active without the store, on a server started with ``--patch``.

    Raises:
        TrustError: it is not trusted.
        StoreError: the store cannot be written.
    """
    verified = None if guard is None else guard.check(patch, ref, allow_downgrade=asked.allow_downgrade)
    _accept(guard, patch, verified, asked.who, asked.why)
    return verified


def _accept(guard: Guard | None, patch: Patch, verified: Verified | None, who: str, why: str) -> None:
    if guard is not None and verified is not None:
        guard.accept(patch, verified, who=who, why=why)


def _with_downgrade(why: str, verified: Verified | None) -> str:
    """The reason for the history, and with it that a downgrade was permitted."""
    if verified is None or verified.before is None:
        return why
    note = f"downgrade permitted: serial {verified.before.serial} to {verified.serial}"
    return f"{why} ({note})" if why else note
