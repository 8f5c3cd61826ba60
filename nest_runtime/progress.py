"""Progress on stderr, for callbacks of the form (stage, done, total): bars on a terminal, lines elsewhere.

Nothing is drawn when quiet, or in the first second, and no line written in the first half minute: short work
stays silent. Libraries call the callback; only commands draw.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

T = TypeVar("T")
DELAY_SECONDS = 1.0
INTERVAL_SECONDS = 30.0
INTERVAL_VARIABLE = "NEST_PROGRESS_SECONDS"


class Progress(Protocol):
    """What a library calls: the stage's name, how much is done, and of how much (0: unknown)."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def tell(progress: Progress | None, stage: str, done: int, total: int, *, note: str = "") -> None:
    """Call a progress callback if there is one, with a note (``loss 0.41``) where it takes one.

    Callbacks of users take three values; those with a true ``takes_notes`` take the keyword ``note`` too.
    """
    if progress is None:
        return
    if note and getattr(progress, "takes_notes", False):
        progress(stage, done, total, note=note)  # type: ignore[call-arg]  # it says that it does
    else:
        progress(stage, done, total)


class Bars:
    """A progress callback that draws one bar per stage; use it as a context manager.

    Where stderr is no terminal it writes a line now and then instead: into a log, where silence looks like an end.

    Args:
        quiet: draw and write nothing.
        console: where to draw; stderr by default.
        delay: seconds before the first bar appears.
        interval: seconds between two lines; $NEST_PROGRESS_SECONDS, or 30, by default.
    """

    takes_notes = True

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        delay: float = DELAY_SECONDS,
        interval: float | None = None,
    ) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._silent = quiet or not self._console.is_terminal
        self._lines: Lines | None = None
        if not quiet and not self._console.is_terminal:
            self._lines = Lines(self._console.file, interval or _interval())
        self._delay = delay
        self._started = time.monotonic()
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._started = time.monotonic()
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.stop()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: int, total: int, *, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are over, and a few words about the last one."""
        if self._lines is not None:
            self._lines(stage, done, total, note)
        if self._silent or time.monotonic() - self._started < self._delay:
            return
        bars = self._bars or self._begin()
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(stage, total=total or None)
        words = f"{stage}  {note}" if note else stage
        bars.update(self._tasks[stage], completed=done, total=total or None, description=words)

    def _begin(self) -> RichProgress:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bars.start()
        return self._bars


class Lines:
    """Writes every so often how far the present stage is, from a thread: also in the middle of a long step.

    Args:
        file: where to.
        interval: seconds between two lines; shorter work writes none.
    """

    def __init__(self, file: IO[str], interval: float) -> None:
        self._file, self._interval = file, interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()
        self._now: tuple[str, int, int, str] | None = None  # stage, done, total, note
        self._first = (0, 0.0)  # done at the stage's first report, and when that was

    def start(self) -> None:
        """Begin to write."""
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Write no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Take in how far it is."""
        if self._now is None or self._now[0] != stage or done < self._now[1]:
            self._first = (done, time.monotonic())
        self._now = (stage, done, total, note)

    def line(self) -> str:
        """``tune: 120 of 350, loss 0.41, 3 min left``."""
        if self._now is None:
            return f"working for {_duration(time.monotonic() - self._began)}"
        stage, done, total, note = self._now
        first, when = self._first
        seconds = time.monotonic() - when
        parts = [f"{stage}: {done:,} of {total:,}" if total else f"{stage}: {done:,}", *([note] if note else [])]
        if total and first < done < total and seconds > 0:
            parts.append(f"{_duration((total - done) * seconds / (done - first))} left")
        return ", ".join(parts)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            print(self.line(), file=self._file, flush=True)


def _interval() -> float:
    """Seconds between two lines. Raises UsageError if the variable holds no such number."""
    given = os.environ.get(INTERVAL_VARIABLE, "")
    if not given:
        return INTERVAL_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{INTERVAL_VARIABLE} is {given!r}; expected seconds above 0", "unset it, or give 30")
    return seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def track(iterable: Iterable[T], description: str, total: int | None = None, *, quiet: bool = False) -> Iterator[T]:
    """Yield from ``iterable`` while a bar shows how far it is.

    Args:
        iterable: what to go through.
        description: the bar's label.
        total: how many there are; ``len(iterable)`` if it has one.
        quiet: draw nothing.
    """
    if total is None:
        total = len(iterable) if isinstance(iterable, Sized) else 0
    with Bars(quiet=quiet) as bars:
        for done, item in enumerate(iterable, start=1):
            yield item
            bars(description, done, total)
