"""Pictures of a comparison, from its JSON: trade-off, parameters, families. Needs matplotlib (extra ``plot``).

Colors are Okabe and Ito's, told apart with any color vision; every method has its own marker besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nest_runtime.errors import NestError
from nest_runtime.install import extra

OKABE_ITO = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_STYLES = {  # the same in every picture, relatives alike
    "base": ("#000000", "o"),
    "filter": ("#E69F00", "s"),
    "in-context": ("#56B4E9", "^"),
    "full": ("#009E73", "D"),
    "lora": ("#0072B2", "v"),
    "lora-ffn": ("#0072B2", "P"),
    "circuit-breaker": ("#CC79A7", "X"),
    "random-neurons": ("#999999", "<"),
    "random-loadings": ("#999999", ">"),
    "nest": ("#D55E00", "h"),
    "nest-loadings": ("#D55E00", "*"),
}
_OTHERS = (("#332288", "p"), ("#44AA99", "d"), ("#882255", "H"), ("#117733", "8"))  # finished patches, in turn
DPI = 150
Row = Mapping[str, Any]


def draw(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the three pictures of a comparison (comparison.document) as PNG files.

    Raises:
        NestError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    rows = data["rows"]
    chosen = styles([row["method"] for row in rows])
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, paint in (("tradeoff", _tradeoff), ("parameters", _parameters), ("families", _families)):
        figure = Figure(figsize=(10, 4.6) if name != "parameters" else (7.5, 4.6), layout="constrained")
        paint(figure, rows, chosen)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        made.append(path)
    return made


def require_matplotlib() -> None:
    """Raise NestError where matplotlib is not installed: before hours of work, not after."""
    if find_spec("matplotlib") is None:
        raise NestError("plots need matplotlib, which is not installed", f"{extra('plot')}, or --no-plots")


def styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Color and marker of every row, the same in every picture."""
    others = itertools.cycle(_OTHERS)
    made = {name: _STYLES[name] if name in _STYLES else next(others) for name in names}
    return {name: {"color": color, "marker": marker} for name, (color, marker) in made.items()}


def _tradeoff(figure: Any, rows: Sequence[Row], look: Mapping[str, Mapping[str, str]]) -> None:
    """Attack success against over-refusal and against utility."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in ((left, "over_refusal", "over-refusal (%)"), (right, "utility", "utility (%)")):
        for row in rows:
            if row[measure] is None or row["asr"] is None:
                continue
            low, high = row["rates"][measure]["ci95"]
            value = 100 * row[measure]
            across = [[max(value - 100 * low, 0)], [max(100 * high - value, 0)]]
            _point(axes, value, row, look[row["method"]], across)
        axes.set_xlabel(title)
        _finish(axes)
    left.set_ylabel("jailbreak attack success (%)")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False)


def _parameters(figure: Any, rows: Sequence[Row], look: Mapping[str, Mapping[str, str]]) -> None:
    """Attack success against trainable parameters, log axis; methods without any stand at the left edge."""
    axes = figure.subplots()
    counts = [row["trainable"] for row in rows if row["trainable"]]
    edge = 10 ** (len(str(min(counts, default=100))) - 2)
    for row in rows:
        if row["asr"] is not None:
            _point(axes, row["trainable"] or edge, row, look[row["method"]])
    axes.set_xscale("log")
    axes.text(edge, 1.0, "none", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("jailbreak attack success (%)")
    axes.axvline(edge * 2, color="#999999", linewidth=0.8, linestyle=":")
    _finish(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)


def _families(figure: Any, rows: Sequence[Row], look: Mapping[str, Mapping[str, str]]) -> None:
    """Attack success per attack family and method, as a table of shades with the figures in it."""
    families = list(rows[0]["asr_by_family"])
    values = [[100 * (row["asr_by_family"][family]["asr"] or 0.0) for family in families] for row in rows]
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(
                x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 55 else "black", fontsize=8
            )
    axes.set_xticks(range(len(families)), families, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    figure.colorbar(image, ax=axes, label="attack success (%)")


def _point(axes: Any, x: float, row: Row, style: Mapping[str, str], across: Any = None) -> None:
    low, high = row["ci95"]
    value = 100 * row["asr"]
    axes.errorbar(
        [x],
        [value],
        yerr=[[max(value - 100 * low, 0)], [max(100 * high - value, 0)]],
        xerr=across,
        label=row["title"],
        linestyle="none",
        markersize=8,
        markeredgecolor="black",
        markeredgewidth=0.6,
        elinewidth=0.9,
        **style,
    )


def _finish(axes: Any) -> None:
    axes.set_ylim(bottom=-2)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
