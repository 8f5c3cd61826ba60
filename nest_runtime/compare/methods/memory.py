"""Time and peak memory of a block of work, measured the same way for every method.

On CUDA the peak is torch's own count of allocated bytes. On Linux it is the process's highest resident
memory, whose mark the kernel lets one reset; elsewhere resident memory is sampled. Freed pages are given back
to the system first, so that a method does not live in what the one before it left. All are beyond what
was in use when the block began.
"""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from nest_runtime.heap import release

INTERVAL = 0.02  # seconds between two samples


@dataclass
class Cost:
    """What a block took; filled when the ``measured`` block ends."""

    seconds: float = 0.0
    peak_bytes: int = 0


class _Meter(Protocol):
    def stop(self) -> int:
        """Bytes of the peak beyond the start."""
        ...


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measure the block; the yielded Cost is filled when it ends."""
    cost = Cost()
    gc.collect()
    release()
    meter = _meter(device)
    began = time.perf_counter()
    try:
        yield cost
    finally:
        cost.peak_bytes = max(meter.stop(), 0)
        cost.seconds = time.perf_counter() - began


def _meter(device: torch.device) -> _Meter:
    if device.type == "cuda":
        return _Cuda(device)
    try:
        return _HighWater()
    except OSError:  # no such file on this system, or not allowed to reset it
        return _Sampler()


class _Cuda:
    """torch's count of allocated bytes on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._start = torch.cuda.memory_allocated(device)

    def stop(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._start


class _HighWater:
    """Linux's mark of the highest resident memory (VmHWM), reset at the start."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._start = self._mark()

    def stop(self) -> int:
        return self._mark() - self._start

    def _mark(self) -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found is None:
            raise OSError("this kernel keeps no VmHWM")
        return int(found[1]) * 1024


class _Sampler:
    """A thread that reads this process's resident memory until it is stopped."""

    def __init__(self) -> None:
        self._process, self._stop = psutil.Process(), threading.Event()
        self._start = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self._peak, self._process.memory_info().rss) - self._start

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)
