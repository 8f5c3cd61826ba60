"""Freed memory back to the system: glibc keeps what a process has freed, piece by piece between what is still used.

A training run frees a batch's activations after every step. Their pages stay with the process, since small kept tensors
lie between them, and resident memory grows with every new row (docs/decisions/real-models.md).
"""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache
from typing import Any

INTERVAL = 5.0  # seconds between two times that Trimmer gives memory back


def release() -> None:
    """Give freed heap pages back to the system, where the C library can: glibc's ``malloc_trim``."""
    trim = _trim()
    if trim is not None:
        trim(0)


class Trimmer:
    """Calls :func:`release`, at most once in ``INTERVAL`` seconds, so that short steps do not pay for it."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def step_done(self) -> None:
        """To be called after every step."""
        if time.monotonic() - self._last >= INTERVAL:
            release()
            self._last = time.monotonic()


@cache
def _trim() -> Any:
    """The C library's function, or None: other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
