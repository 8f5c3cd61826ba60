"""Long work for a page that generators draw: it runs in its own thread and reports; the page yields."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

TICK = 0.1  # seconds between looks
T = TypeVar("T")


class JobStopped(Exception):
    """The page has gone, or its user stopped the work. Raised in the work, never out of it."""


class BackgroundJob(Generic[T]):
    """Work that reports values of one type.

    Attributes:
        stopping: set when nobody wants the rest; the work looks at it between its steps.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._news: queue.SimpleQueue[T] = queue.SimpleQueue()

    def report(self, value: T) -> None:
        """Tell the page how far the work is. Raises JobStopped if the page has gone."""
        if self.stopping.is_set():
            raise JobStopped
        self._news.put(value)

    def run(self, task: Callable[[BackgroundJob[T]], None], *, beat: float | None = None) -> Iterator[T | None]:
        """Run ``task(job)`` in a thread and yield its reports; if several came at once, only the newest.

        Args:
            task: gets this job.
            beat: yield None if nothing was reported for so many seconds.

        What the work raises is raised here. A generator that is closed stops the work at its next report.
        """
        failed: list[BaseException] = []

        def body() -> None:
            """Do the task; keeps its error for the thread that waits."""
            try:
                with suppress(JobStopped):
                    task(self)
            except BaseException as error:  # raised again where the page can show it
                failed.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        quiet = 0.0
        try:
            while thread.is_alive() or not self._news.empty():
                latest = self._latest()
                quiet = quiet + TICK if latest is None else 0.0
                if latest is not None:
                    yield latest
                elif beat is not None and quiet >= beat:
                    quiet = 0.0
                    yield None
        finally:
            self.stopping.set()
        if failed:
            raise failed[0]

    def _latest(self) -> T | None:
        """The newest report, after waiting a little for one."""
        value: T | None = None
        with suppress(queue.Empty):
            value = self._news.get(timeout=TICK)
            while True:
                value = self._news.get_nowait()
        return value


class Running:
    """A visitor's long work: one piece at a time, which a button can stop.

    Attributes:
        busy: something runs.
        stopped: the last piece was stopped.
    """

    def __init__(self) -> None:
        self.busy = False
        self.stopped = False

    def watch(self, task: Callable[[BackgroundJob[T]], None]) -> Iterator[T | None]:
        """Run work and yield what it reports, until it is done or ``stop`` is called; None before it begins.

        What the work raises is raised here.
        """
        self.busy, self.stopped = True, False
        try:
            yield None
            if self.stopped:
                return
            for value in BackgroundJob[T]().run(task, beat=2 * TICK):
                if self.stopped:
                    return
                if value is not None:
                    yield value
        finally:
            self.busy = False

    def stop(self) -> str:
        """Stop the current work; returns a sentence if there is none."""
        if not self.busy:
            return "Nothing is running."
        self.stopped = True
        return "Stopping …"
