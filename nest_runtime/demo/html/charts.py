"""Charts as HTML: their text keeps the page's size on any width, their colors follow light and dark.

Marks differ by shape as well as by color, and say what they are on hover and by a tap (page.js).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from nest_runtime.demo.html.markup import scroll, text, words

SERIES = 7  # colors of the style sheet, .nr-c0 and so on
Ends = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: with its unit.
        low, high: its ends; of a logarithmic one, powers of ten.
        ticks: values that are written, with their words.
        log: powers of ten.
    """

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, in percent of the axis."""
        value = log10(value) if self.log else value
        return min(max(100 * (value - self.low) / (self.high - self.low), 0.0), 100.0)


def linear(title: str, low: float, high: float, unit: str = "", steps: int = 5) -> Axis:
    """An axis over a range, its ticks at round values."""
    rough = max(high - low, 1e-9) / steps
    size = 10 ** floor(log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough - 1e-12)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    ticks = tuple((n * step, f"{n * step:g}{unit}") for n in range(first, last + 1))
    return Axis(title, first * step, last * step, ticks)


@dataclass(frozen=True)
class Point:
    """One thing in a scatter plot: its name, where it is, and its intervals if there are any."""

    name: str
    x: float
    y: float
    words: str
    x_ends: Ends | None = None
    y_ends: Ends | None = None


TOUCHING = 3.5  # percent of the chart: nearer marks lie one on the other
DOT = 6.0  # pixels from a mark's middle to its rim, about
REACH = (1.0, 0.9, 1.2, 1.3)  # of each shape, how far it reaches for a size of 1


def mark(series: int, size: float = 5.0, inner: str = "") -> str:
    """A mark's shape around the origin: one of four shapes and seven colors; 28 differ."""
    look = f'class="nr-c{series % SERIES}"'
    shape = series % 4
    if shape == 0:
        return f'<circle r="{size:.1f}" {look}>{inner}</circle>'
    if shape == 1:
        low, edge = f"{-0.9 * size:.1f}", f"{1.8 * size:.1f}"
        return f'<rect x="{low}" y="{low}" width="{edge}" height="{edge}" {look}>{inner}</rect>'
    points = [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)] if shape == 2 else [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
    path = " ".join(f"{size * dx:.1f},{size * dy:.1f}" for dx, dy in points)
    return f'<polygon points="{path}" {look}>{inner}</polygon>'


def key(names: Sequence[str]) -> str:
    """What the marks stand for."""
    box = 'width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true"'
    drawn = [f"<span><svg {box}>{mark(n)}</svg> {text(name)}</span>" for n, name in enumerate(names)]
    return f'<div class="nr-key">{"".join(drawn)}</div>'


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Points with their intervals; the key is drawn apart (``key``).

    All marks have one size. Shapes that reach farther lie below the others, so that none is hidden, and a mark that
    touches others says which they are.
    """
    parts: list[str] = []
    marks: list[tuple[float, str]] = []
    places = [(x.place(point.x), y.place(point.y)) for point in points]
    for number, (point, (left, low)) in enumerate(zip(points, places, strict=True)):
        near = [
            other
            for other, (across, up) in enumerate(places)
            if other != number and abs(left - across) < TOUCHING and abs(low - up) < TOUCHING
        ]
        words = f"{point.words}; beside {', '.join(points[other].name for other in near)}" if near else point.words
        if point.x_ends is not None:
            ends = [x.place(end) for end in point.x_ends]
            parts.append(_line("nr-across", left=ends[0], bottom=low, width=ends[1] - ends[0]))
        if point.y_ends is not None:
            ends = [y.place(end) for end in point.y_ends]
            parts.append(_line("nr-up", left=left, bottom=ends[0], height=ends[1] - ends[0]))
        drawn = (
            f'<svg class="nr-dot" style="left:{left:.2f}%;bottom:{low:.2f}%" viewBox="-9 -9 18 18" data-says="">'
            f"<title>{text(words)}</title>{mark(number, DOT)}</svg>"
        )
        marks.append((-REACH[number % len(REACH)], drawn))
    parts += [drawn for _, drawn in sorted(marks, key=lambda item: item[0])]
    return frame(title, "".join(parts), x, y)


def _line(css: str, **places: float) -> str:
    style = ";".join(f"{name}:{value:.2f}%" for name, value in places.items())
    return f'<i class="{css}" style="{style}"></i>'


def columns(title: str, stacks: Sequence[Sequence[tuple[float, float, float, int, str]]], x: Axis, y: Axis) -> str:
    """Upright bars.

    Args:
        title: of the chart.
        stacks: bars from the bottom up: left and right end on the x axis, height on the y axis, series, and words.
        x, y: the axes.
    """
    parts = []
    for stack in stacks:
        bottom = 0.0
        for left, right, height, series, said in stack:
            low, high = y.place(bottom), y.place(bottom + height)
            start, end = x.place(left), x.place(right)
            parts.append(
                f'<i class="nr-col nr-b{series % SERIES}" style="left:{start:.2f}%;width:{end - start:.2f}%;'
                f'bottom:{low:.2f}%;height:{high - low:.2f}%" title="{text(said)}" data-says=""></i>'
            )
            bottom += height
    return frame(title, "".join(parts), x, y)


def frame(title: str, inner: str, x: Axis, y: Axis) -> str:
    """A chart's axes, grid and titles around its marks."""
    lines = [f'<i class="nr-grid-y" style="bottom:{y.place(at):.2f}%"></i>' for at, _ in _linear(y)]
    across = "".join(f'<span style="left:{x.place(at):.2f}%">{text(said)}</span>' for at, said in x.ticks)
    up = "".join(f'<span style="bottom:{y.place(at):.2f}%">{text(said)}</span>' for at, said in y.ticks)
    name = f"{title}: {y.title} by {x.title}"
    return (
        f'<figure class="nr-chart nr-told"><figcaption>{text(title)}</figcaption>'
        f'<p class="nr-axis">{text(y.title)} ↑</p><div class="nr-plot">'
        f'<div class="nr-ticks-y" aria-hidden="true">{up}</div>'
        f'<div class="nr-area" role="img" aria-label="{text(name)}">{"".join(lines)}{inner}</div>'
        f'<div class="nr-ticks-x" aria-hidden="true">{across}</div></div>'
        f'<p class="nr-axis nr-axis-x">{text(x.title)} →</p>{TELL}</figure>'
    )


def _linear(axis: Axis) -> Sequence[tuple[float, str]]:
    return () if axis.log else axis.ticks


TELL = '<p class="nr-tell" role="status">Hover or tap a mark to read what it is.</p>'


def shares(title: str, names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A table of percentages on colored ground, with the scale of its colors.

    Args:
        title: of the chart.
        names: of the rows.
        columns: of the columns.
        values: a row for each name, 0 to 1 each; None if there is nothing.
    """
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in columns)
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(map(_share, row))}</tr>'
        for name, row in zip(names, values, strict=True)
    )
    table = (
        f'<table class="nr-shares" aria-label="{text(title)}"><thead><tr><th scope="col">method</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    scale = '<div class="nr-scale"><span>0 %</span><i class="nr-ramp-share"></i><span>100 % attack success</span></div>'
    return f"<figure><figcaption>{words(title)}</figcaption>{scale}{scroll(table, text(title))}</figure>"


def _share(value: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    return f'<td style="--share:{value:.2f}">{100 * value:.0f}</td>'
