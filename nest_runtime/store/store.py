"""The local store of patches, under $NEST_HOME/store: content by digest, names for it, and the history.

    objects/sha256/ab/abcd….safetensors   patches by digest; written once, never changed
    index.json                            names and versions, what is active, the head of the history
    history.jsonl                         who did what, when and why; hash-chained (history.py)

A change happens at one moment, when index.json is replaced. A process killed before it has changed nothing; one
killed after it has changed everything, and the next command writes the missing history line (``pending`` in the
index). One lock file keeps writers apart; readers need none. Patches that come with the package are listed too, and
never written to. Signatures are kept beside the patches (signatures.py), and not checked here.
"""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import BaseMismatch, StoreError, reason_of
from nest_runtime.escape import short
from nest_runtime.io import atomic_write, nest_home
from nest_runtime.store import history
from nest_runtime.store.entries import (
    Entry,
    builtin_entries,
    builtin_patches_dir,
    check_names,
    entry_of,
    match,
    model_name,
)
from nest_runtime.store.index import Index, read_index, undone
from nest_runtime.store.locked import locked
from nest_runtime.store.objects import read_object, write_object
from nest_runtime.store.signatures import drop_signatures, is_signed
from nest_runtime.store.spare import Spare

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

__all__ = ["Entry", "Store", "builtin_patches_dir"]

MAX_ROLLBACKS = 100
UNDO_BYTES = 8192  # of the entry that says what was undone


class Store:
    """Patches kept on this machine, and which of them is active for each model.

    Args:
        home: the folder that holds everything; ``$NEST_HOME`` by default. Made at the first write.
    """

    def __init__(self, home: str | Path | None = None) -> None:
        self.root = Path(home if home is not None else nest_home()) / "store"
        self._index_path = self.root / "index.json"
        self._lock_path = self.root / "lock"
        self._log = history.ChainLog(self.root / "history.jsonl")
        self._thread = threading.RLock()  # a transaction keeps other threads out, as the lock file does processes
        self._open: Index | None = None  # of the transaction under way

    def list(self, model_hash: str | None = None) -> list[Entry]:
        """Everything stored and built in, by base model, name and serial; of one base if ``model_hash`` is given."""
        index = self._load()
        known = [e.marked(active=index.is_active(e)) for e in self._known(index)]
        entries = [replace(e, signed=is_signed(self.root, e)) for e in known]
        chosen = [e for e in entries if model_hash is None or e.base_hash == model_hash]
        return sorted(chosen, key=lambda e: (e.base_model, e.base_hash, e.name, e.serial, e.version))

    def find(self, ref: str, *, model_hash: str | None = None) -> Entry:
        """The entry of ``v3``, ``name@v3`` or ``sha256:…``.

        Raises:
            PatchNotFound: there is none.
            UsageError: several match.
        """
        return match(ref, self.list(), model_hash)

    def get(self, ref: str, *, model_hash: str | None = None) -> Patch:
        """The patch that ``ref`` names, its bytes checked against its digest.

        Raises:
            PatchNotFound: there is none.
            UsageError: several match.
            DigestMismatch, PatchFormatError: its file is damaged.
        """
        return self.read(self.find(ref, model_hash=model_hash))

    def active(self, model_hash: str) -> Entry | None:
        """The entry of the patch that is active for a model, or None."""
        entry = self._load().active_entry(model_hash)
        return entry.marked(active=True) if entry else None

    def previous(self, model_hash: str | None = None, *, serving: str | None = None) -> Entry | None:
        """The entry that ``rollback`` would make active, or None. Raises StoreError or UsageError as it does."""
        index = self._load()
        left = index.before(model_hash or index.only_model(), serving)
        return left[-1] if left else None

    def active_patch(self, model_hash: str) -> Patch | None:
        """The patch that is active for a model, verified like ``get``, or None."""
        entry = self.active(model_hash)
        return self.read(entry) if entry else None

    def add(self, source: Patch | str | Path, *, who: str = "", why: str = "") -> Entry:
        """Keep a patch, or a patch file, under its name and version.

        Adding the same content again changes nothing.

        Raises:
            StoreError: that name and version already stand for other content.
            PatchFormatError, DigestMismatch: the file is no valid patch.
        """
        patch = _as_patch(source)
        from nest_runtime.patch.write import to_bytes

        data = to_bytes(patch)
        entry = entry_of(patch, len(data))
        check_names(entry)
        with self._writing() as index:
            for known in self._known(index):
                if (known.base_hash, known.key) != (entry.base_hash, entry.key):
                    continue
                if known.digest == entry.digest:
                    return known.marked(active=index.is_active(known))
                raise StoreError(
                    f"{entry.key} is already {short(known.digest)} for this model; this file is {short(entry.digest)}",
                    "a version never changes: give the new patch another version",
                )
            write_object(self.root, entry.digest, data)
            index.patches.append(entry)
            self._commit(index, "add", entry, who, why)
        return entry

    def remove(self, ref: str, *, model_hash: str | None = None, who: str = "", why: str = "") -> Entry:
        """Forget a patch. Its bytes stay until ``gc``. Raises StoreError for the active one and for built-in ones."""
        with self._writing() as index:
            entry = match(ref, self._known(index), model_hash)
            if entry.builtin:
                raise StoreError(
                    f"{entry.key} comes with the package and is read-only", "only added patches can be removed"
                )
            if index.is_active(entry):
                raise StoreError(f"{entry.key} is active", "activate another patch first, or roll back")
            index.patches = [e for e in index.patches if e != entry]
            stack = [e for e in index.active.get(entry.base_hash, []) if e.digest != entry.digest]
            if stack:
                index.active[entry.base_hash] = stack
            self._commit(index, "remove", entry, who, why)
        return entry

    def activate(
        self, ref: str, *, model_hash: str | None = None, serving: str | None = None, who: str = "", why: str = ""
    ) -> Entry:
        """Make a patch the active one of its base model, after checking its bytes. ``serving``: as in ``rollback``.

        Raises:
            BaseMismatch: a digest names a patch of another base than ``model_hash``.
            NestError: as ``get``.
        """
        from nest_runtime.patch.write import to_bytes

        with self._writing() as index:
            entry = match(ref, self._known(index), model_hash)
            if model_hash is not None and entry.base_hash != model_hash:
                raise BaseMismatch(
                    f"{entry.key} is for model {entry.base_hash}, not for {model_hash}",
                    "activate a patch of this model; `nest-runtime list` shows them",
                )
            patch = self.read(entry)
            if entry.builtin:  # its bytes are kept, so that an update of the package cannot take an active patch away
                write_object(self.root, entry.digest, to_bytes(patch))
            stack = index.active.setdefault(entry.base_hash, [])
            del stack[len(index.before(entry.base_hash, serving)) + 1 :]  # what a server never had on
            if not stack or stack[-1].digest != entry.digest:
                stack.append(entry)
                del stack[:-MAX_ROLLBACKS]
            self._commit(index, "activate", entry, who, why)
        return entry.marked(active=True)

    def rollback(
        self, model_hash: str | None = None, *, serving: str | None = None, who: str = "", why: str = ""
    ) -> Entry:
        """Make the previously active patch active again; returns it. Repeated, it goes further back.

        Args:
            model_hash: the model; may be left out if only one has an active patch.
            serving: the digest of the patch to leave, if it is a server's and not the store's (Index.before).
            who, why: for the history.

        Raises:
            StoreError: there is nothing to go back to.
            UsageError: several models could be meant.
        """
        with self._writing() as index:
            model = model_hash or index.only_model()
            left = index.before(model, serving)
            if not left:
                first = index.active_entry(model)
                now = f"{first.key} is the first patch activated" if first else "no patch is active"
                name = model_name(model, self.list())
                raise StoreError(f"{now} for {name}: nothing to roll back to", "activate a patch by name instead")
            entry = left[-1]
            self.read(entry)
            index.active[model] = left
            self._commit(index, "rollback", entry, who, why)
        return entry.marked(active=True)

    @contextmanager
    def transaction(self, *, who: str = "", why: str = "") -> Iterator[None]:
        """A context whose changes all hold, or none: an error restores names and active patches.

        No other process changes the store meanwhile. The history keeps what was done, and gets one more entry,
        ``undo``. A process that is killed inside leaves what it had done.

        Raises:
            StoreError: restoring fails as well; the message says what is active.
        """
        with self._writing() as index:
            before = index.copy()
            room = len(before.to_bytes()) + 6 * len(who + why) + UNDO_BYTES  # at most six for a character
            with Spare(self._index_path, self.root / "tmp", room) as spare:
                self._open = index
                try:
                    yield
                except BaseException as error:
                    self._put_back(before, who, why, error, spare)
                    raise
                finally:
                    self._open = None

    def _put_back(self, before: Index, who: str, why: str, error: BaseException, spare: Spare) -> None:
        reason = f"{type(error).__name__}: {getattr(error, 'message', '') or error}"[:500]
        event = {"who": who or history.actor(), "what": "undo", "why": f"{why} ({reason})" if why else reason}
        try:
            restored = undone(self._load(), before, self._last_written(), event)
            if restored is not None:
                spare.write(restored.to_bytes())
        except (OSError, StoreError) as failed:
            raise StoreError(
                f"{error}; and undoing it failed: {failed}",
                "the store may name what was refused: look at `nest-runtime list`, then activate what you want",
            ) from error
        if restored is not None and restored.pending:
            with contextlib.suppress(OSError):  # it is owed: the next command writes it
                self._pay(restored)

    def _last_written(self) -> dict[str, Any] | None:
        """The last entry of the history file; None if it cannot be read, for then it could not be written either."""
        try:
            return self._log.last()
        except OSError:
            return None

    def history(self, model_hash: str | None = None) -> builtins.list[dict[str, Any]]:
        """All changes, oldest first: seq, at, who, what, why, name, version, digest, base_hash, prev, hash."""
        index, lines = self._load(), self._log.read()
        if index.pending and index.head and (not lines or lines[-1]["hash"] != index.head["hash"]):
            lines.append(index.head)
        return [line for line in lines if model_hash is None or line.get("base_hash") == model_hash]

    def verify_history(self) -> int:
        """The number of history entries, if their chain is whole and ends where the index says.

        Raises:
            StoreError: the message names the first line that was edited or is missing.
        """
        if not self.root.exists():
            return 0
        with self._writing() as index:
            return self._log.verify(index.head)

    def gc(self, *, who: str = "", why: str = "") -> builtins.list[str]:
        """Delete objects that no name or activation needs, and leftovers of killed processes; returns the digests."""
        if not self.root.exists():
            return []
        with self._writing() as index:
            stacked = [entry.digest for stack in index.active.values() for entry in stack]
            needed = {entry.digest for entry in index.patches} | set(stacked)
            objects = sorted((self.root / "objects").glob("*/*/*.safetensors"))
            found = {f"{path.parent.parent.name}:{path.stem}": path for path in objects}
            removed = [digest for digest in found if digest not in needed]
            if removed:  # written down before it is done: what a killed process leaves, the next one removes
                self._commit(index, "gc", None, who, why, removed=removed)
            drop_signatures(self.root, removed)
            for digest in removed:
                found[digest].unlink()
            for path in (self.root / "tmp").glob(".*.tmp"):  # only writers make these, and this is the only one now
                path.unlink()
        return removed

    def _known(self, index: Index) -> builtins.list[Entry]:
        """Stored entries, then built-in ones whose name and version the store does not have."""
        taken = {(entry.base_hash, entry.key) for entry in index.patches}
        built_in = [entry for entry, _ in builtin_entries().values() if (entry.base_hash, entry.key) not in taken]
        return index.patches + built_in

    def read(self, entry: Entry) -> Patch:
        """The patch of an entry, its bytes checked against its digest. Raises as ``get``."""
        return read_object(self.root, entry)

    def _load(self) -> Index:
        return read_index(self._index_path)

    @contextmanager
    def _writing(self) -> Iterator[Index]:
        """The index, with the lock held and whatever a killed process still owed to the history written."""
        with self._thread:
            if self._open is not None:
                yield self._open
                return
            with self._locked() as index:
                yield index

    @contextmanager
    def _locked(self) -> Iterator[Index]:
        try:
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {reason_of(error)}", "set NEST_HOME elsewhere"
            ) from error
        with locked(self._lock_path):
            index = self._load()
            if index.pending:
                self._pay(index)
            yield index

    def _commit(self, index: Index, what: str, entry: Entry | None, who: str, why: str, **more: Any) -> None:
        """Put a change in force: replace the index, then write its history line."""
        named = {key: getattr(entry, key, None) for key in ("name", "version", "digest", "base_hash")}
        event = {"who": who or history.actor(), "what": what, "why": why, **named, **more}
        index.head, index.pending = history.seal(event, index.head), True
        self._save(index)
        self._pay(index)

    def _pay(self, index: Index) -> None:
        """Write the history line that the index owes, unless it stands already, and note that it does."""
        head: Mapping[str, Any] | None = index.head
        last = self._log.last()
        if head is not None and (last is None or last["hash"] != head["hash"]):
            self._log.write(head)
        index.pending = False
        self._save(index)

    def _save(self, index: Index) -> None:
        atomic_write(self._index_path, index.to_bytes(), workdir=self.root / "tmp")


def _as_patch(source: Patch | str | Path) -> Patch:
    if isinstance(source, str | Path):
        from nest_runtime.patch.file import read_patch

        return read_patch(Path(source))
    return source
