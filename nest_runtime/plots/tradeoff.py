"""The trade-off: attack success against each measure of benign prompts, of evaluations and of comparisons alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nest_runtime.measures import ATTACK_SUCCESS, Measure, StatedRate, measures_of
from nest_runtime.plots.style import GRAY, figure, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TradeoffPoint:
    """One model, with or without a patch or another method.

    Attributes:
        label: in the legend.
        rates: by measure; one that was not measured is missing.
        color, marker: how it is drawn.
    """

    label: str
    rates: Mapping[str, StatedRate]
    color: str
    marker: str


def tradeoff(points: Sequence[TradeoffPoint], *, joined: bool, columns: Sequence[Measure] = ()) -> Figure:
    """A panel for each measure of benign prompts, attack success upwards, with 95 % intervals both ways.

    Args:
        points: in the order of the legend.
        joined: draw a line through the points in their order.
        columns: the measures, if they are not all of benign prompts.
    """
    columns = columns or measures_of("benign")
    made = figure(0.7 + 4.4 * len(columns), 4.6, "Attack success, and what it was bought with")
    panels: Any = made.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, columns, strict=True):
        _panel(axes, measure, points, joined)
    panels[0].set_ylabel(f"{ATTACK_SUCCESS.title} (%)")
    panels[0].set_ylim(bottom=min(-2, panels[0].get_ylim()[0]))
    shown = dict(pair for axes in panels for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if shown:
        made.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    return made


def _panel(axes: Any, measure: Measure, points: Sequence[TradeoffPoint], joined: bool) -> None:
    known = [point for point in points if ATTACK_SUCCESS.key in point.rates and measure.key in point.rates]
    places = [tuple(100 * point.rates[key].value for key in (measure.key, ATTACK_SUCCESS.key)) for point in known]
    if joined and len(places) > 1:
        axes.plot(*zip(*places, strict=True), color=GRAY, linewidth=0.8, zorder=1)
    for point, (x, y) in zip(known, places, strict=True):
        axes.errorbar(
            [x],
            [y],
            xerr=[[end] for end in ends(point.rates[measure.key])],
            yerr=[[end] for end in ends(point.rates[ATTACK_SUCCESS.key])],
            linestyle="none",
            color=point.color,
            marker=point.marker,
            markersize=8,
            markeredgecolor="black",
            markeredgewidth=0.6,
            elinewidth=0.9,
            label=point.label,
        )
    axes.set_xlabel(f"{measure.title} (%)")
    finish(axes, grid="both")


def ends(rate: StatedRate) -> tuple[float, float]:
    """How far the interval goes down and up from the rate, in percent."""
    low, high = rate.ci95
    return 100 * max(rate.value - low, 0.0), 100 * max(high - rate.value, 0.0)
