"""What was measured on the model shown: the comparison with other methods, the results of its patches, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nest_runtime.demo.backend import Backend
from nest_runtime.demo.html import charts, markup
from nest_runtime.demo.state import DemoState
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, measures_of, stated_rate
from nest_runtime.model.load import REFERENCE

MARKED = ("nest", "@")  # in the names of methods that are ours
CAPTION = "Every method on the same prompts; the interval is that of attack success"
SUITES = {  # of benchmarks/real_models.py, for people
    "plain": "harmful, asked plainly",
    "wild": "harmful, behind prompts from the wild",
    "jailbreakchat": "harmful, in JailbreakChat's prompts",
    "selfcipher": "harmful, in SelfCipher",
    "codeattack": "harmful, in CodeAttack",
    "completion": "harmful, a text to complete",
    "built-in": "harmful, in the built-in attacks",
    "prefill": "harmful, the answer begun",
    "multi-turn": "harmful, over several turns",
    "jailbreaks, pooled": "harmful, all jailbreaks",
    "xstest-safe": "harmless, XSTest",
    "jailbreakbench-benign": "harmless, JailbreakBench",
    "coconot-contrast": "harmless, CoCoNot's contrasts",
    "benign, pooled": "harmless, all",
}


def comparison_folders() -> list[Path]:
    """The folders of measured comparisons, of a wheel or of a checkout; that of the reference model first."""
    for compared, real in zip(_folders("compare"), _folders("real"), strict=True):
        found = [folder for folder in (compared, *sorted(real.glob("*/"))) if (folder / "comparison.json").is_file()]
        if found:
            return found
    return []


def _folders(name: str) -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    return [package / "_results" / name, package.parent / "docs" / "results" / name]


def results_html(state: DemoState) -> str:
    """What was measured on the model shown: its patches and comparisons, else what its patches state."""
    head = "<h2>What was measured</h2>"
    compared = "".join(comparison_html(folder) for folder in comparison_folders() if _is_of(folder, state.backend))
    if compared and state.backend.name == REFERENCE:
        return compared
    entries = state.entries() if state.backend.model_hash is not None else []  # else of whichever models
    measured = "".join(_measured(state, found) for found in _measurements({entry.digest for entry in entries}))
    if measured or compared:
        return (markup.wrap(head, measured) if measured else "") + compared
    rows = [
        row
        for entry in entries
        for row in _stated(state.called(entry.digest), state.patch(entry.digest).header()["metrics"])
    ]
    if rows:
        words = "What the headers of its patches state; nothing is run here."
        columns = ("patch", "figure", "rate", "95 % interval", "n")
        table = markup.table(columns, rows, caption=f"Results on {state.backend.name}", numbers=columns[2:])
        return markup.wrap(head, markup.note(words), table)
    if state.backend.name == REFERENCE:
        words = "The measured comparison is not part of this installation; `nest-runtime compare` makes one."
    else:
        words = (
            f"There are no results for {state.backend.name} here. `nest-runtime eval` measures a patch on your own "
            "prompts, `nest-runtime compare` sets it beside other methods."
        )
    return markup.wrap(head, markup.note(words))


def _measurements(digests: set[str]) -> list[dict[str, Any]]:
    """The kept results of benchmarks/real_models.py on some patches."""
    files = next((sorted(path.glob("*.json")) for path in _folders("real") if path.is_dir()), [])
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [item for item in found if item.get("digest") in digests]


def _measured(state: DemoState, found: Mapping[str, Any]) -> str:
    """The rates of a patch beside its base's."""
    name = state.called(found["digest"])
    base, patch = found["base"]["rates"], found["patch"]["rates"]
    rows = [
        [
            markup.text(SUITES.get(suite, suite)),
            *(_rate(rates.get(suite)) for rates in (base, patch)),
            f"{patch[suite]['n']:,}",
        ]
        for suite in patch
    ]
    about = (
        f"{name}, {found['part']} prompts, answers of {found['tokens']} tokens, judge {found['judge']}, "
        f"{found['date'][:10]}; not run now. Harmful prompts: the share answered. Harmless ones: the share refused."
    )
    columns = ("prompts", "base", name, "n")
    table = markup.table(columns, rows, caption=f"{name} beside its base", numbers=columns[1:])
    return markup.note(about) + table


def _rate(rate: Mapping[str, float] | None) -> str:
    if rate is None:
        return "–"
    share, ends = f"{100 * rate['rate']:.1f} %", f"[{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"
    return f'{share} <br class="nr-break">{ends}'  # on two lines where it is narrow


def _is_of(folder: Path, backend: Backend) -> bool:
    """Whether a comparison was made on the model shown; of a server only the name is known."""
    made = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    if backend.model_hash is None:
        return bool(made["model"] == backend.name)
    return bool(made["base_hash"] == backend.model_hash)


def _stated(patch: str, metrics: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """The rates among a patch's figures, each with its interval and count, as rows of a table."""
    rows = []
    for key, value in metrics.items():
        if not isinstance(value, Mapping):
            continue
        rate = stated_rate(value)
        if rate is not None:
            named, share = markup.text(prefix + key), markup.percent(rate.value)
            rows.append([markup.text(patch), named, share, _interval(rate.ci95), f"{rate.n:,}"])
        else:
            rows += _stated(patch, value, f"{prefix}{key}, ")
    return rows


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def comparison_html(folder: Path) -> str:
    """The comparison's table and charts."""
    head = "<h2>Compared with other methods</h2>"
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    seeds = len(data["seeds"])
    about = f"{seeds} seed{'s' if seeds > 1 else ''}, judge {data['judge']}, {data['created'][:10]}"
    made = f"Model {data['model']}, {about}; not run now."
    measured = {name: measure.title for name, measure in MEASURES.items() if _is_known(data["rows"], name)}
    columns = ("method", *measured.values(), "95 % interval", "garbled", "trained numbers")
    rows = [_row(row, measured) for row in data["rows"]]
    marked = [n for n, row in enumerate(data["rows"]) if any(part in row["method"] for part in MARKED)]
    table = markup.table(columns, rows, caption=CAPTION, numbers=columns[1:], marked=marked)
    return markup.wrap(head, markup.note(made), table, _charts(data["rows"]))


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Attack success against what it costs, against the trained numbers, and by family."""
    title = ATTACK_SUCCESS.title
    success = charts.linear(f"{title} (%)", 0, max(100 * row["ci95"][1] for row in rows), steps=4)
    costs = [
        charts.scatter(
            f"{title.capitalize()} against {measure.title}",
            [_point(row, measure.key) for row in rows],
            charts.linear(f"{measure.title} (%)", *_span(rows, measure.key), steps=4),
            success,
        )
        for measure in measures_of("benign")
        if _is_known(rows, measure.key)
    ]
    trained = [max(row["trainable"], 1) for row in rows]
    powers = tuple((10.0**n, "none" if n == 0 else f"{10**n:,}") for n in range(0, 8, 2) if 10**n <= 10 * max(trained))
    numbers = charts.Axis("trained numbers", -0.3, len(str(max(trained))), powers, log=True)
    costs.append(
        charts.scatter(
            f"{title.capitalize()} against trained numbers",
            [
                charts.Point(point.name, x, point.y, point.words, None, point.y_ends)
                for x, point in zip(trained, [_point(row, ATTACK_SUCCESS.key) for row in rows], strict=True)
            ],
            numbers,
            success,
        )
    )
    families = sorted({family for row in rows for family in row["asr_by_family"]})
    cells = [[row["asr_by_family"].get(family, {}).get(ATTACK_SUCCESS.rate_key) for family in families] for row in rows]
    key = charts.key([_title(row) for row in rows])
    table = charts.shares(
        f"{title.capitalize()} by family of jailbreaks (%)", [_title(r) for r in rows], families, cells
    )
    return f'{key}<div class="nr-maps">{"".join(costs)}</div>{table}'


def _is_known(rows: Sequence[Mapping[str, Any]], measure: str) -> bool:
    """Whether every row has a rate of a measure."""
    return all((row["rates"].get(measure) or {}).get("value") is not None for row in rows)


def _point(row: Mapping[str, Any], measure: str) -> charts.Point:
    rate, (low, high) = row["rates"][measure], row["ci95"]
    known = {name: measure for name, measure in MEASURES.items() if row.get(name) is not None}
    shares = {name: f"{measure.title} {markup.percent(row[name])}" for name, measure in known.items()}
    shares[ATTACK_SUCCESS.key] += f" [{100 * low:.1f}, {100 * high:.1f}]"
    words = f"{_title(row)}: {', '.join(shares.values())}, {row['trainable']:,} trained numbers"
    ends = (100 * rate["ci95"][0], 100 * rate["ci95"][1])
    return charts.Point(
        _title(row), 100 * rate["value"], 100 * row[ATTACK_SUCCESS.key], words, ends, (100 * low, 100 * high)
    )


def _span(rows: Sequence[Mapping[str, Any]], measure: str) -> tuple[float, float]:
    ends = [100 * end for row in rows for end in row["rates"][measure]["ci95"]]
    return min(ends), max(ends)


def _title(row: Mapping[str, Any]) -> str:
    """A method's name; that of a finished patch is its version, as everywhere on the page."""
    return str(row["title"]).rpartition("@")[2]


def _row(row: Mapping[str, Any], measured: Iterable[str]) -> list[str]:
    return [
        markup.text(_title(row)),
        *(markup.percent(row.get(name)) for name in measured),
        _interval(row["ci95"]),
        markup.percent(row["other"]),
        f"{row['trainable']:,}",
    ]
