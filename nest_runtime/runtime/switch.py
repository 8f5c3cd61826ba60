"""PatchRuntime: the table of patches on a live model, and the atomic switch between them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from nest_runtime.errors import BaseMismatch, NestError, UsageError
from nest_runtime.model.anatomy import find_projections, weight_of
from nest_runtime.patch.patch import Patch, check_sites
from nest_runtime.runtime import checks
from nest_runtime.runtime.bank import Bank
from nest_runtime.runtime.delta import LiveProjection, Loaded, live_projections, settle
from nest_runtime.runtime.expert_delta import module_deltas
from nest_runtime.runtime.fold import FoldRecord, Journal, fold, follow, read_rows, unfold
from nest_runtime.runtime.hooks import Board, Wiring, trunk_of
from nest_runtime.runtime.selection import Active, Selection
from nest_runtime.runtime.table import Table

Mode = Literal["auto", "hook", "fold"]
KEPT_FOLDS = 2  # patches whose folded rows are kept, to be copied the next time: as much memory again as their rows


class PatchRuntime:
    """Puts patches on a model, switches between them, and takes them off without a trace.

    A model has at most one runtime. Methods may be called from any thread. A forward pass uses one
    patch from its first layer to its last: a switch counts from the next pass on. ``generate`` makes
    many passes; pin them with ``using``. Whatever raises leaves the state as it was.

    Args:
        model: a Hugging Face causal LM (wrapped by PEFT or torch.compile if need be). Untouched until
            the first ``add``.
        base_hash: the model's hash where the caller knows it (``LoadedModel.hash``): saves hashing the
            weights at the first ``add``. The rows a patch changes are compared all the same.

    Raises:
        UnknownArchitecture: no FFN projections are known for the model.
    """

    def __init__(self, model: nn.Module, *, base_hash: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"PatchRuntime got a {type(model).__name__}; expected a model, a torch.nn.Module",
                "make it of the model, then add patches to it",
            )
        self._model = model
        self._hash = base_hash
        self._hashed = base_hash is not None
        self._projections: dict[str, LiveProjection] = live_projections(model)
        self._board = Board(trunk_of(model, find_projections(model)[0].module))
        self._wiring = Wiring(self._board)
        self._bank: Bank | None = None
        self._table = Table()
        self._folds: dict[Loaded, FoldRecord] = {}  # of the patches folded last, the latest at the end
        self._lock = threading.RLock()  # one change at a time
        self._closed = False

    @property
    def model(self) -> nn.Module:
        """The model that this runtime switches patches on."""
        return self._model

    @property
    def patches(self) -> dict[str, Patch]:
        """The patches in the table, by key: ``v3``, or ``name@v3`` if two names have the same version."""
        return {self._table.key(entry): entry.patch for entry in self._table}

    @property
    def active(self) -> str | None:
        """The key of the patch that is active for everybody; None is the base."""
        loaded = self._board.active.loaded
        return None if loaded is None else self._table.key(loaded)

    @property
    def active_patch(self) -> Patch | None:
        """The patch that is active for everybody; None is the base."""
        loaded = self._board.active.loaded
        return None if loaded is None else loaded.patch

    @property
    def mode(self) -> str | None:
        """``hook`` or ``fold`` while a patch is active, else None."""
        return self._board.active.mode

    @property
    def current(self) -> tuple[str | None, ...]:
        """What a forward pass made here and now would use: one key, or None for the base.

        Inside ``using_rows`` and ``using_tokens`` there may be several.
        """
        chosen = self._board.choice or Selection.whole(self._board.active.loaded)
        return tuple(None if entry is None else self._table.key(entry) for entry, _ in chosen.runs)

    @property
    def forced(self) -> tuple[str, ...]:
        """Digests of the patches that were added although the check of the base failed."""
        return tuple(entry.patch.digest for entry in self._table if entry.forced)

    def add(
        self, patch: Patch, *, force: bool = False, pause: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> str:
        """Check a patch against the model and put it into the table; nothing is switched on.

        The first call hashes the model unless the hash was given. Adding the same content again does nothing.

        Args:
            patch: the patch.
            force: accept another base with a warning; recorded in ``forced``. Shapes must fit even so.
            pause: gives a context in which no forward pass runs; entered after all checks, while hooks are put on.
                Only a caller needs it whose passes run in other threads.

        Returns:
            The key that finds it.

        Raises:
            SiteMismatch: the model lacks a site, or has it in another shape.
            BaseMismatch: the model is not the patch's base, or its rows were changed.
            NestError: other content is here under the same name and version.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._refuse_closed()
            known = self._table.same(patch)
            if known is not None:
                return self._table.key(known)
            check_sites(patch, [live.projection for live in self._projections.values()])
            base = checks.LiveBase(self._model, self._projections, self._base_hash(), self._pristine)
            saved = checks.saved_rows(patch, base)
            forced = self._check_base(patch, base, saved, force)
            loaded = Loaded(patch, module_deltas(patch, self._projections), saved, forced)
            with pause():
                self._connect(loaded)
            self._table.insert(loaded)
            return self._table.key(loaded)

    def remove(self, version: str) -> None:
        """Forget a patch.

        Raises:
            PatchNotFound: it is not here.
            NestError: it is active, or a context uses it.
        """
        with self._lock:
            loaded = self._table.find(version)
            if self._board.active.loaded is loaded:
                raise NestError(f"{loaded.full_name} is active", "activate another patch or deactivate() first")
            pins = self._board.pins(loaded)
            if pins:
                raise NestError(f"{loaded.full_name} is in use by {pins} using() contexts", "let them end first")
            self._table.delete(loaded)
            self._folds.pop(loaded, None)
            if self._bank is not None:
                self._bank.remove(loaded)

    def activate(self, version: str, mode: Mode = "auto") -> None:
        """Switch a patch on for everybody, in place of the one that is on.

        Args:
            version: a key of ``patches``, ``name@version`` or a digest.
            mode: ``hook`` adds the update to the projections' outputs; it switches by one assignment,
                works on quantized weights, and in bfloat16 and float16 keeps digits that a sum with the weights
                would round away. ``fold`` writes the update into the weights: passes cost what the base's do,
                a switch waits for running passes, and ``using`` another patch costs a little more. ``auto`` is
                ``hook``: the safer of the two. It cost 0 to 3 % of a pass in float32 at 36 M parameters, 11 to 13 % in
                bfloat16 on a CPU, 18 % at worst on a model of 2 M (docs/decisions/runtime.md).

        Raises:
            PatchNotFound: it is not here.
            ModelError: fold on quantized weights.
            BaseMismatch: fold, and something else changed the rows since the patch was added.
            UsageError: no such mode.
            NestError: fold or unfold from inside a forward pass.
        """
        if mode not in ("auto", "hook", "fold"):
            raise UsageError(f"mode is {mode!r}; expected auto, hook or fold", "hook is the default")
        with self._lock:
            self._refuse_closed()
            self._switch(self._table.find(version), "hook" if mode == "auto" else mode)

    def deactivate(self) -> None:
        """Switch to the base; folded rows get their pristine bits back. Raises the same errors as ``activate``."""
        with self._lock:
            self._switch(None, None)

    @contextmanager
    def using(self, version: str | None) -> Iterator[None]:
        """Use one patch, or the base for None, in this thread or asyncio task only.

        Contexts nest. Asyncio tasks and ``asyncio.to_thread`` inherit the choice; threads started inside do not.

        Raises:
            PatchNotFound: the patch is not in the table.
        """
        with self._override(Selection.whole(self._find(version))):
            yield

    @contextmanager
    def using_rows(self, versions: Iterable[str | None]) -> Iterator[None]:
        """Use a separate patch for each row of the batches that run inside.

        Args:
            versions: a key, or None for the base, for every row of the batch [rows, tokens]. Beams and
                several returned sequences are rows too.

        Raises:
            PatchNotFound: a patch is not in the table.
            UsageError: in the forward pass, if its batch has another number of rows.
        """
        with self._override(Selection.of("rows", [(self._find(version), 1) for version in versions])):
            yield

    @contextmanager
    def using_tokens(self, slots: Iterable[tuple[str | None, int]]) -> Iterator[None]:
        """Use patches for runs of tokens in a flat batch, as continuous batching makes them.

        Args:
            slots: (key or None for the base, number of tokens), in the order of the batch [1, tokens]; the
                numbers must add up to the batch's tokens, padding included.

        Raises:
            PatchNotFound: a patch is not here.
            UsageError: a negative number; or, in the forward pass, another number of tokens.
        """
        known: dict[str | None, Loaded | None] = {}
        runs = []
        for version, count in slots:
            if version not in known:
                known[version] = self._find(version)
            runs.append((known[version], int(count)))
        if any(count < 0 for _, count in runs):
            raise UsageError(f"token counts are {[count for _, count in runs]}", "counts cannot be negative")
        with self._override(Selection.of("tokens", runs)):
            yield

    def close(self) -> None:
        """Switch to the base and take hooks and buffers off the model. Closing twice is fine.

        Raises:
            NestError: a ``using`` context is still open: its passes would continue without their patch.
        """
        with self._lock:
            if self._closed:
                return
            pins = self._board.pins()
            if pins:
                raise NestError(f"{pins} using() contexts are open", "let them end before close()")
            self._switch(None, None)
            self._closed = True
            self._wiring.remove()
            if self._bank is not None:
                self._bank.close()
            self._bank, self._table, self._folds = None, Table(), {}

    def __enter__(self) -> PatchRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"active {self.active} ({self.mode})" if self.active else "base"
        return f"<PatchRuntime on {type(self._model).__name__}: {state}; holds {', '.join(self.patches) or 'none'}>"

    def _switch(self, loaded: Loaded | None, mode: str | None) -> None:
        """The one place where ``active`` changes."""
        before = self._board.active
        if before.loaded is loaded and before.mode == mode:
            return
        with torch.inference_mode(False), torch.no_grad():
            if before.fold is None and mode != "fold":
                self._publish(Active(loaded, mode))
                return
            with self._board.pass_lock.exclusive():
                self._refold(before, loaded, mode)

    def _refold(self, before: Active, loaded: Loaded | None, mode: str | None) -> None:
        devices = self._devices()
        journal = Journal()
        settle(devices)  # passes that have returned may still be running on the device
        try:
            record = self._fold(before.fold, loaded if mode == "fold" else None, journal)
            settle(devices)
            self._publish(Active(loaded, mode, record))
        except BaseException:
            journal.roll_back()
            settle(devices)
            raise

    def _fold(self, now: FoldRecord | None, loaded: Loaded | None, journal: Journal) -> FoldRecord | None:
        """Take out what is folded and fold ``loaded`` in; gives the record of that."""
        kept = None if loaded is None else self._folds.pop(loaded, None)
        if now is not None:
            if follow(now, kept, journal):
                self._keep(kept)
                return kept
            unfold(now, journal)
        if loaded is None:
            return None
        record = fold(loaded, self._projections, journal, kept)
        self._keep(record)
        return record

    def _keep(self, record: FoldRecord | None) -> None:
        """Remember a fold as the latest."""
        if record is not None:
            self._folds[record.loaded] = record
        while len(self._folds) > KEPT_FOLDS:
            del self._folds[next(iter(self._folds))]

    def _devices(self) -> set[torch.device]:
        """Where the weights are; empty on a CPU alone, where nothing is left to wait for."""
        if not torch.cuda.is_available():
            return set()
        weights = [weight_of(live.module, live.projection) for live in self._projections.values()]
        return {weight.device for weight in weights if weight is not None}

    def _publish(self, active: Active) -> None:
        if self._bank is not None:
            self._bank.select(None if active.fold is not None else active.loaded)
        self._board.active = active

    def _override(self, selection: Selection):  # type: ignore[no-untyped-def]
        self._refuse_closed()
        return self._board.override(selection)

    def _find(self, version: str | None) -> Loaded | None:
        return None if version is None else self._table.find(version)

    def _connect(self, loaded: Loaded) -> None:
        """Hooks and buffers for a new patch; neither changes what a pass computes."""
        modules = {live.key: live.module for live in self._projections.values()}
        if self._bank is None:
            first = next(iter(self._projections.values()))
            weight = weight_of(first.module, first.projection)
            self._bank = Bank(self._board.trunk, torch.device("cpu") if weight is None else weight.device)
        try:
            self._bank.add(loaded, modules)
            self._wiring.cover(self._projections, loaded.deltas)
        except BaseException:
            self._bank.remove(loaded)
            raise

    def _check_base(self, patch: Patch, base: checks.LiveBase, saved: dict[str, torch.Tensor], force: bool) -> bool:
        """Check the base with ``saved`` rows [n, d_in] by site; returns whether the check failed and was overridden."""
        try:
            checks.check_base(patch, base, saved)
        except BaseMismatch as error:
            if not force:
                raise
            warnings.warn(f"forced onto another base: {error.message}", stacklevel=3)
            return True
        return False

    def _base_hash(self) -> str | None:
        if not self._hashed:
            self._hash, self._hashed = checks.memory_hash(self._model), True
        return self._hash

    def _pristine(self, live: LiveProjection, neurons: torch.Tensor) -> torch.Tensor:
        record = self._board.active.fold
        return read_rows(live, neurons) if record is None else record.rows(live, neurons)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise NestError("this PatchRuntime is closed", "make a new one for the model")
