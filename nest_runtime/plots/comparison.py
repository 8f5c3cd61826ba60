"""Pictures of a comparison, from its JSON: trade-off, parameters, families. Needs matplotlib (extra ``plot``).

Colors are Okabe and Ito's, told apart with any color vision; every method has its own marker besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.measures import ATTACK_SUCCESS, UTILITY, Measure, StatedRate, measures_of
from nest_runtime.plots import style
from nest_runtime.plots.tradeoff import TradeoffPoint, ends, tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# For rows without a look of their own, in turn: finished patches, and comparisons of before looks were kept.
_OTHERS = (
    *(("#332288", "p"), ("#44AA99", "d"), ("#882255", "H"), ("#117733", "8")),
    *zip(style.OKABE_ITO[:7], "os^DvPX", strict=True),
    *zip(style.OKABE_ITO[:7], "ph8*d<>", strict=True),
)
MMLU = "mmlu acc"  # of a row's scores of utility
Row = Mapping[str, Any]


def draw(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the three pictures of a comparison (comparison.document) as PNG files.

    Raises:
        NestError: matplotlib is not installed.
    """
    style.require_matplotlib()
    rows = data["rows"]
    chosen = styles(rows)
    folder.mkdir(parents=True, exist_ok=True)
    painters: dict[str, Callable[[], Figure]] = {
        "tradeoff": lambda: tradeoff(tradeoff_points(rows, chosen), joined=False, columns=columns_of(rows)),
        "parameters": lambda: _parameters(rows, chosen),
        "families": lambda: _families(rows),
    }
    with style.styled():
        return [style.save(paint(), folder / f"{name}.png") for name, paint in painters.items()]


def styles(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Color and marker of every row by its method, the same in every picture."""
    others = itertools.cycle(_OTHERS)
    made = {row["method"]: row.get("look") or next(others) for row in rows}
    return {name: {"color": color, "marker": marker} for name, (color, marker) in made.items()}


def tradeoff_points(rows: Sequence[Row], look: Mapping[str, Mapping[str, str]]) -> list[TradeoffPoint]:
    """What the trade-off shows of a comparison's rows."""
    return [TradeoffPoint(row["title"], _rates(row), **look[row["method"]]) for row in rows]


def columns_of(rows: Sequence[Row]) -> list[Measure]:
    """The measures of benign prompts; MMLU stands for utility where no case measures it."""
    asked = any(UTILITY.key in _rates(row) for row in rows)
    stands = not asked and any(MMLU in (row.get("ability") or {}) for row in rows)
    mmlu = replace(UTILITY, key=MMLU, title="MMLU, right letter")
    return [mmlu if stands and measure is UTILITY else measure for measure in measures_of("benign")]


def _rates(row: Row) -> dict[str, StatedRate]:
    """The rates of a row that were measured, and its share of MMLU."""
    found = {**row["rates"], MMLU: (row.get("ability") or {}).get(MMLU)}
    known = {key: rate for key, rate in found.items() if rate and rate["value"] is not None and rate["ci95"]}
    return {key: StatedRate(rate["value"], tuple(rate["ci95"]), rate["n"]) for key, rate in known.items()}


def _parameters(rows: Sequence[Row], look: Mapping[str, Mapping[str, str]]) -> Figure:
    """Attack success against trainable parameters, log axis; methods without any stand at the left edge."""
    made = style.figure(7.5, 4.6, "Attack success, and the numbers trained for it")
    axes: Any = made.subplots()
    counts = [row["trainable"] for row in rows if row["trainable"]]
    edge = 10 ** (len(str(min(counts, default=100))) - 2)
    for row in rows:
        rate = _rates(row).get(ATTACK_SUCCESS.key)
        if rate is not None:
            axes.errorbar(
                [row["trainable"] or edge],
                [100 * rate.value],
                yerr=[[end] for end in ends(rate)],
                label=row["title"],
                linestyle="none",
                markersize=8,
                markeredgecolor="black",
                markeredgewidth=0.6,
                elinewidth=0.9,
                **look[row["method"]],
            )
    axes.set_xscale("log")
    axes.text(edge, 1.0, "none", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{ATTACK_SUCCESS.title} (%)")
    axes.set_ylim(bottom=-2)
    axes.axvline(edge * 2, color="#999999", linewidth=0.8, linestyle=":")
    style.finish(axes, grid="both")
    made.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return made


def _families(rows: Sequence[Row]) -> Figure:
    """Attack success per attack family and method, as a table of shades with the figures in it."""
    families = list(rows[0]["asr_by_family"])
    values = [
        [100 * (row["asr_by_family"][family][ATTACK_SUCCESS.rate_key] or 0.0) for family in families] for row in rows
    ]
    made = style.figure(10, 4.6, "Attack success by family")
    axes: Any = made.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(
                x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 55 else "black", fontsize=8
            )
    axes.set_xticks(range(len(families)), families, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    made.colorbar(image, ax=axes, label=f"{ATTACK_SUCCESS.title} (%)")
    return made
