"""What the rows of the table of speed share: interleaved rounds, medians with spread, goals, one JSON document a row.

A row's script measures ours, the peer and the limit in turns, in one process or side by side, so that a noisy machine
disturbs all alike. A ratio is the median of the rounds' ratios, not the ratio of two medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = "NEST_REAL_MODELS"  # names the folder of the two real models' GGUF files
FEWEST = 4  # rounds that a figure rests on, however long they take
UNITS = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6))


class NotMeasured(Exception):
    """The row cannot be measured here; says why."""


@dataclass(frozen=True)
class Series:
    """One way's figures, one for each round: seconds, or what ``unit`` says."""

    name: str
    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def document(self) -> dict[str, Any]:
        """As JSON, with the middle half of the rounds."""
        low, high = quartiles(self.values)
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "low": low,
            "high": high,
            "n": len(self.values),
        }


@dataclass(frozen=True)
class Goal:
    """What a line has to reach: a ``limit`` of the ratio, or of ours itself where there is nothing to compare with."""

    limit: float
    at_least: bool = False
    absolute: bool = False

    def met(self, value: float) -> bool:
        """Whether a figure reaches it."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Line:
    """One comparison of a row.

    Attributes:
        what: what was done, with model and size.
        ours: our figures.
        against: those of the peer or the limit, round by round beside ours, or None.
        goal: what to reach, or None.
        note: what a reader must know beside it.
    """

    what: str
    ours: Series
    against: Series | None = None
    goal: Goal | None = None
    note: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {"what": self.what, "ours": self.ours.document(), "note": self.note}
        value = self.ours.median
        if self.against is not None:
            ratios = [ours / other for ours, other in zip(self.ours.values, self.against.values, strict=True)]
            low, high = quartiles(ratios)
            found["against"] = self.against.document()
            found["ratio"] = {"median": statistics.median(ratios), "low": low, "high": high}
            if self.goal is None or not self.goal.absolute:
                value = statistics.median(ratios)
        if self.goal is not None:
            found["goal"] = {
                "limit": self.goal.limit,
                "at_least": self.goal.at_least,
                "absolute": self.goal.absolute or self.against is None,
            }
            found["met"] = self.goal.met(value)
        return found


@dataclass
class Report:
    """What a row's script hands back: lines, and any further figures (of plots, profiles)."""

    lines: list[Line] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of fewer than three values the smallest and the largest."""
    if len(values) < 3:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


class Clock:
    """Tells whether there is time for one more piece of work, by what the longest piece so far took.

    Args:
        seconds: for all of them.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.longest = seconds, 0.0
        self.began = self.last = time.perf_counter()

    def one_more(self) -> bool:
        """Whether the next piece fits; called before each of them, the first one included."""
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now
        return now - self.began + 1.1 * self.longest <= self.seconds

    def set_up(self) -> None:
        """What ran so far was no piece: it counts as time gone, and tells nothing of how long a piece takes."""
        self.last = time.perf_counter()

    def share(self, parts: int, most: float) -> float:
        """Seconds for the rounds of one of ``parts`` measurements to come: half its share, at most ``most``.

        The other half is for what each of them needs besides its rounds.
        """
        return min(most, max(0.0, self.began + self.seconds - time.perf_counter()) / parts / 2)


def seconds(action: Callable[[], Any]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def in_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    before: Callable[[str], None] | None = None,
    times: int = 1,
    warm: int = 1,
    most: float = math.inf,
) -> dict[str, Series]:
    """Seconds of every way in every round; each round begins with another way.

    Args:
        ways: what to time, by name.
        rounds: how many count.
        before: called ahead of each timing, untimed.
        times: calls in one timing, for what takes microseconds; the figure is of one call.
        warm: rounds that do not count.
        most: seconds after which no round begins, once ``FEWEST`` have counted.
    """
    names = list(ways)
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    started = time.perf_counter()
    for number in range(-warm, rounds):
        if number >= FEWEST and time.perf_counter() - started > most:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if before is not None:
                before(name)
            began = time.perf_counter()
            for _ in range(times):
                ways[name]()
            took = (time.perf_counter() - began) / times
            if number >= 0:
                found[name].append(took)
    return {name: Series(name, tuple(values)) for name, values in found.items()}


def shown(value: float, unit: str) -> str:
    """A figure with three digits and a unit that fits."""
    if unit != "s":
        return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    factor, name = next((factor, name) for least, name, factor in UNITS if value >= least)
    return f"{value * factor:.3g} {name}" if value * factor < 1000 else f"{value * factor:,.0f} {name}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every row."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few rounds and small sizes: shows that it runs")
    made.add_argument("--models", default=os.environ.get(MODELS), help=f"folder of the real models (${MODELS})")
    made.add_argument("--work", help="folder for copies of models that several rows need; a temporary one without it")
    made.add_argument(
        "--seconds", type=float, default=math.inf, help="leave out what would take longer than this in all"
    )
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return made


def run(row: str, description: str | None, measure: Callable[[argparse.Namespace], Report]) -> None:
    """A row's command line: measure, and print lines or JSON."""
    arguments = parser(description).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    began = time.perf_counter()
    try:
        report = measure(arguments)
        document: dict[str, Any] = {"row": row, "lines": [line.document() for line in report.lines], **report.more}
    except NotMeasured as reason:
        document = {"row": row, "not_measured": str(reason)}
    document |= {
        "quick": arguments.quick,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if arguments.json:
        print(json.dumps(document))
        return
    for line in document.get("lines", []):
        print(" | ".join(cells(line)))
    if "not_measured" in document:
        print(f"not measured: {document['not_measured']}", file=sys.stderr)


def cells(line: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """A line for a table: what, ours, against, ratio, and the goal with whether it is met."""
    other, ratio, goal = line.get("against"), line.get("ratio"), line.get("goal")
    told = "–"
    if goal is not None:
        sign = "≥" if goal["at_least"] else "≤"
        limit = shown(goal["limit"], line["ours"]["unit"]) if goal["absolute"] else f"{goal['limit']:g}×"
        told = f"{sign} {limit}: {'met' if line['met'] else 'not met'}"
    spread = f"{ratio['median']:.3g}× ({ratio['low']:.3g}–{ratio['high']:.3g})" if ratio else "–"
    return (
        line["what"],
        _figure(line["ours"]),
        "–" if other is None else f"{other['name']}: {_figure(other)}",
        spread,
        told,
    )


def _figure(series: Mapping[str, Any]) -> str:
    return shown(series["median"], series["unit"])


def threads(arguments: argparse.Namespace) -> None:
    """Give torch the row's number of threads."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)


def models_folder(arguments: argparse.Namespace) -> Path:
    """The folder of the real models."""
    if not arguments.models or not Path(arguments.models).is_dir():
        raise NotMeasured(f"no folder of the real models; --models or ${MODELS} names it")
    return Path(arguments.models)
