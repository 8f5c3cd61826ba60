"""An evaluation as one page for a browser: tables, plots, and every answer, base beside patched, to be filtered.

The page holds all that it needs and may ask for nothing: its own policy forbids every request, and every script and
style but its own two. Answers of models are hostile text. They are escaped here, and nothing on the page makes markup
of them.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.escape import short
from nest_runtime.evaluate.judges.base import OUTCOMES
from nest_runtime.evaluate.markdown import NONE, interval, p_value, percent, signed_percent
from nest_runtime.evaluate.page.charts import outcome_bars, rate_bars
from nest_runtime.evaluate.records import Record, rate_of, trials_of
from nest_runtime.io import atomic_write
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES
from nest_runtime.prompts.content import text_of

if TYPE_CHECKING:
    from nest_runtime.evaluate.report import EvalResult
    from nest_runtime.evaluate.stats import Rate

BASE, PATCH = "base", "patch"  # series of the plots


def write_page(result: EvalResult, path: str | Path) -> Path:
    """Write the page of a result to a file, atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, page(result))
    return target


def page(result: EvalResult) -> str:
    """The page, as HTML."""
    css, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    who = _who(result)
    parts = [
        f"<h1>{_text(who)}</h1>",
        _about(result),
        _plots(result),
        _section("Rates", _rates(result)),
        _section("General ability", _ability(result)),
        _section("Where the suites come from", _sources(result)),
        _answers(result),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(who)}</title><style>{css}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + f"</main><script>{script}</script></body></html>\n"
    )


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(value: object) -> str:
    """Any text as HTML: escaped, half characters and control characters shown as marks of their own."""
    shown = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in str(value))
    return escape(shown.encode("utf-8", "replace").decode("utf-8"))


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{title}</h2>{inner}</section>" if inner else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table whose first columns are words and whose others are figures."""
    kinds = ["" if number < words else ' class="n"' for number in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{_text(row[0])}</th>{cells}</tr>')
    name = _text(head[0])
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="table by {name}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        if lines
        else ""
    )


def _who(result: EvalResult) -> str:
    subject = f"patch {result.patch} ({short(result.digest)})" if result.digest else "the bare base"
    return f"{result.model or 'A model'} with {subject}"


def _about(result: EvalResult) -> str:
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.settings.items())
    judges = ", ".join(result.judges) or "nobody"
    lines = [f"Judged by {judges}. Answers: {settings}. Made {result.created}. Model hash {result.model_hash}."]
    if result.agreement is not None:
        kappa = "undefined" if result.agreement.kappa is None else f"{result.agreement.kappa:.2f}"
        names = " and ".join(result.agreement.judges)
        lines.append(f"{names} agree on {result.agreement.agreed}; Cohen's kappa {kappa}.")
    return "".join(f'<p class="soft">{_text(line)}</p>' for line in (*lines, *result.notes))


def _plots(result: EvalResult) -> str:
    new, old = result.trials, trials_of(result.base_records)
    made = []
    for key, measure in MEASURES.items():
        suites = list(dict.fromkeys(r.suite for r in new if r.measure == key))
        if suites:
            groups = [(suite, _pair(new, old, key, suite)) for suite in suites]
            made.append(rate_bars(f"{measure.title.capitalize()} by suite ({measure.better} is better)", groups))
    families = sorted({r.family for r in new if r.measure == ATTACK_SUCCESS.key})
    if len(families) > 1:
        groups = [(family, _pair(new, old, ATTACK_SUCCESS.key, family=family)) for family in families]
        made.append(rate_bars("Attack success by family", groups))
    rows = [(suite, _outcomes([r for r in new if r.suite == suite])) for suite in dict.fromkeys(r.suite for r in new)]
    if rows:
        made.append(outcome_bars("What the answers were" + (", patched" if result.digest else ""), rows))
    return f'<section><h2>Plots</h2><div class="plots">{"".join(made)}</div></section>' if made else ""


def _pair(
    new: Sequence[Record], old: Sequence[Record], measure: str, suite: str | None = None, family: str | None = None
) -> dict[str, Rate]:
    def rate(rows: Sequence[Record]) -> Rate:
        fits = [r for r in rows if r.measure == measure and suite in (None, r.suite) and family in (None, r.family)]
        return rate_of(fits)

    return {BASE: rate(old), PATCH: rate(new)} if old else {PATCH: rate(new)}


def _outcomes(rows: Sequence[Record]) -> dict[str, int]:
    counted = Counter(row.outcome for row in rows)
    return {name: counted[name] for name in OUTCOMES if counted[name]}


def _rates(result: EvalResult) -> str:
    head = ["suite", "measure", "rate", "95 % interval", "n", "other"]
    pairs = list(dict.fromkeys((r.suite, r.measure) for r in result.trials))
    mended = any(result.corrected(measure) for _, measure in pairs)
    head += ["corrected for the judge", "its 95 % interval"] if mended else []
    head += ["base", "relative change", "McNemar p"] if result.changes is not None else []
    rows = []
    for suite, measure in pairs:
        rate = result.rate(measure, suite)
        row: list[object] = [suite, MEASURES[measure].title, percent(rate.value), interval(rate.ci95), rate.n]
        row.append(percent(result.other(measure, suite)))
        if mended:
            found = result.corrected(measure, suite)
            row += [NONE, NONE] if found is None else [percent(found.value), interval(found.ci95)]
        if result.changes is not None:
            change = result.changes[suite][measure]
            row += [percent(change.base.value), signed_percent(change.relative), p_value(change.p_value)]
        rows.append(row)
    return _table(head, rows, words=2)


def _ability(result: EvalResult) -> str:
    rows = []
    for score in result.ability:
        ends = NONE if score.ci95 is None else " to ".join(f"{end:.3f}" for end in score.ci95)
        change = score.change or {}
        base, moved = change.get("base"), change.get("difference")
        name = f"{score.group} / {score.task}" if score.group else score.task
        compared = [NONE if base is None else f"{base:.3f}", NONE if moved is None else f"{moved:+.3f}"]
        rows.append([name, score.name, f"{score.value:.3f}", ends, score.n, *compared])
    return _table(["task", "metric", "value", "95 % interval", "n", "base", "change"], rows, words=2)


def _sources(result: EvalResult) -> str:
    rows = [[name, found.source, found.licence, found.n, found.available] for name, found in result.suites.items()]
    return _table(["suite", "source", "licence", "n", "drawn from"], rows, words=3)


def _answers(result: EvalResult) -> str:
    """Every record with its answers; the form that filters them works by page.js and is hidden without it."""
    if not result.records:
        return ""
    before = {record.id: record for record in result.base_records}
    cards = [_card(record, before.get(record.id), bool(before)) for record in result.records]
    suites = dict.fromkeys(record.suite for record in result.records)
    outcomes = [name for name in OUTCOMES if any(r.outcome == name for r in result.records)]
    former = [name for name in OUTCOMES if any(r.outcome == name for r in before.values())]
    fields = [_select("suite", "Suite", suites), _select("outcome", "Outcome", outcomes)]
    if before:
        fields.append(_select("base", "Outcome of the base", former))
        fields.append('<label class="row"><input type="checkbox" name="changed"> another outcome than the base</label>')
    fields.append('<label>Text<input type="search" name="text" autocomplete="off"></label>')
    fields.append('<label class="row"><input type="reset" value="Show all"></label>')
    form = f'<form id="filter" hidden>{"".join(fields)}<p id="count" role="status"></p></form>'
    return f"<section><h2>Answers</h2>{form}{''.join(cards)}</section>"


def _select(name: str, title: str, options: Iterable[str]) -> str:
    made = "".join(f'<option value="{_text(option)}">{_text(option)}</option>' for option in options)
    return f'<label>{title}<select name="{name}"><option value="">all</option>{made}</select></label>'


def _card(record: Record, before: Record | None, sided: bool) -> str:
    asked = "\n\n".join(f"{turn['role']}: {text_of(turn['content'])}" for turn in record.messages)
    sides = [_side("base", before)] if sided else []
    sides.append(_side("patched" if sided else "answer", record))
    data = f'data-suite="{_text(record.suite)}" data-outcome="{record.outcome}"'
    data += f' data-base="{before.outcome}"' if before is not None else ""
    title = f"{_text(record.suite)} · {_text(record.attack)} · {_text(record.id)}"
    return (
        f"<article {data}><h3>{title}</h3>"
        f'<pre class="asked" dir="auto" tabindex="0">{_text(asked)}</pre>'
        f'<div class="sides">{"".join(sides)}</div></article>'
    )


def _side(title: str, record: Record | None) -> str:
    if record is None:
        return f'<section><h4>{title}</h4><p class="soft">not asked</p></section>'
    verdicts = []
    for judge, verdict in record.verdicts.items():
        more = "" if verdict.score is None else f" {verdict.score:.2f}"
        reason = f' <span class="soft">{_text(verdict.reason)}</span>' if verdict.reason else ""
        name = f" ({_text(judge)})" if len(record.verdicts) > 1 else ""
        verdicts.append(f'<strong class="o-{verdict.outcome}">{verdict.outcome}</strong>{more}{name}{reason}')
    return f'<section><h4>{title}: {", ".join(verdicts)}</h4><pre dir="auto">{_text(record.answer)}</pre></section>'
