"""The tab Evidence: a quick evaluation whose bars move, and below it what was measured before (results.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from nest_runtime.demo.backend import BASE, PatchChoice
from nest_runtime.demo.background import BackgroundJob, Running
from nest_runtime.demo.examples import MeasuredSuite
from nest_runtime.demo.html import markup
from nest_runtime.demo.measure import SEED, Standing, judge_for, measure, quick_cases
from nest_runtime.demo.state import DemoState

AT_ONCE = 2  # visitors whose evaluations run at the same time


def build(state: DemoState) -> tuple[gr.Dropdown, gr.HTML]:
    """Lay the tab out and connect it; returns the list of patches, and the comparison's place, which the page fills."""
    gr.HTML(markup.wrap("<h2>Quick evaluation</h2>", markup.note(_about(state))), padding=False)
    with gr.Row(equal_height=True):
        picker = gr.Dropdown(
            label="Patch", interactive=True, filterable=False, elem_id="eval-patch", scale=2, min_width=240
        )
        count = gr.Slider(5, 100, value=20, step=5, label="Prompts of each suite", elem_id="eval-count", scale=2)
        run = gr.Button("Run", variant="primary", elem_id="eval-run", elem_classes="nr-go", size="md", min_width=80)
        halt = gr.Button("Stop", elem_id="eval-stop", elem_classes="nr-go", size="md", min_width=80)
    why = gr.HTML(elem_id="eval-why", padding=False)
    shown = gr.HTML(elem_id="eval", padding=False)
    running = gr.State(Running())

    def clicked(label: str | None, number: float, task: Running) -> Iterator[tuple[Any, str]]:
        yield from evaluation(state, label, int(number), task)

    run.click(clicked, [picker, count, running], [shown, why], show_progress="hidden", concurrency_limit=AT_ONCE)
    halt.click(lambda task: markup.said(task.stop()), running, why, show_progress="hidden", concurrency_limit=None)
    return picker, gr.HTML(elem_id="comparison", padding=False)


def _about(state: DemoState) -> str:
    return (
        f"{state.offer.about} A few of each suite are drawn with seed {SEED}, and answered by base and patch. "
        "Few prompts mean wide intervals: `nest-runtime eval` runs all you give it."
    )


def evaluation(state: DemoState, label: str | None, count: int, running: Running) -> Iterator[tuple[Any, str]]:
    """Run a quick evaluation; yields the bars as they stand, and why it does not run or has ended."""
    if running.busy:
        yield gr.skip(), markup.said("It is running already; Stop ends it.")
        return
    begun, last = "", None
    try:
        both = state.sides(label, True)
        sides = both if both[0] != both[1] else both[:1]
        alone = "" if len(sides) > 1 else markup.said(_alone(sides[0]))
        cases, judge = quick_cases(state.backend, count), judge_for(state.backend).name

        def task(job: BackgroundJob[Standing]) -> None:
            measure(job, state.backend, sides, cases)

        begun = markup.wrap(markup.progress("answers", 0, len(sides) * len(cases)))
        for standing in running.watch(task):
            last = standing or last
            yield begun if last is None else standing_html(last, sides, judge, state.offer.suites), alone
        if running.stopped:
            yield gr.skip(), markup.said("Stopped; the bars show what was answered until then.")
    except Exception as error:  # what was answered stays, without a bar that seems to go on
        kept = "" if last is None else standing_html(last, sides, judge, state.offer.suites, stopped=True)
        yield kept if begun else gr.skip(), markup.failed(error)


def _alone(side: PatchChoice) -> str:
    """Why only one side is measured."""
    if side.label == BASE:
        return "Only the base is measured: this model has no patch yet."
    return f"Only {side.title} is measured: this server does not let anybody ask its base, to compare it with."


def standing_html(
    standing: Standing,
    sides: Sequence[PatchChoice],
    judge: str,
    suites: Sequence[MeasuredSuite],
    *,
    stopped: bool = False,
) -> str:
    """Progress, unless it has stopped, and a bar for each measure and side."""
    names = [side.title for side in sides]
    there = {(row.suite, row.measure) for rows in standing.records for row in rows}
    groups = [
        (item.heading, [(name, standing.rate(side, item.suite, item.measure.key)) for side, name in enumerate(names)])
        for item in suites
        if (item.suite, item.measure.key) in there
    ]
    done = standing.done == standing.total
    label = f"finished, judge {judge}; answers" if done else "answers"
    bar = "" if stopped else markup.progress(label, standing.done, standing.total)
    return markup.wrap(bar, markup.bars(groups))
