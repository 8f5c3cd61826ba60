"""How every picture looks, and how it becomes a file whose bytes depend on its content alone.

Colors are Okabe and Ito's, told apart with any color vision; clusters have a
marker each besides. Text in SVG files is drawn as paths, so that they look the same everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import NestError
from nest_runtime.install import extra
from nest_runtime.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OKABE_ITO = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = OKABE_ITO
GRAY, PALE = "#767676", "#D9D9D9"
DPI = 150
KIND_COLORS = {"gate": BLUE, "up": VERMILION, "fc": GREEN}
CLUSTER_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
CLUSTER_MARKERS = "os^DvPX"
FORMATS = ("png", "svg")
_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "nest-runtime",
    "path.simplify": False,
}


def require_matplotlib(otherwise: str = "") -> None:
    """Raise NestError if matplotlib is not installed: before hours of work, not after.

    Args:
        otherwise: how to do without pictures, for the hint.
    """
    if find_spec("matplotlib") is None:
        raise NestError("pictures need matplotlib, which is not installed", f"{extra('plot')}{otherwise}")


@contextmanager
def styled() -> Iterator[None]:
    """Our settings on top of matplotlib's own defaults, whatever the user's matplotlibrc says; for this block."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def figure(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches, without pyplot: no display and no state."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle(title, fontsize=12, fontweight="bold")
    return made


def save(made: Figure, path: Path) -> Path:
    """Write a figure in the format of the path's suffix; the same figure gives the same bytes."""
    stamps: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "nest-runtime"}}
    kind = path.suffix.removeprefix(".")
    buffer = io.BytesIO()
    made.savefig(buffer, format=kind, dpi=DPI, metadata=stamps[kind])
    atomic_write(path, buffer.getvalue())
    return path


def finish(axes: Any, *, grid: str = "y") -> None:
    """The frame of every plot: two spines, a light grid."""
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def whole_ticks(axis: Any) -> None:
    """Only whole numbers at the ticks of an axis."""
    axis.set_major_locator(whole_locator())


def whole_locator() -> Any:
    """What places ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=12)
