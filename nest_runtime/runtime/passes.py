"""A readers-writer lock: forward passes share the model, a change of weights has it alone. Knows no patches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nest_runtime.errors import NestError


class PassLock:
    """Lets any number of threads run forward passes, or one thread write weights.

    A waiting writer holds new passes back, so that a busy server cannot starve a switch. Writers
    must be serialized by the caller.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._running: dict[int, int] = {}  # passes by thread; more than one where they nest
        self._writers = 0

    def enter(self) -> None:
        """Begin one pass of this thread; waits first while a writer is at work or waiting. ``leave`` must follow."""
        me = threading.get_ident()
        with self._lock:
            # A thread that is inside already must not wait for a writer that waits for that very thread.
            while self._writers and me not in self._running:
                self._changed.wait()
            self._running[me] = self._running.get(me, 0) + 1

    def leave(self) -> None:
        """End one pass of this thread."""
        me = threading.get_ident()
        with self._lock:
            others = self._running.pop(me) - 1
            if others:
                self._running[me] = others
            elif self._writers:
                self._changed.notify_all()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One pass of this thread, or several in a row."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no pass runs, and let none begin inside the context.

        Raises:
            NestError: called from inside a forward pass, which would wait for itself.
        """
        with self._changed:
            if threading.get_ident() in self._running:
                raise NestError(
                    "the weights cannot change inside a forward pass of the model",
                    "switch between two passes, or choose a patch with using() around the call",
                )
            self._writers += 1
        try:
            with self._changed:
                while self._running:
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()
