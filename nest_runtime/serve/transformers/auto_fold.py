"""While everybody is answered under one patch, its update is folded into the weights and costs nothing.

Hooks compute any mixture of patches, at a price (docs/decisions/engine.md). After a while in which everything runs
under one patch, that patch is folded into the weights between two steps. The first step with anything else unfolds
it. Answers are the same either way in float32. In narrower formats folding rounds small updates away, and quantized
weights cannot be folded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from nest_runtime.errors import NestError
from nest_runtime.runtime import PatchRuntime

FOLD_AFTER = 64  # steps: a fold costs less than one, so that traffic which alternates wastes under 2 %

log = logging.getLogger("nest_runtime.serve.engine")


class AutoFold:
    """Folds and unfolds for one engine.

    Args:
        runtime: the patches; nothing else may activate one while this is in use.
        wanted: whether to fold at all.
    """

    def __init__(self, runtime: PatchRuntime, *, wanted: bool) -> None:
        self._runtime = runtime
        self._wanted = wanted
        self._lock = threading.Lock()
        self._holds = 0
        self._folded: str | None = None
        self._alone: str | None = None  # the patch that everything ran under lately,
        self._steps = 0  # and for how many steps

    @property
    def folded(self) -> str | None:
        """The key of the folded patch, or None."""
        return self._folded

    def before_step(self, patches: Collection[str | None]) -> None:
        """Called by the engine's thread with the keys that the coming step computes under."""
        alone = next(iter(patches)) if len(patches) == 1 else None
        self._steps = self._steps + 1 if alone is not None and alone == self._alone else 0
        self._alone = alone
        stale = self._folded is not None and self._folded != alone
        due = self._wanted and alone not in (None, self._folded) and self._steps >= FOLD_AFTER
        if not stale and not due:
            return
        with self._lock:
            if self._holds:
                return
            if stale:
                self._unfold()
            if due and alone is not None:
                self._fold(alone)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A context in which nothing is folded or unfolded: the runtime is busy, and a step must not wait for it."""
        with self._lock:
            self._holds += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds -= 1

    def unfold(self) -> None:
        """Unfold the folded patch; only while no step runs."""
        with self._lock:
            if self._folded is not None:
                self._unfold()

    def _fold(self, patch: str) -> None:
        try:
            self._runtime.activate(patch, mode="fold")
        except NestError as error:
            self._wanted = False
            log.warning("patches are not folded in any more: %s", error)
        else:
            self._folded = patch

    def _unfold(self) -> None:
        self._runtime.deactivate()
        self._folded, self._steps = None, 0
