"""Pieces of Markdown tables: cells for shares, p-values and sizes, and the table itself."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "–"


def percent(value: float | None) -> str:
    """A share as ``12.3 %``."""
    return NONE if value is None else f"{100 * value:.1f} %"


def signed_percent(value: float | None) -> str:
    """A relative change as ``-12.3 %``."""
    return NONE if value is None else f"{100 * value:+.1f} %"


def interval(ends: Sequence[float]) -> str:
    """The ends of an interval of shares, in per cent."""
    low, high = ends
    return f"{100 * low:.1f} to {100 * high:.1f}"


def p_value(value: float | None) -> str:
    """A p-value to three digits."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def size(count: float | None) -> str:
    """A number of bytes: 512 B, 9.6 kB, 1.2 MB."""
    if count is None:
        return NONE
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
