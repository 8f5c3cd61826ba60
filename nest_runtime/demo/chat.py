"""The tab Chat: one prompt, two answers; examples by kind; an act in all wrappings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nest_runtime.demo import markup
from nest_runtime.demo.backend import BASE, Choice
from nest_runtime.demo.background import Job
from nest_runtime.demo.examples import Wrapped
from nest_runtime.demo.state import Desk
from nest_runtime.demo.talk import Talk, ask, redo
from nest_runtime.errors import NestError, UsageError

GRID_TOKENS = 48  # an answer's first words tell a refusal
AT_ONCE = 4  # visitors answered at the same time
_Answers = dict[tuple[int, int], str]  # (side, wrapping) → answer


@dataclass(frozen=True)
class ChatParts:
    """What other tabs and the page need of this one."""

    picker: gr.Dropdown
    talk: gr.State
    missing: gr.HTML


def build(desk: Desk) -> ChatParts:
    """Lay the tab out and connect it."""
    tab = Chat(desk)
    talk = gr.State(Talk())
    missing = gr.HTML(elem_id="no-patch", padding=False)
    with gr.Row(equal_height=True):
        picker = gr.Dropdown(
            label="Patch on the right", interactive=True, filterable=False, elem_id="picker", scale=2, min_width=210
        )
        toggle = gr.Checkbox(
            True, label="Patch on", info="Takes effect on the next message.", elem_id="toggle", min_width=120
        )
    shown = gr.HTML(markup.conversation(Talk()), elem_id="conversation", padding=False)
    prompt = gr.Textbox(desk.offer.prompt, label="Prompt", lines=1, max_lines=8, elem_id="prompt")
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="send", size="md", min_width=90)
        again = gr.Button("Regenerate right", elem_id="again", size="md", min_width=90)
        stop = gr.Button("Stop", elem_id="stop", size="md", min_width=90)
        clear = gr.Button("New conversation", elem_id="clear", size="md", min_width=90)
    _examples(tab, prompt, shown, talk)
    _grid(tab, picker, toggle)
    gr.on(
        [send.click, prompt.submit],
        tab.ask,
        [prompt, picker, toggle, talk],
        [shown, prompt],
        show_progress="hidden",
        concurrency_limit=AT_ONCE,
    )
    again.click(tab.again, [picker, toggle, talk], shown, show_progress="hidden", concurrency_limit=AT_ONCE)
    stop.click(tab.stop, talk, None, show_progress="hidden", concurrency_limit=None)
    clear.click(tab.clear, talk, shown, show_progress="hidden", concurrency_limit=None)
    return ChatParts(picker, talk, missing)


def missing_html(desk: Desk) -> str:
    """How to get a patch, where the model has none yet; else nothing."""
    if desk.backend.preferred() is not None or not desk.model_ref:
        return ""
    flag = f" --model {shlex.quote(desk.model_ref)}"
    commands = [
        f"nest-runtime train{flag} --harmful bad.jsonl --benign good.jsonl --out v1.safetensors",
        "nest-runtime add v1.safetensors",
        "nest-runtime pull ORG/REPO",
    ]
    words = (
        f"There is no patch for {desk.backend.name} on this machine yet, so the bare model answers on both sides. "
        "Train one and add it, or fetch one that somebody published for this very model; then reload the page."
    )
    return markup.wrap(markup.offer(words, commands))


def _examples(tab: Chat, prompt: gr.Textbox, shown: gr.HTML, talk: gr.State) -> None:
    offer = tab.desk.offer
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
            offer = tab.desk.offer
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
        grid = gr.HTML(elem_id="grid", padding=False)
    running = run.click(tab.grid, [act, picker, toggle], grid, show_progress="hidden", concurrency_limit=2)
    halt.click(None, cancels=[running])


class Chat:
    """The tab's answers to what is clicked."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def ask(self, prompt: str, label: str | None, on: bool, talk: Talk) -> Iterator[tuple[str, Any]]:
        """Ask both sides; the box is emptied once the question stands in the conversation."""
        if talk.busy or not prompt.strip():
            yield gr.skip(), gr.skip()
            return
        desk = self.desk
        try:
            sides = desk.sides(label, on)
        except NestError as error:
            yield markup.conversation(talk) + markup.wrap(markup.alert(error)), gr.skip()
            return
        first = True
        steps = ask(
            talk,
            prompt.strip(),
            sides,
            desk.backend,
            desk.is_refusal,
            max_tokens=desk.max_tokens,
            is_known=desk.is_known,
        )
        for _ in steps:
            yield markup.conversation(talk), "" if first else gr.skip()
            first = False
        yield markup.conversation(talk), gr.skip()

    def again(self, label: str | None, on: bool, talk: Talk) -> Iterator[str]:
        """Answer the last question again on the right, with what is chosen now."""
        if talk.busy or talk.asked is None:
            yield gr.skip()
            return
        desk = self.desk
        try:
            choice = desk.sides(label, on)[1]
        except NestError as error:
            yield markup.conversation(talk) + markup.wrap(markup.alert(error))
            return
        steps = redo(talk, choice, desk.backend, desk.is_refusal, max_tokens=desk.max_tokens, is_known=desk.is_known)
        for _ in steps:
            yield markup.conversation(talk)
        yield markup.conversation(talk)

    def stop(self, talk: Talk) -> None:
        """End the answers that are being written; what there is of them stays."""
        talk.stopping = True

    def clear(self, talk: Talk) -> str:
        """Begin anew."""
        talk.stopping = True
        talk.turns = []
        return markup.conversation(talk)

    def kind(self, kind: str, talk: Talk) -> tuple[Any, str, Any]:
        """Offer the examples of another kind, the first one chosen."""
        items = [item.label for item in self.desk.offer.kinds[kind]]
        return gr.Dropdown(choices=items, value=items[0]), *self.example(kind, items[0], talk)

    def example(self, kind: str, label: str, talk: Talk) -> tuple[str, Any]:
        """Put an example into the box and begin a new conversation, with the turns that come before it."""
        found = self.desk.offer.example(kind, label)
        if found is None:
            return gr.skip(), gr.skip()
        if talk.busy:  # what is being written stays
            return found.prompt, gr.skip()
        talk.script(found.messages[:-1])
        return found.prompt, markup.conversation(talk)

    def grid(self, act: str, label: str | None, on: bool) -> Iterator[str]:
        """An act in all wrappings, asked of both sides; the grid fills as answers come."""
        try:
            if not act.strip():
                raise UsageError("there is nothing to wrap", f"write it, e.g. {self.desk.offer.act}")
            sides, talks = self.desk.sides(label, on), self.desk.offer.wrap(act.strip())
            yield grid_html(talks, sides, {}, self.desk)
            job: Job[_Answers] = Job()
            for answers in job.run(lambda job: self._fill(job, talks, sides)):
                if answers is not None:
                    yield grid_html(talks, sides, answers, self.desk)
        except NestError as error:
            yield markup.wrap(markup.alert(error))

    def _fill(self, job: Job[_Answers], talks: list[Wrapped], sides: tuple[Choice, Choice]) -> None:
        answers: _Answers = {}
        for side in (1, 0) if sides[0] != sides[1] else (1,):

            def keep(positions: list[int], texts: list[str], side: int = side) -> None:
                answers.update({(side, position): answer for position, answer in zip(positions, texts, strict=True)})
                job.report(dict(answers))

            self.desk.backend.answer_all(
                [talk.messages for talk in talks], sides[side], max_tokens=GRID_TOKENS, on_answers=keep
            )
        if sides[0] == sides[1]:
            job.report({(side, place): answer for (_, place), answer in answers.items() for side in (0, 1)})


def grid_html(talks: list[Wrapped], sides: tuple[Choice, Choice], answers: _Answers, desk: Desk) -> str:
    """The grid: a row for each family, and in each cell what both sides made of one wrapping."""
    names = ["base" if side.label == BASE else side.label for side in sides]
    families = list(dict.fromkeys(talk.family for talk in talks))
    refused = {key: desk.is_refusal(answer) for key, answer in answers.items()}
    known = {key: desk.is_known is None or desk.is_known(answer) for key, answer in answers.items()}
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
    return markup.wrap(bar if sum(done) < 2 * len(talks) else "", table)


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
