"""What the tabs share: the backend, the store, the visitor's rights, and the patches to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nest_runtime.demo.backend import BASE, Backend, PatchChoice, find
from nest_runtime.demo.local import LocalBackend
from nest_runtime.errors import NestError
from nest_runtime.model.load import REFERENCE

if TYPE_CHECKING:
    from nest_runtime.demo.examples import Offer
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.entries import Entry
    from nest_runtime.store.store import Store


@dataclass(frozen=True)
class DemoState:
    """One demo.

    Attributes:
        backend: what answers.
        store: whose patches are shown; pulls go there.
        is_refusal: how a refusal is known.
        admin: whether the buttons that change things exist.
        max_tokens: of an answer.
        model_ref: the model as one names it in a command; empty for a server.
        is_known: how an answer that makes sense in the model's world is known; None if that cannot be told.
    """

    backend: Backend
    store: Store
    is_refusal: Callable[[str], bool]
    admin: bool = False
    max_tokens: int = 128
    model_ref: str = ""
    is_known: Callable[[str], bool] | None = None
    _read: dict[str, Patch] = field(default_factory=dict)

    @property
    def local(self) -> LocalBackend | None:
        """The backend, where the model is in this process."""
        return self.backend if isinstance(self.backend, LocalBackend) else None

    @property
    def offer(self) -> Offer:
        """What fits the model: the reference world's prompts, or everyday and harmful ones."""
        from nest_runtime.demo.examples import reference_offer
        from nest_runtime.demo.real import real_offer

        return reference_offer() if self.backend.name == REFERENCE else real_offer()

    def entries(self) -> list[Entry]:
        """The patches for the model; none where the model's hash is not known."""
        if self.local is not None:
            return self.local.entries()
        return [] if self.backend.model_hash is None else self.store.list(self.backend.model_hash)

    def entry(self, digest: str | None) -> Entry:
        """One of them. Raises PatchNotFound."""
        from nest_runtime.errors import PatchNotFound

        found = next((entry for entry in self.entries() if entry.digest == digest), None)
        if found is None:
            raise PatchNotFound("no patch is chosen, or it is gone", "choose one of the list; reload the page")
        return found

    def patch(self, digest: str) -> Patch:
        """A patch by its digest, read once. Raises what ``Store.get`` raises."""
        if digest not in self._read:
            self._read[digest] = self.local.patch(digest) if self.local is not None else self.store.get(digest)
        return self._read[digest]

    def called(self, digest: str) -> str:
        """What a patch is called on the page: its version, or ``name@version`` where versions collide."""
        entries = self.entries()
        entry = self.entry(digest)
        alone = [item.version for item in entries].count(entry.version) == 1
        return entry.version if alone else entry.key

    def names(self) -> list[tuple[str, str]]:
        """What the patches are called, and their digests, for a list to choose from."""
        return [(self.called(entry.digest), entry.digest) for entry in self.entries()]

    def newest(self) -> str | None:
        """Digest of the patch to look at first."""
        preferred = self.backend.preferred()
        entries = self.entries()
        if preferred is not None and preferred.digest in {entry.digest for entry in entries}:
            return preferred.digest
        return max(entries, key=lambda entry: entry.serial).digest if entries else None

    def sides(self, label: str | None, on: bool) -> tuple[PatchChoice, PatchChoice]:
        """Who answers left and right: the base, and the chosen patch or, with the patch off, the base too.

        Where a server does not expose its base, the patch stands on both sides.
        """
        choices = self.backend.choices()
        chosen = find(choices, label) or self.backend.preferred() or PatchChoice(BASE)
        left = find(choices, BASE) or chosen
        return left, chosen if on else PatchChoice(BASE)

    def has_base(self) -> bool:
        """Whether the base may be asked: a server shows it only where its operator says so."""
        return find(self.backend.choices(), BASE) is not None

    def signature(self, entry: Entry) -> str:
        """What is known of a patch's signature here, in a few words."""
        from nest_runtime.trust.guard import guard_for

        guard = guard_for(self.store)
        if guard is None:
            return "signed, not checked (no key is trusted here)" if entry.signed else "not signed"
        try:
            verified = guard.check(self.patch(entry.digest), allow_downgrade=True)
        except NestError as error:
            return f"refused: {error.message}"
        return f"good, by {verified.key}" if verified.signed_by else "not signed; the trust policy lets it pass"
