"""Pictures of evaluations: attack success per family; and what tradeoff.py draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nest_runtime.evaluate.records import Record, rate_of
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.stats import Rate
from nest_runtime.measures import ATTACK_SUCCESS, StatedRate, measures_of
from nest_runtime.plots.style import (
    BLUE,
    CLUSTER_MARKERS,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    figure,
    finish,
)
from nest_runtime.plots.tradeoff import TradeoffPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = (GRAY, VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY)
MARKERS = CLUSTER_MARKERS
HATCHES = ("", "//", "", "..", "", "xx", "")


def families(results: Sequence[EvalResult]) -> Figure:
    """Attack success by attack family, a bar per result with its 95 % interval."""
    first = _harmful(results[0])
    names = list(dict.fromkeys(r.family for result in results for r in _harmful(result)))
    names.sort(key=lambda name: -(rate_of([r for r in first if r.family == name]).value or 0.0))
    height = max(3.2, 1.3 + len(names) * (0.14 + 0.15 * len(results)))
    made = figure(8.5, height, f"{ATTACK_SUCCESS.title.capitalize()} by family")
    axes: Any = made.subplots()
    thick = 0.8 / len(results)
    for number, (result, label) in enumerate(zip(results, labels_of(results), strict=True)):
        rates = [rate_of([r for r in _harmful(result) if r.family == name]) for name in names]
        where = [row + (number - (len(results) - 1) / 2) * thick for row in range(len(names))]
        values = [100 * (rate.value or 0.0) for rate in rates]
        ends = list(zip(*(_ends(rate) for rate in rates), strict=True))
        axes.barh(
            where,
            values,
            thick * 0.92,
            color=COLORS[number % len(COLORS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            label=label,
        )
        axes.errorbar(  # a mark as well: a bar of no length shows no color
            values,
            where,
            xerr=ends,
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            color=COLORS[number % len(COLORS)],
            markeredgecolor="black",
            markeredgewidth=0.6,
            ecolor="black",
            elinewidth=0.9,
            capsize=2,
            clip_on=False,
        )
    counts = [sum(r.family == name for r in first) for name in names]
    axes.set_yticks(range(len(names)), [f"{name} (n = {n})" for name, n in zip(names, counts, strict=True)])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first family on top
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{ATTACK_SUCCESS.title} (%), with 95 % intervals")
    made.legend(loc="outside lower center", ncols=4, frameon=False)
    finish(axes, grid="x")
    return made


def tradeoff_points(results: Sequence[EvalResult]) -> list[TradeoffPoint]:
    """What the trade-off shows of evaluations: attack success, pooled, and the measures of benign prompts."""
    points = []
    for number, (result, label) in enumerate(zip(results, labels_of(results), strict=True)):
        rates = {ATTACK_SUCCESS.key: _pooled(result)} | {m.key: result.rate(m.key) for m in measures_of("benign")}
        stated = {
            key: StatedRate(rate.value, rate.ci95, rate.n) for key, rate in rates.items() if rate.value is not None
        }
        points.append(TradeoffPoint(label, stated, COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]))
    return points


def labels_of(results: Sequence[EvalResult]) -> list[str]:
    """What results are called in a legend: the patch's version or base, with the model where that leaves doubt."""
    plain = [result.patch for result in results]
    return plain if len(set(plain)) == len(plain) else [f"{result.model} {result.patch}" for result in results]


def has_harmful(result: EvalResult) -> bool:
    """Whether a result measures attack success."""
    return bool(_harmful(result))


def has_tradeoff(result: EvalResult) -> bool:
    """Whether a result measures attack success and what it was bought with."""
    return has_harmful(result) and any(result.rate(measure.key).n for measure in measures_of("benign"))


def _harmful(result: EvalResult) -> list[Record]:
    return [record for record in result.trials if record.measure == ATTACK_SUCCESS.key]


def _pooled(result: EvalResult) -> Rate:
    """Attack success on the jailbreak suites if there are any, else on everything harmful."""
    return result.jailbreak or rate_of(_harmful(result))


def _ends(rate: Rate) -> tuple[float, float]:
    """How far the interval goes down and up from the rate, in percent."""
    low, high = rate.ci95
    value = rate.value or 0.0
    return 100 * max(value - low, 0.0), 100 * max(high - value, 0.0)
