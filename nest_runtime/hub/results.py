"""What was measured, as a card shows it: the JSON of `eval`, and of adaptive attacks, as Markdown tables and as rates.

The JSON is a file that somebody names, so nothing in it is relied on: what has not the form of a rate is left out, and
all text is put into cells as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, StatedRate, stated_rate

NONE = "–"
POOLED = "all jailbreaks"
ADAPTIVE = "adaptive"  # the key under which the results of adaptive attacks stand beside an evaluation's
Found = tuple[str, str, Mapping[str, Any]]  # suite, measure, figures


def is_evaluation(document: Mapping[str, Any]) -> bool:
    """Whether a document is what `eval --json` prints."""
    return isinstance(document.get(ATTACK_SUCCESS.key), Mapping) and isinstance(document.get("benign"), Mapping)


def rates(document: Mapping[str, Any]) -> Iterator[tuple[str, str, float, int]]:
    """The rates and scores of an evaluation: on what, which measure, how much, and of how many."""
    for suite, measure, figures in _figures(document):
        rate = stated_rate(figures)
        if rate is not None:
            yield suite, MEASURES[measure].hub_name or measure, rate.value, rate.n
    for task, metric, score in _scores(document):
        yield task, metric, float(score["value"]), int(score["n"])


def tables(document: Mapping[str, Any]) -> list[str]:
    """The parts of a card's section on results: rates, scores, adaptive attacks, sources; those that there are."""
    return [part for part in (_about(document), _rates(document), _ability(document), *_rest(document)) if part]


def _rest(document: Mapping[str, Any]) -> Iterator[str]:
    adaptive = document.get(ADAPTIVE)
    if isinstance(adaptive, Mapping) and (made := _adaptive(adaptive)):
        yield "### Adaptive attacks"
        yield "Each was made against this very patch. Whoever holds the weights can also leave the patch away."
        yield made
    if made := _sources(document):
        yield "### Where the suites come from"
        yield made


def _about(document: Mapping[str, Any]) -> str:
    settings = document.get("settings")
    limit = settings.get("max_new_tokens") if isinstance(settings, Mapping) else None
    words = [f"Judged by `{_cell(document.get('judge') or 'nobody')}`"]
    words += [f"greedy answers of at most {limit} tokens"] if isinstance(limit, int) else []
    words += [f"measured {_cell(document['created'])[:10]}"] if isinstance(document.get("created"), str) else []
    return "; ".join(words) + ". Intervals are 95 %."


def _figures(document: Mapping[str, Any]) -> Iterator[Found]:
    for suite, figures in document[ATTACK_SUCCESS.key].items():
        if isinstance(figures, Mapping):
            yield str(suite), ATTACK_SUCCESS.key, figures
    pooled = document.get("jailbreak")
    if isinstance(pooled, Mapping):
        yield POOLED, ATTACK_SUCCESS.key, pooled
    for suite, by_measure in document["benign"].items():
        for measure, figures in by_measure.items() if isinstance(by_measure, Mapping) else ():
            if measure in MEASURES and isinstance(figures, Mapping):
                yield str(suite), measure, figures


def _rates(document: Mapping[str, Any]) -> str:
    found = [(suite, measure, figures, stated_rate(figures)) for suite, measure, figures in _figures(document)]
    whole = [(suite, measure, figures, rate) for suite, measure, figures, rate in found if rate is not None]
    bases = {(suite, measure): _base(document, suite, measure, figures) for suite, measure, figures, _ in whole}
    mended = [_corrected(figures) for _, _, figures, _ in whole]
    head = ["on", "measure", "n", *(["base"] if any(bases.values()) else []), "patched"]
    head += ["corrected for the judge"] if any(mended) else []
    rows = []
    for (suite, measure, _, rate), corrected in zip(whole, mended, strict=True):
        title = f"{MEASURES[measure].title} ({MEASURES[measure].better} is better)"
        row = [_cell(suite), title, str(rate.n)]
        row += [bases[suite, measure] or NONE] if "base" in head else []
        row.append(_shown(rate.value, rate.ci95))
        row += [corrected or NONE] if any(mended) else []
        rows.append(row)
    return _table(head, rows)


def _base(document: Mapping[str, Any], suite: str, measure: str, figures: Mapping[str, Any]) -> str:
    """The base's rate on the same trials, or nothing."""
    changes = document.get("changes")
    change: Any = figures.get("change") if suite == POOLED else None
    if isinstance(changes, Mapping) and isinstance(changes.get(suite), Mapping):
        change = changes[suite].get(measure)
    value: Any = change.get("base") if isinstance(change, Mapping) else None
    return f"{100 * value:.1f} %" if _number(value) else ""


def _corrected(figures: Mapping[str, Any]) -> str:
    found = figures.get("corrected")
    rate = stated_rate({**found, "n": figures.get("n")}) if isinstance(found, Mapping) else None
    return "" if rate is None else _shown(rate.value, rate.ci95)


def _shown(value: float, ends: Sequence[float]) -> str:
    return f"{100 * value:.1f} % [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _scores(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    ability = document.get("ability")
    for task, metrics in ability.items() if isinstance(ability, Mapping) else ():
        for metric, score in metrics.items() if isinstance(metrics, Mapping) else ():
            if isinstance(score, Mapping) and _number(score.get("value")) and type(score.get("n")) is int:
                yield str(task), str(metric), score


def _ability(document: Mapping[str, Any]) -> str:
    rows = []
    for task, metric, score in _scores(document):
        ends: Any = score.get("ci95")
        change = score.get("change")
        whole = isinstance(ends, list) and len(ends) == 2 and all(map(_number, ends))
        shown = f"{score['value']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if whole else "")
        base: Any = change.get("base") if isinstance(change, Mapping) else None
        rows.append([_cell(task), _cell(metric), str(score["n"]), f"{base:.3f}" if _number(base) else NONE, shown])
    return _table(["utility", "metric", "n", "base", "patched"], rows)


def _adaptive(document: Mapping[str, Any]) -> str:
    patched, base = (_attacks(document.get(name)) for name in ("patch", "base"))
    rows = []
    for attack, (needs, rate) in patched.items():
        before = base[attack][1] if attack in base else None
        shown = NONE if before is None else _shown(before.value, before.ci95)
        rows.append([_cell(attack), _cell(needs), str(rate.n), shown, _shown(rate.value, rate.ci95)])
    return _table(["attack", "the attacker has", "n", "base", "patched"], rows)


def _attacks(rows: Any) -> dict[str, tuple[str, StatedRate]]:
    found = {}
    for row in rows if isinstance(rows, list) else ():
        rate = stated_rate(row) if isinstance(row, Mapping) else None
        if rate is not None:
            found[str(row.get("attack"))] = str(row.get("knows")), rate
    return found


def _sources(document: Mapping[str, Any]) -> str:
    suites = document.get("suites")
    named = suites.items() if isinstance(suites, Mapping) else ()
    keys = ("source", "licence", "n", "available")
    rows = [[_cell(name), *(_cell(s.get(key, NONE)) for key in keys)] for name, s in named if isinstance(s, Mapping)]
    return _table(["suite", "source", "licence", "n", "drawn from"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; texts of the documents have gone through ``_cell``."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    """Text that stays text in a Markdown cell: no line breaks, bars, markup or links."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return "".join(f"\\{c}" if c in "\\|`*_[]<>&!#" else c for c in text)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
