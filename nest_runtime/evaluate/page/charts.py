"""Charts of the page as inline SVG: rates with their intervals, and shares of outcomes. Their colors are page.css's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from nest_runtime.evaluate.stats import Rate

WIDTH, LEFT, RIGHT = 720, 190, 700  # of the drawing, and where its bars begin and end
BAR, GAP, HEAD = 15, 10, 8


def rate_bars(title: str, groups: Sequence[tuple[str, Mapping[str, Rate]]]) -> str:
    """Rates as bars with 95 % whiskers: a group of bars for each label, a bar for each series (``base``, ``patch``)."""
    parts, y = [], HEAD
    for label, rates in groups:
        middle = y + BAR * len(rates) / 2 + 4
        parts.append(_text(LEFT - 8, middle, _clipped(label), anchor="end", whole=label))
        for series, rate in rates.items():
            if rate.value is not None:
                low, high = rate.ci95
                parts.append(
                    f'<rect class="is-{series}" x="{LEFT}" y="{y}" width="{_length(rate.value):.1f}" '
                    f'height="{BAR - 3}">'
                    f"<title>{escape(f'{label}, {series}: {rate}')}</title></rect>"
                    f'<path class="whisker" d="M{LEFT + _length(low):.1f} {y + 6}H{LEFT + _length(high):.1f}"/>'
                )
            y += BAR
        y += GAP
    said = "; ".join(
        f"{label}: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()) for label, rates in groups
    )
    names = list(dict.fromkeys(name for _, rates in groups for name in rates))
    return _figure(title, parts, y, said, names if len(names) > 1 else [])


def outcome_bars(title: str, rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """The outcomes of each row's answers as shares of a bar."""
    parts, y = [], HEAD
    for label, counts in rows:
        total, at = max(sum(counts.values()), 1), 0.0
        parts.append(_text(LEFT - 8, y + BAR - 4, _clipped(label), anchor="end", whole=label))
        for outcome, count in counts.items():
            share = count / total
            parts.append(
                f'<rect class="is-{outcome}" x="{LEFT + _length(at):.1f}" y="{y}" width="{_length(share):.1f}" '
                f'height="{BAR - 2}"><title>{escape(f"{label}: {count} of {total} {outcome}")}</title></rect>'
            )
            at += share
        y += BAR + 5
    said = "; ".join(f"{label}: " + ", ".join(f"{n} {name}" for name, n in counts.items()) for label, counts in rows)
    return _figure(title, parts, y, said, list(dict.fromkeys(name for _, counts in rows for name in counts)))


def _figure(title: str, parts: Sequence[str], bottom: float, said: str, names: Sequence[str]) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT + _length(share):.1f} {HEAD - 4}V{bottom}"/>'
        + _text(LEFT + _length(share), bottom + 14, f"{100 * share:.0f} %", anchor="middle", faint=True)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    keys = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="is-{name}" width="10" height="10"/></svg> '
        f"{escape(name)}</li>"
        for name in names
    )
    key = f'<ul class="key">{keys}</ul>' if keys else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{key}"
        f'<svg viewBox="0 0 {WIDTH} {bottom + 22}" role="img" aria-label="{escape(f"{title}. {said}")}">'
        f"{grid}{''.join(parts)}</svg></figure>"
    )


def _text(x: float, y: float, text: str, *, anchor: str, faint: bool = False, whole: str = "") -> str:
    css = ' class="faint"' if faint else ""
    more = f"<title>{escape(whole)}</title>" if whole and whole != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}{more}</text>'


def _clipped(label: str) -> str:
    return label if len(label) <= 27 else label[:26] + "…"


def _length(share: float) -> float:
    return share * (RIGHT - LEFT)
