"""A comparison's JSON (comparison.document) as Markdown: the rows, the paper's figures, the sweep, remarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nest_runtime.evaluate.markdown import NONE, interval, p_value, percent, signed_percent, size, table
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, OVER_REFUSAL, Measure


def markdown(data: Mapping[str, Any]) -> str:
    """The table of rows, the paper's figures, and the sweep."""
    notes = "\n".join(f"Note: {note}." for note in data["notes"])
    parts = [_about(data), _rows_table(data["rows"]), _corrected_table(data["rows"])]
    parts += [_refused_table(data["rows"]), _ability_table(data["rows"])]
    parts += [_paper_table(data["paper"]), _sweep_table(data["sweep"]), _source_table(data), notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(data: Mapping[str, Any]) -> str:
    """What was compared, and where: enough to do it again."""
    seeds, machine = len(data["seeds"]), data["machine"]
    counts = f"{data['harmful']['count']} harmful and {data['benign']['count']} benign training prompts"
    code = f"nest-runtime {data['nest_runtime']}" + (f" ({data['commit'][:12]})" if data["commit"] else "")
    place = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads on {machine['cores']} cores"
    versions = ", ".join(f"{name} {data['packages'][name]}" for name in ("torch", "transformers"))
    return (
        f"Model {data['model']} (`{data['base_hash'][:19]}`), {counts}, {data['recipe']['steps']} steps, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, judge {data['judge']}. "
        f"{code}, {versions}, {place}, {data['created'][:10]}."
    )


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    suites = list(rows[0]["asr_by_suite"])
    extra = suites if len(suites) > 1 else []
    head = ["method", "trainable", "artifact", "training s", "memory", "setting"]
    head += [ATTACK_SUCCESS.column, "95 % interval", "n", "vs base", "p", "other"]
    head += [f"{ATTACK_SUCCESS.column} {suite}" for suite in extra] + [measure.column for measure in _others()]
    return table(head, [[*_cost(row), *_safety(row), *_suites(row, extra)] for row in rows])


def _corrected_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rates as judged and corrected for the judge's errors, where these are known."""
    found = [row for row in rows if row.get("corrected")]
    names = [name for name in MEASURES if any(name in row["corrected"] for row in found)]
    lines = []
    for row in found:
        cells = [row["title"]]
        for name in names:
            mended = row["corrected"].get(name)
            cells += [percent(row["rates"][name]["value"])]
            cells += [NONE, NONE] if mended is None else [percent(mended["rate"]), interval(mended["ci95"])]
        lines.append(cells)
    head = [part for name in names for part in (MEASURES[name].column, "corrected for the judge", "95 % interval")]
    return table(["method", *head], lines) if lines else ""


def _refused_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Over-refusal by suite, where there is more than one."""
    suites = list(rows[0].get("benign_by_suite") or ())
    if len(suites) < 2:
        return ""
    lines = []
    for row in rows:
        rates = [row["benign_by_suite"][suite] for suite in suites]
        lines.append([row["title"], *(f"{percent(rate['value'])} {interval(rate['ci95'])}" for rate in rates)])
    counts = {suite: rows[0]["benign_by_suite"][suite]["n"] for suite in suites}
    return table([OVER_REFUSAL.column, *(f"{suite} (n = {n})" for suite, n in counts.items())], lines)


def _ability_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores of utility, each with its change from the base's."""
    names = list(rows[0].get("ability") or ())
    lines = []
    for row in rows if names else ():
        cells = [row["title"]]
        for name in names:
            score = row["ability"][name]
            moved = (score["change"] or {}).get("difference")
            cells.append(f"{score['value']:.3f}" + (f" ({moved:+.3f})" if moved else ""))
        lines.append(cells)
    head = ["utility", *(f"{name} (n = {rows[0]['ability'][name]['n']})" for name in names)]
    return table(head, lines) if names else ""


def _source_table(data: Mapping[str, Any]) -> str:
    """Where public suites come from."""
    sources = (data.get("suites") or {}).items()
    lines = [[name, str(s["n"]), str(s["available"]), s["licence"], s["source"]] for name, s in sources]
    return table(["suite", "n", "drawn from", "licence", "source"], lines) if lines else ""


def _cost(row: Mapping[str, Any]) -> list[str]:
    seconds = NONE if row["seconds"] is None else f"{row['seconds']:.0f}"
    sizes = [size(row["artifact_bytes"]), seconds, size(row["peak_bytes"])]
    return [row["title"], f"{row['trainable']:,}", *sizes, row["setting"]]


def _safety(row: Mapping[str, Any]) -> list[str]:
    change = (row.get("vs_base") or {}).get(ATTACK_SUCCESS.key) or {}
    compared = [signed_percent(change.get("relative")), p_value(change.get("mcnemar_p"))]
    return [percent(row[ATTACK_SUCCESS.key]), interval(row["ci95"]), str(row["n"]), *compared, percent(row["other"])]


def _suites(row: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    by_suite = [percent(row["asr_by_suite"][suite][ATTACK_SUCCESS.rate_key]) for suite in extra]
    return [*by_suite, *(percent(row.get(measure.key)) for measure in _others())]


def _others() -> list[Measure]:
    """The measures beside attack success."""
    return [measure for measure in MEASURES.values() if measure is not ATTACK_SUCCESS]


def _paper_table(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    lines = []
    for item in found:
        shown = [_number(item[key], "times" in item["claim"]) for key in ("measured", "paper")]
        met = "yes" if item["met"] else "no"
        lines.append([item["method"], item["claim"], *shown, p_value(item["mcnemar_p"]), met])
    return table(["method", "claim", "measured", "paper or goal", "p", "met"], lines)


def _sweep_table(sweep: Sequence[Mapping[str, Any]]) -> str:
    if not sweep:
        return ""
    lines = []
    for row in sweep:
        rates = [percent(row.get(name)) for name in (*MEASURES, "other")]
        chosen = "✓" if row["chosen"] else ""
        lines.append([row["method"], f"{row['knob']} {row['value']:g}", *rates, f"{row['score']:.3f}", chosen])
    shown = [measure.column for measure in MEASURES.values()]
    return table(["sweep (validation)", "value", *shown, "other", "score", "chosen"], lines)


def _number(value: float | None, times: bool) -> str:
    return f"{value:.2f}×" if times and value is not None else signed_percent(value)
