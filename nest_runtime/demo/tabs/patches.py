"""The tab Patches: what there is, and what differs; with admin, what changes it (admin.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from nest_runtime.demo.html import markup
from nest_runtime.demo.html.glossary import titled
from nest_runtime.demo.state import DemoState
from nest_runtime.demo.tabs.admin import AdminParts, build_admin
from nest_runtime.demo.tabs.chat import first_patch
from nest_runtime.errors import NestError
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, stated_rate

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.entries import Entry

PERCENT = "\N{NO-BREAK SPACE}%"  # in sentences, where a line may end


@dataclass(frozen=True)
class PatchesParts:
    """What the page fills: the list of patches, and the lists to choose one from."""

    listing: gr.HTML
    old: gr.Dropdown
    new: gr.Dropdown
    admin: AdminParts | None


def build(state: DemoState) -> PatchesParts:
    """Lay the tab out; ``admin.connect`` makes the buttons work that change what other tabs show."""
    listing = gr.HTML(elem_id="patches", padding=False)
    gr.HTML(markup.wrap("<h2>Difference of two versions</h2>"), padding=False)
    with gr.Row(equal_height=True):
        old = gr.Dropdown(label="From", interactive=True, filterable=False, elem_id="diff-old", min_width=120)
        new = gr.Dropdown(label="To", interactive=True, filterable=False, elem_id="diff-new", min_width=120)
        compare = gr.Button("Compare", elem_id="diff", elem_classes="nr-go", size="md", min_width=100)
    difference = gr.HTML(elem_id="difference", padding=False)
    compare.click(lambda a, b: diff_html(state, a, b), [old, new], difference, show_progress="hidden")
    if state.admin:
        return PatchesParts(listing, old, new, build_admin())
    words = "To activate, roll back, push and pull from here, start the demo with `--admin`."
    gr.HTML(markup.wrap(markup.note(words)), padding=False)
    return PatchesParts(listing, old, new, None)


def listing_html(state: DemoState) -> str:
    """All patches of the model: lineage, size, figures, signature."""
    try:
        entries, active = state.entries(), state.backend.active()
        rows = [_row(state, entry, entries, active) for entry in entries]
    except NestError as error:
        return markup.wrap(markup.alert(error))
    if not rows:
        return markup.wrap(first_patch(state))
    numbers = (*(measure.title for measure in MEASURES.values()), "neurons", "trained numbers", "file")
    columns = ("version", *numbers, "lineage", "signature", "name", "digest")
    marked = [n for n, entry in enumerate(entries) if entry.digest == active]
    base = next((figures[1] for figures in (_figures(state.patch(e.digest)) for e in entries) if figures[1]), "")
    table = markup.table(columns, rows, caption="Patches of this model", numbers=numbers, marked=marked)
    without = any(_figures(state.patch(entry.digest))[0][0] == markup.percent(None) for entry in entries)
    elsewhere = "A dash: the patch's header does not state it; the tab Evidence has what else was measured."
    return markup.wrap(table, *(markup.note(words) for words in (base, elsewhere if without else "") if words))


def _row(state: DemoState, entry: Entry, entries: list[Entry], active: str | None) -> list[str]:
    patch = state.patch(entry.digest)
    now = ' <span class="nr-badge nr-active">active</span>' if entry.digest == active else ""
    return [
        f"{markup.text(state.called(entry.digest))}{now}",
        *_figures(patch)[0],
        f"{patch.neurons:,}",
        f"{patch.parameters:,}",
        _size(entry.bytes),
        markup.text(_lineage(entry, entries)),
        markup.text(state.signature(entry)),
        markup.text(entry.name),
        markup.code(entry.digest),
    ]


def _lineage(entry: Entry, entries: list[Entry]) -> str:
    """``v3 ← v2 ← v1``, as far back as the store knows."""
    by_digest = {item.digest: item for item in entries}
    steps: list[str] = []
    parent = entry.parent
    while parent is not None and len(steps) < len(entries) + 1:
        known = by_digest.get(parent)
        steps.append(known.version if known else f"{parent[:15]}…")
        parent = known.parent if known else None
    return " ← ".join([entry.version, *steps]) if steps else "trained anew"


def _figures(patch: Patch) -> tuple[list[str], str]:
    """The rates that a patch's header states, of each measure, and the base's as a sentence."""
    metrics = patch.header()["metrics"]
    test, base = _rates(metrics.get("test")), _rates(metrics.get("base"))
    shown = [markup.percent(test.get(name)) for name in MEASURES]
    if ATTACK_SUCCESS.key not in base:
        return shown, ""
    rates = (f"{measure.title} {markup.percent(base.get(name))}" for name, measure in MEASURES.items())
    words = ", ".join(rates).replace(" %", PERCENT)
    about = (
        "The percentages are those that the patches' headers state. Attack success is the share of jailbreaks that "
        "were answered. Over-refusal is the share of harmless prompts that were refused, and utility the share of them "
        "that were answered correctly."
    )
    return shown, f"{about} The base: {words}."


def _rates(figures: Any) -> dict[str, float]:
    """The rates in a header's figures by measure, as ``patches/make.py`` writes them; attack success of jailbreaks."""
    from nest_runtime.evaluate.suites import JAILBREAK

    found = {}
    for name in MEASURES if isinstance(figures, dict) else ():
        value = figures.get(name)
        if isinstance(value, dict) and name == ATTACK_SUCCESS.key:
            value = value.get(JAILBREAK)
        rate = stated_rate(value) if isinstance(value, dict) else None
        if rate is not None:
            found[name] = rate.value
    return found


def _size(count: int) -> str:
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def diff_html(state: DemoState, old: str | None, new: str | None) -> str:
    """What changed from one patch to another."""
    from nest_runtime.patch.algebra import diff

    if old is None or new is None:
        return markup.said("There is nothing to compare yet: choose two versions.")
    if old == new:
        return markup.said("These are the same version: choose two that differ.")
    try:
        before, after = (state.patch(state.entry(digest).digest) for digest in (old, new))
        words = f"{state.called(old)} → {state.called(new)}"
    except NestError as error:
        return markup.wrap(markup.alert(error))
    found = diff(before, after)
    words += " (re-tuned from it)" if found["is_child"] else ""
    words += "" if found["same_base"] else "; for different base models"
    fields = [
        [titled(key), _brief(value["old"]), _brief(value["new"])]
        for key, value in found["header"].items()
        if not isinstance(value["old"], dict | list) and not isinstance(value["new"], dict | list)
    ]
    sites = [
        [
            markup.text(row["site"]),
            f"+{row['added']} −{row['removed']} ={row['kept']}",
            f"{row['clusters']['old']} → {row['clusters']['new']}",
            _number(row.get("change_norm")),
            _number(row.get("cosine")),
        ]
        for row in found["sites"]
    ]
    parts = [markup.note(words)]
    if fields:
        parts.append(markup.table(("field", "from", "to"), fields, caption="Header"))
    if sites:
        columns = ("site", "neurons + − =", "clusters", "norm of the change", "cosine")
        parts.append(markup.table(columns, sites, caption="Sites that differ", numbers=columns[3:]))
    else:
        parts.append(markup.note("No site differs."))
    return markup.wrap(*parts)


def _brief(value: Any) -> str:
    words = "–" if value in (None, "") else str(value)
    return markup.code(words) if words.startswith("sha256:") else markup.text(words)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
