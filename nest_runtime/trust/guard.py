"""The guard before every activation: one policy, this machine's memory, and the store's signatures.

The command line and the server both use it. It finds the signature of a patch (beside its file, in the store, or
beside a patch that comes with the package), calls trust.check_trust, and remembers what became active. It decides
nothing itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import NestError, SignatureError
from nest_runtime.io import expand
from nest_runtime.store.entries import builtin_entries, is_path
from nest_runtime.trust.check import Verified, check_trust, remember
from nest_runtime.trust.kept import keep_signature, kept_signatures
from nest_runtime.trust.material import Material, patch_path, read_material
from nest_runtime.trust.policy import Policy, policy_for
from nest_runtime.trust.state import TrustState

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.store import Store

log = logging.getLogger("nest_runtime.trust")


class Guard:
    """Checks patches under one policy.

    Args:
        policy: whom to trust with what.
        store: whose signatures to use; its home also holds the memory.
        state: the memory, where it lies elsewhere.
        allow_downgrade: let lower serials pass always, on the operator's word.
    """

    def __init__(
        self, policy: Policy, store: Store, state: TrustState | None = None, *, allow_downgrade: bool = False
    ) -> None:
        self.policy = policy
        self.state = state or TrustState(store.root.parent)
        self.allow_downgrade = allow_downgrade
        self._store = store
        self._seen: dict[str, Material] = {}  # by digest: what lay beside files that were loaded

    def check(self, patch: Patch, ref: str | Path | None = None, *, allow_downgrade: bool = False) -> Verified:
        """Check whether a patch may be active; raises what ``check_trust`` raises.

        Args:
            patch: the patch.
            ref: the reference it was loaded by; for a path, the signature beside it is used.
            allow_downgrade: somebody says that going back is meant.
        """
        first: SignatureError | None = None
        candidates: list[Material | None] = [*self._materials(patch, ref)]
        for material in candidates or [None]:
            try:
                verified = check_trust(
                    patch, material, self.policy, self.state, allow_downgrade=allow_downgrade or self.allow_downgrade
                )
            except SignatureError as error:  # another key's may stand beside one that does not count
                first = first or error
                continue
            if material is not None:
                self._seen[patch.digest] = material
            else:
                log.warning("%s@%s is not signed; the trust policy lets it pass", patch.name, patch.version)
            return verified
        assert first is not None  # there is always something to judge by
        raise first

    def accept(self, patch: Patch, verified: Verified, *, who: str = "", why: str = "") -> None:
        """Keep a patch's signature in the store for the next start, and remember that the patch is active now."""
        if (material := self._seen.get(patch.digest)) is not None:
            keep_signature(self._store.root, patch, material, verified=True)
        remember(verified, self.state, who=who, why=why)

    def material(self, patch: Patch, ref: str | Path | None = None) -> Material | None:
        """The manifest and signature that come first, or None for an unsigned patch; nothing is verified here."""
        return next(iter(self._materials(patch, ref)), None)

    def _materials(self, patch: Patch, ref: str | Path | None) -> list[Material]:
        """What to judge a patch by: what lies beside its file alone, else all that is known of it."""
        if ref is not None and is_path(ref):
            beside = read_material(patch_path(expand(ref)))
            if beside is not None:
                return [beside]
        found = [self._seen.get(patch.digest), *kept_signatures(self._store.root, patch, self.policy)]
        return [material for material in (*found, _builtin_material(patch)) if material is not None]

    def newest_good(self, base_hash: str, name: str, *, but: Iterable[str] = ()) -> tuple[Patch, Verified] | None:
        """The stored patch of that name with the highest serial that passes, or None.

        A server turns to it when its patch is revoked. Versions that are refused are logged and skipped.

        Args:
            base_hash: the model.
            name: the patches' name.
            but: digests to leave out.
        """
        entries = [e for e in self._store.list(base_hash) if e.name == name and e.digest not in set(but)]
        for entry in sorted(entries, key=lambda e: e.serial, reverse=True):
            try:
                patch = self._store.get(entry.digest)
                return patch, self.check(patch)
            except NestError as error:
                log.warning("%s is no way out: %s", entry.key, error.message)
        return None


def guard_for(
    store: Store,
    keys: Iterable[Path] = (),
    *,
    require_signature: bool = False,
    policy_file: Path | None = None,
    allow_downgrade: bool = False,
) -> Guard | None:
    """The guard that a command's options and ``$NEST_HOME/trust.toml`` ask for; None if nothing asks for one.

    Args:
        store: where signatures and what was accepted are kept.
        keys: ``--trust``.
        require_signature, policy_file, allow_downgrade: the options of these names.

    Raises:
        UsageError: as ``policy_for``.
    """
    policy = policy_for(keys, require_signature=require_signature, file=policy_file)
    return None if policy is None else Guard(policy, store, allow_downgrade=allow_downgrade)


def keep_beside(store: Store, patch: Patch, ref: str | Path) -> bool:
    """Keep the signature that lies beside a patch file, before the patch is added; returns whether there was one.

    Raises:
        SignatureError: it is about another patch: a stale signature must not pass for one.
    """
    if not is_path(ref):
        return False
    material = read_material(patch_path(expand(ref)))
    if material is None:
        return False
    keep_signature(store.root, patch, material)
    return True


def _builtin_material(patch: Patch) -> Material | None:
    found = builtin_entries().get(patch.digest)
    return read_material(found[1]) if found else None
