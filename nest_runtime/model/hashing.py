"""Hashes many pieces of files or memory at once, in threads: hashlib releases the interpreter's lock."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.errors import ModelError, reason_of
from nest_runtime.progress import Progress

TOLD = 0.1  # seconds between two reports of progress


@dataclass(frozen=True)
class HashJob:
    """One tensor to hash.

    Attributes:
        name, dtype, shape: what identifies it beside its bytes.
        read: gives the bytes; called in a thread.
        size: how many bytes.
    """

    name: str
    dtype: Any
    shape: tuple[int, ...]
    read: Callable[[], memoryview]
    size: int


class HashRow(tuple[str, Any, tuple[int, ...], str]):
    """name, dtype, shape, hex digest of the bytes"""


def hash_all(jobs: Iterable[HashJob], progress: Progress | None = None) -> list[HashRow]:
    """Hash tensors, the largest first; the rows come in no particular order.

    Raises:
        ModelError: a name appears twice.
    """
    jobs = sorted(jobs, key=lambda job: -job.size)
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"tensor {twice} appears twice in the checkpoint", "fetch the checkpoint again: it is damaged")
    total = sum(job.size for job in jobs)
    left: deque[HashJob] = deque(jobs)
    hashed: list[tuple[int, HashRow]] = []  # each with its size

    def work() -> None:
        """Hash what is left, one after another: waking another thread for each costs as much as a small tensor."""
        while True:
            try:
                job = left.popleft()
            except IndexError:
                return
            hashed.append((job.size, HashRow((job.name, job.dtype, job.shape, _sha256(job.read)))))

    with ThreadPoolExecutor(max_workers=hash_threads()) as pool:
        waiting = {pool.submit(work) for _ in range(hash_threads())}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=TOLD if progress else None, return_when=FIRST_COMPLETED)
                for worker in ended:
                    worker.result()
                if progress:
                    progress("hash", sum(size for size, _ in hashed), total)
        finally:
            left.clear()  # after an error or Ctrl-C nothing more is begun
    return [row for _, row in hashed]


def hash_threads() -> int:
    """How many threads hash at once."""
    return min(8, os.cpu_count() or 1)


def digest_of(manifest: Any) -> str:
    """``sha256:<hex>`` over a JSON value in its shortest form."""
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def mapped(path: Path, stack: ExitStack) -> memoryview:
    """A file's bytes, mapped until the stack is left; raises ModelError if it cannot be read."""
    try:
        with path.open("rb") as file:
            memory = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {reason_of(error)}", "fetch the checkpoint again: it is damaged"
        ) from error
    view = memoryview(memory)
    stack.callback(view.release)
    return view


def given(part: memoryview) -> Callable[[], memoryview]:
    """A reader of bytes that are there already."""
    return lambda: part


def _sha256(read: Callable[[], memoryview]) -> str:
    return hashlib.sha256(read()).hexdigest()
