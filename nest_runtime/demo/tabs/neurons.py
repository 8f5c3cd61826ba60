"""The tab Neurons: where a patch acts, and what its neurons do on a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nest_runtime.demo.backend import Message
from nest_runtime.demo.html import figures, markup
from nest_runtime.demo.state import DemoState
from nest_runtime.demo.tabs.chat import first_patch
from nest_runtime.demo.talk import Talk
from nest_runtime.errors import NestError

ALL = "all, by cluster"
PROMPT = 300  # characters of the prompt that stand above its charts
NONE = "Neurons are a patch's, and this model has no patch yet."


def build(state: DemoState, talk: gr.State) -> tuple[gr.Dropdown, gr.HTML]:
    """Lay the tab out and connect it; returns the list of patches, and the map, which the page fills.

    Args:
        state: the demo.
        talk: the chat's conversation.
    """
    which = gr.Dropdown(label="Patch", interactive=True, filterable=False, elem_id="neurons-patch")
    shown = gr.HTML(elem_id="neuron-map", padding=False)
    gr.HTML(markup.wrap("<h2>Activation on the last prompt, token by token</h2>"), padding=False)
    if state.backend.preferred() is None:
        gr.HTML(markup.wrap(markup.note(NONE)), padding=False)
    elif state.local is None:
        words = "Activations need the model in this process: start the demo without `--url` to see them."
        gr.HTML(markup.wrap(markup.note(words)), padding=False)
    else:
        with gr.Row(equal_height=True):
            site = gr.Dropdown(
                [ALL], value=ALL, label="Rows", interactive=True, filterable=False, elem_id="site", min_width=240
            )
            own = gr.Textbox(
                label="Prompt", placeholder="empty: the last one of the chat", elem_id="probe-prompt", scale=2
            )
            look = gr.Button(
                "Show activations", variant="primary", elem_id="probe", elem_classes="nr-go", size="md", min_width=120
            )
        heat = gr.HTML(elem_id="activations", padding=False)
        tab = Neurons(state)
        look.click(tab.activations, [which, site, own, talk], heat, show_progress="hidden", concurrency_limit=2)
        site.input(tab.activations, [which, site, own, talk], heat, show_progress="hidden", concurrency_limit=2)
        which.change(tab.sites, which, site, show_progress="hidden")
    gr.HTML(markup.wrap("<h2>Statistics</h2>"), padding=False)
    statistics = gr.HTML(elem_id="statistics", padding=False)
    if state.backend.preferred() is None:
        shown.value = map_html(state, None)
    which.change(lambda digest: map_html(state, digest), which, shown, show_progress="hidden")
    which.change(lambda digest: statistics_html(state, digest), which, statistics, show_progress="hidden")
    return which, shown


class Neurons:
    """The tab's answers to what is clicked, where the model is in this process."""

    def __init__(self, state: DemoState) -> None:
        self.state = state

    def sites(self, digest: str | None) -> Any:
        """Offer the projections of a patch."""
        from nest_runtime.demo.probe import sites_of

        try:
            names = sites_of(self.state.patch(self.state.entry(digest).digest))
        except NestError:
            names = []
        return gr.Dropdown(choices=[ALL, *names], value=ALL)

    def activations(self, digest: str | None, site: str | None, own: str, talk: Talk) -> Iterator[str]:
        """The heat maps of a prompt: the one written, else the chat's last, with what was said before it.

        Yields a sign of work first.
        """
        from nest_runtime.demo.probe import activations

        if not own.strip() and talk.asked is None:
            yield markup.said("Nothing has been asked in the chat yet: send a prompt there, or write one here.")
            return
        yield markup.wrap(markup.progress("Computing the activations …", 0, 0))
        try:
            entry = self.state.entry(digest)
            messages = _messages(own, talk)
            chosen = None if site in (None, ALL) else site
            backend = self.state.local
            assert backend is not None  # the button exists only where it is not
            found = activations(backend, entry.digest, self.state.called(entry.digest), messages, chosen)
            drawn = figures.activations(found)
        except Exception as error:
            yield markup.failed(error)
            return
        prompt = f'<p class="nr-note">Prompt: {markup.text(_beginning(messages[-1]["content"]))}</p>'
        yield markup.wrap(prompt, drawn)


def _beginning(prompt: str) -> str:
    return prompt if len(prompt) <= PROMPT else f"{prompt[:PROMPT]}…"


def _messages(own: str, talk: Talk) -> list[Message]:
    if own.strip():
        return [{"role": "user", "content": own.strip()}]
    before = talk.messages(1, len(talk.turns) - 1)
    return [*before, {"role": "user", "content": talk.turns[-1].prompt}]


def map_html(state: DemoState, digest: str | None) -> str:
    """The map of a patch's neurons, and the same as tables."""
    from nest_runtime.plots.view import view_of_patch

    if digest is None and state.backend.preferred() is None:
        return markup.wrap(first_patch(state))
    try:
        patch = state.patch(state.entry(digest).digest)
    except NestError as error:
        return markup.wrap(markup.alert(error))
    view = view_of_patch(patch)
    neurons, clusters = markup.term("neuron", "neurons"), markup.term("cluster", "clusters")
    facts = f"{markup.term('z-score')}, cluster, {markup.term('loading')} and row-update norm"
    name = markup.text(state.called(patch.digest))
    words = (
        f"{name} changes {patch.neurons:,} {neurons} in {patch.clusters} {clusters} with {patch.parameters:,} "
        f"{markup.term('trained numbers')}. Hover or tap a mark for its {facts}; layers go down, "
        "neurons across, and larger marks have larger updates. The tables below say the same."
    )
    tables = f"<details><summary>The neurons as tables</summary>{figures.neuron_tables(view)}</details>"
    return markup.wrap(f'<p class="nr-note">{words}</p>', figures.neuron_maps(view), tables)


def statistics_html(state: DemoState, digest: str | None) -> str:
    """Silhouettes and z-scores of a patch."""
    from nest_runtime.plots.view import view_of_patch

    if digest is None and state.backend.preferred() is None:
        return markup.wrap(markup.note(NONE))
    try:
        return markup.wrap(figures.statistics(view_of_patch(state.patch(state.entry(digest).digest))))
    except NestError as error:
        return markup.wrap(markup.alert(error))
