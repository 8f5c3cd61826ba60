"""The tab Chat: one prompt, two answers; examples by kind; an act in all wrappings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nest_runtime.demo.backend import PatchChoice
from nest_runtime.demo.background import BackgroundJob, Running
from nest_runtime.demo.examples import Wrapped
from nest_runtime.demo.html import markup
from nest_runtime.demo.state import DemoState
from nest_runtime.demo.talk import Talk, ask, redo
from nest_runtime.errors import NestError
from nest_runtime.model.load import REFERENCE

BUSY = "An answer is being written; Stop ends it."
GRID_TOKENS = 48  # an answer's first words tell a refusal
AT_ONCE = 4  # visitors answered at the same time
_Answers = dict[tuple[int, int], str]  # (side, wrapping) → answer


@dataclass(frozen=True)
class ChatParts:
    """What other tabs and the page need of this one."""

    picker: gr.Dropdown
    toggle: gr.Checkbox
    talk: gr.State
    missing: gr.HTML


def build(state: DemoState) -> ChatParts:
    """Lay the tab out and connect it."""
    tab = Chat(state)
    talk = gr.State(Talk())
    able, info = _toggling(state)
    missing = gr.HTML(elem_id="no-patch", padding=False)
    with gr.Row(equal_height=True):
        picker = gr.Dropdown(
            label="Patch", interactive=True, filterable=False, elem_id="picker", scale=2, min_width=210
        )
        toggle = gr.Checkbox(
            state.backend.preferred() is not None,
            label="Patch on",
            info=info,
            interactive=able,
            elem_id="toggle",
            min_width=120,
        )
    shown = gr.HTML(markup.conversation(Talk()), elem_id="conversation", padding=False)
    prompt = gr.Textbox(state.offer.prompt, label="Prompt", lines=1, max_lines=8, elem_id="prompt")
    with gr.Row(elem_classes="nr-buttons"):
        send = gr.Button("Send", variant="primary", elem_id="send", size="md", min_width=90)
        again = gr.Button("Ask the patch again", elem_id="again", size="md", min_width=90)
        stop = gr.Button("Stop", elem_id="stop", size="md", min_width=90)
        clear = gr.Button("New conversation", elem_id="clear", size="md", min_width=90)
    why = gr.HTML(elem_id="why", padding=False)
    _examples(tab, prompt, shown, talk)
    _grid(tab, picker, toggle)
    gr.on(
        [send.click, prompt.submit],
        tab.ask,
        [prompt, picker, toggle, talk],
        [shown, prompt, why],
        show_progress="hidden",
        concurrency_limit=AT_ONCE,
    )
    again.click(tab.again, [picker, toggle, talk], [shown, why], show_progress="hidden", concurrency_limit=AT_ONCE)
    stop.click(tab.stop, talk, why, show_progress="hidden", concurrency_limit=None)
    clear.click(tab.clear, talk, [shown, why], show_progress="hidden", concurrency_limit=None)
    return ChatParts(picker, toggle, talk, missing)


def toggled(state: DemoState) -> Any:
    """The tick as it stands now: a server may have been started again, with or without its base."""
    try:
        able, info = _toggling(state)
    except NestError:  # the server is away, which is said elsewhere
        return gr.skip()
    kept: dict[str, Any] = {} if able else {"value": state.backend.preferred() is not None}
    return gr.update(interactive=able, info=info, **kept)


def _toggling(state: DemoState) -> tuple[bool, str]:
    """Whether the patch can be switched on and off here, and what to say of it."""
    if state.backend.preferred() is None:
        return False, "There is no patch yet."
    if not state.has_base():
        return False, "It stays on: this server does not let anybody ask its base."
    return True, "Takes effect on the next message."


def missing_html(state: DemoState) -> str:
    """How to get a patch, where the model has none yet; else nothing."""
    if state.backend.preferred() is not None or not state.model_ref:
        return ""
    return markup.wrap(first_patch(state))


def baseless_html(state: DemoState) -> str:
    """What a server has to be started with so that there is something to compare; nothing if there is."""
    try:
        if state.has_base():
            return ""
    except NestError as error:
        return markup.wrap(markup.alert(error))
    message = (
        "This server does not let clients ask its base, so every tab shows the patch alone, and compares nothing. "
        "To see the base beside it, start the server with `--expose-base` as well:"
    )
    return markup.wrap(markup.offer(message, [f"nest-runtime serve{_served(state)} --expose-base"]))


def _served(state: DemoState) -> str:
    """The options of ``serve`` for what the server answers with."""
    own = state.backend.preferred()
    model = "" if state.backend.name == REFERENCE else " --model MODEL"
    return f"{model} --patch {shlex.quote(own.title)}" if own is not None and own.digest is not None else model


def first_patch(state: DemoState) -> str:
    """The way to a model's first patch; with a server, to have its patches on this machine."""
    if not state.model_ref:
        message = (
            f"The store of this machine holds no patch of {state.backend.name}, the server's model, so there is "
            "nothing to show here. Add its patch, or fetch it, then reload the page:"
        )
        return markup.offer(message, ["nest-runtime add FILE", "nest-runtime pull ORG/REPO"])
    flag = f" --model {shlex.quote(state.model_ref or 'MODEL')}"
    commands = [
        f"nest-runtime train{flag} --harmful harmful --benign everyday --out v1.safetensors",
        "nest-runtime add v1.safetensors",
    ]
    message = (
        f"There is no patch for {state.backend.name} on this machine yet, so the base model answers alone. "
        "Train one and add it, then reload the page. `harmful` and `everyday` are prompts that come with the package; "
        "files of yours do better."
    )
    fetch = "Or fetch one that somebody published for this very model: `nest-runtime pull ORG/REPO`."
    return markup.offer(message, commands, fetch)


def _examples(tab: Chat, prompt: gr.Textbox, shown: gr.HTML, talk: gr.State) -> None:
    offer = tab.state.offer
    first = [item.label for item in offer.kinds[offer.first_kind]]
    with gr.Row():
        kind = gr.Dropdown(
            list(offer.kinds),
            value=offer.first_kind,
            label="Example prompts of kind",
            filterable=False,
            elem_id="kind",
            scale=2,
            min_width=240,
        )
        example = gr.Dropdown(
            first,
            value=first[0],
            label="Example",
            filterable=False,
            elem_id="example",
            min_width=240,
            scale=3,
        )
    outputs = [prompt, shown]
    kind.input(tab.kind, [kind, talk], [example, *outputs], show_progress="hidden")
    example.input(tab.example, [kind, example, talk], outputs, show_progress="hidden")


def _grid(tab: Chat, picker: gr.Dropdown, toggle: gr.Checkbox) -> None:
    with gr.Accordion("Try all wrappings", open=False, elem_id="wrappings"):
        with gr.Row(equal_height=True):
            offer = tab.state.offer
            act = gr.Textbox(offer.act, label=offer.act_label, elem_id="act", scale=3)
            run = gr.Button(
                "Try all wrappings",
                elem_id="try-all",
                elem_classes="nr-go",
                size="md",
                variant="primary",
                min_width=120,
            )
            halt = gr.Button("Stop", elem_id="try-stop", elem_classes="nr-go", size="md", min_width=80)
        why = gr.HTML(elem_id="grid-why", padding=False)
        grid = gr.HTML(elem_id="grid", padding=False)
    running = gr.State(Running())
    asked = [act, picker, toggle, running]
    run.click(tab.grid, asked, [grid, why], show_progress="hidden", concurrency_limit=AT_ONCE)
    halt.click(lambda task: markup.said(task.stop()), running, why, show_progress="hidden", concurrency_limit=None)


class Chat:
    """The tab's answers to what is clicked."""

    def __init__(self, state: DemoState) -> None:
        self.state = state

    def ask(self, prompt: str, label: str | None, on: bool, talk: Talk) -> Iterator[tuple[Any, Any, str]]:
        """Ask both sides; the box is emptied once the question is in the conversation."""
        if talk.busy or not prompt.strip():
            yield (
                gr.skip(),
                gr.skip(),
                markup.said(BUSY if talk.busy else "Write a prompt first, or choose an example."),
            )
            return
        state = self.state
        try:
            sides = state.sides(label, on)
        except NestError as error:
            yield gr.skip(), gr.skip(), markup.wrap(markup.alert(error))
            return
        first = True
        steps = ask(
            talk,
            prompt.strip(),
            sides,
            state.backend,
            state.is_refusal,
            max_tokens=state.max_tokens,
            is_known=state.is_known,
        )
        for _ in steps:
            yield markup.conversation(talk), "" if first else gr.skip(), ""
            first = False
        yield markup.conversation(talk), gr.skip(), ""

    def again(self, label: str | None, on: bool, talk: Talk) -> Iterator[tuple[Any, str]]:
        """Answer the last question again on the patch's side, with what is chosen now."""
        if talk.busy or not talk.turns or talk.turns[-1].scripted:
            yield gr.skip(), markup.said(BUSY if talk.busy else "Nothing has been asked yet: press Send first.")
            return
        state = self.state
        try:
            choice = state.sides(label, on)[1]
        except NestError as error:
            yield gr.skip(), markup.wrap(markup.alert(error))
            return
        steps = redo(
            talk, choice, state.backend, state.is_refusal, max_tokens=state.max_tokens, is_known=state.is_known
        )
        for _ in steps:
            yield markup.conversation(talk), ""
        yield markup.conversation(talk), ""

    def stop(self, talk: Talk) -> str:
        """Stop the answers that are being written; what is there stays."""
        if not talk.busy:
            return markup.said("Nothing is being answered.")
        talk.stopping = True
        return ""

    def clear(self, talk: Talk) -> tuple[str, str]:
        """Start a new conversation."""
        said = "" if talk.turns else markup.said("This is a new conversation already.")
        talk.stopping = True
        talk.turns = []
        return markup.conversation(talk), said

    def kind(self, kind: str, talk: Talk) -> tuple[Any, str, Any]:
        """Offer the examples of another kind, the first one chosen."""
        items = [item.label for item in self.state.offer.kinds[kind]]
        return gr.Dropdown(choices=items, value=items[0]), *self.example(kind, items[0], talk)

    def example(self, kind: str, label: str, talk: Talk) -> tuple[str, Any]:
        """Put an example into the box and begin a new conversation, with the turns that come before it."""
        found = self.state.offer.example(kind, label)
        if found is None:
            return gr.skip(), gr.skip()
        if talk.busy:  # what is being written stays
            return found.prompt, gr.skip()
        talk.script(found.messages[:-1])
        return found.prompt, markup.conversation(talk)

    def grid(self, act: str, label: str | None, on: bool, running: Running) -> Iterator[tuple[Any, str]]:
        """An act in all wrappings, asked of both sides; the grid fills as answers come."""
        if running.busy or not act.strip():
            first = f"Write what to wrap first, for example: {self.state.offer.act}"
            yield gr.skip(), markup.said("It is running already; Stop ends it." if running.busy else first)
            return
        last: _Answers = {}
        begun = False
        try:
            sides, talks = self.state.sides(label, on), self.state.offer.wrap(act.strip())
            begun = True
            for answers in running.watch(lambda job: self._fill(job, talks, sides)):
                last = answers or last
                yield grid_html(talks, sides, last, self.state), ""
            if running.stopped:
                yield grid_html(talks, sides, last, self.state, stopped=True), markup.said("Stopped.")
        except Exception as error:  # what was answered stays, without a bar that seems to go on
            kept = grid_html(talks, sides, last, self.state, stopped=True) if last else ""
            yield kept if begun else gr.skip(), markup.failed(error)

    def _fill(self, job: BackgroundJob[_Answers], talks: list[Wrapped], sides: tuple[PatchChoice, PatchChoice]) -> None:
        answers: _Answers = {}
        for side in (1, 0) if sides[0] != sides[1] else (1,):

            def keep(positions: list[int], texts: list[str], side: int = side) -> None:
                answers.update({(side, position): answer for position, answer in zip(positions, texts, strict=True)})
                job.report(dict(answers))

            self.state.backend.answer_all(
                [talk.messages for talk in talks], sides[side], max_tokens=GRID_TOKENS, on_answers=keep
            )
        if sides[0] == sides[1]:
            job.report({(side, place): answer for (_, place), answer in answers.items() for side in (0, 1)})


def grid_html(
    talks: list[Wrapped],
    sides: tuple[PatchChoice, PatchChoice],
    answers: _Answers,
    state: DemoState,
    *,
    stopped: bool = False,
) -> str:
    """The grid: a row for each family, and in each cell what both sides made of one wrapping."""
    names = [side.title for side in sides]
    families = list(dict.fromkeys(talk.family for talk in talks))
    refused = {key: state.is_refusal(answer) for key, answer in answers.items()}
    known = {key: state.is_known is None or state.is_known(answer) for key, answer in answers.items()}
    rows = []
    for family in families:
        mine = [n for n, talk in enumerate(talks) if talk.family == family]
        rows.append([markup.text(family), *(_cell(talks[n], n, names, answers, refused, known) for n in mine)])
    width = max(len(row) for row in rows)
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    counts = [sum(not value for (side, _), value in refused.items() if side == which) for which in (0, 1)]
    done = [sum(1 for side, _ in answers if side == which) for which in (0, 1)]
    total = "; ".join(f"{name} answered {count} of {n}" for name, count, n in zip(names, counts, done, strict=True))
    table = markup.table(
        ["family", *(f"wrapping {n}" for n in range(1, width))],
        rows,
        caption=f"{total} (open a cell for the answers; first {names[0]}, then {names[1]})",
        css="nr-grid",
    )
    bar = markup.progress("answers", sum(done), 2 * len(talks))
    return markup.wrap("" if stopped or sum(done) == 2 * len(talks) else bar, table)


def _cell(
    talk: Wrapped,
    number: int,
    names: list[str],
    answers: _Answers,
    refused: dict[tuple[int, int], bool],
    known: dict[tuple[int, int], bool],
) -> str:
    said = [answers.get((side, number)) for side in (0, 1)]
    marks = "".join(
        markup.badge(refused[(side, number)], known[(side, number)])
        if said[side] is not None
        else '<span class="nr-badge nr-plain">…</span>'
        for side in (0, 1)
    )
    asked = "<br>".join(markup.text(message["content"]) for message in talk.messages)
    lines = "".join(
        f"<dt>{markup.text(name)}</dt><dd>{markup.text(answer or '')}</dd>"
        for name, answer in zip(names, said, strict=True)
        if answer is not None
    )
    return f"<details><summary>{marks}</summary><dl><dt>asked</dt><dd>{asked}</dd>{lines}</dl></details>"
