"""The page: four tabs, put together, and the lists of patches that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from nest_runtime.demo import results
from nest_runtime.demo.backend import BASE, PatchChoice
from nest_runtime.demo.html import markup
from nest_runtime.demo.state import DemoState
from nest_runtime.demo.tabs import admin, chat, evidence, neurons, patches

CSS = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
_SIZE = gr.themes.Size(**dict.fromkeys(("xxs", "xs", "sm", "md", "lg", "xl", "xxl"), "15px"), name="one")
_FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Cascadia Mono", "Menlo", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Gradio's plain theme with the system's fonts and a blue that is legible on light and dark."""
    made = gr.themes.Default(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", text_size=_SIZE, font=_FONT, font_mono=_MONO
    )
    return made.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_cancel_background_fill="#b3261e",
        button_cancel_background_fill_hover="#8c1d18",
        button_cancel_background_fill_dark="#b3261e",
        button_cancel_background_fill_hover_dark="#8c1d18",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color_dark="*neutral_200",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def build(state: DemoState) -> gr.Blocks:
    """The whole page over a backend. Starts nothing."""
    with gr.Blocks(title=f"nest-runtime: {state.backend.name}", analytics_enabled=False) as page:
        backend, patched = state.backend, state.backend.preferred() is not None
        head = markup.title(backend.name, backend.place, backend.about, patched=patched, based=state.has_base())
        gr.HTML(head, padding=False)
        baseless = gr.HTML(padding=False, elem_id="no-base")  # above the tabs: it is true of each of them
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                talking = chat.build(state)
            with gr.Tab("Patches", id="patches", render_children=True) as second:
                shipped = patches.build(state)
            with gr.Tab("Neurons", id="neurons", render_children=True):
                where, _ = neurons.build(state, talking.talk)
            with gr.Tab("Evidence", id="evidence", render_children=True):
                measured, comparison = evidence.build(state)
        gr.HTML(markup.glossary(), padding=False, elem_id="glossary")
        switched = [shipped.admin.which] if shipped.admin is not None else []
        by_digest = [where, shipped.old, shipped.new, *switched]
        lists = [shipped.listing, talking.picker, measured, *by_digest]
        page.load(lambda: chat.missing_html(state), None, talking.missing, show_progress="hidden")
        page.load(lambda: chat.baseless_html(state), None, baseless, show_progress="hidden")
        page.load(lambda: chat.toggled(state), None, talking.toggle, show_progress="hidden")
        # large: not before the rest
        page.load(lambda: results.results_html(state), None, comparison, show_progress="hidden")
        _Lists(state, len(by_digest)).connect(page, second, shipped, lists)
    for event in page.fns.values():
        event.api_visibility = "private"  # for this page alone; its description would make up most of the page
    page.queue(api_open=False, default_concurrency_limit=4)
    return page


class _Lists:
    """The contents of every list of patches, in the order of the page's ``lists``."""

    def __init__(self, state: DemoState, by_digest: int) -> None:
        self.state, self.by_digest = state, by_digest

    def connect(self, page: gr.Blocks, tab: gr.Tab, parts: patches.PatchesParts, lists: list[Any]) -> None:
        """Fill the lists when the page is loaded, and again when patches may have changed."""
        page.load(self.first, None, lists, show_progress="hidden")
        tab.select(self.again, None, lists, show_progress="hidden")
        if parts.admin is not None:
            admin.connect(self.state, parts.admin, self.again, lists)

    def again(self) -> list[Any]:
        """The contents; the current choice stays."""
        answering = [(_title(choice), choice.label) for choice in self.state.backend.choices()]
        named = self.state.names()
        patched = [item for item in answering if item[1] != BASE]
        return [
            patches.listing_html(self.state),
            gr.update(choices=answering),
            gr.update(choices=patched),
            *[gr.update(choices=named) for _ in range(self.by_digest)],
        ]

    def first(self) -> list[Any]:
        """The contents, and what is chosen at first: the preferred patch, and the one that it was made from."""
        found, preferred = self.again(), self.state.backend.preferred()
        newest = self.state.newest()
        entries = self.state.entries()
        parent = next((e.parent for e in entries if e.digest == newest), None)
        older = parent if parent in {e.digest for e in entries} else next((e.digest for e in entries), None)
        chosen = [newest, older, newest, newest][: self.by_digest]
        for update in found[1:3]:
            update["value"] = preferred.label if preferred is not None else None
        if preferred is None:
            found[1]["value"] = BASE
        for update, digest in zip(found[3:], chosen, strict=True):
            update["value"] = digest
        return found


def _title(choice: PatchChoice) -> str:
    if choice.label == BASE:
        return "base (no patch)"
    return f"{choice.label} ({choice.shown})" if choice.shown else choice.label


def script() -> str:
    """What the page's head holds: what the page does by itself."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"
