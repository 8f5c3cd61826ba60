"""The tab Evidence: a quick evaluation whose bars move, and the comparison with other methods that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from nest_runtime.demo import figures, markup
from nest_runtime.demo.backend import BASE, Backend, Choice
from nest_runtime.demo.background import Job
from nest_runtime.demo.measure import SEED, Standing, judge_for, measure, quick_cases
from nest_runtime.demo.state import Desk
from nest_runtime.errors import NestError
from nest_runtime.model.load import REFERENCE

PLOTS = (
    ("tradeoff", "Attack success against over-refusal and utility, by method"),
    ("parameters", "Attack success by number of trainable parameters"),
    ("families", "Attack success by jailbreak family and method"),
)


def build(desk: Desk) -> tuple[gr.Dropdown, gr.HTML]:
    """Lay the tab out and connect it; gives the list of patches, and the comparison's place, which the page fills."""
    gr.HTML(markup.wrap("<h2>Quick evaluation</h2>", markup.note(_about(desk))), padding=False)
    with gr.Row(equal_height=True):
        picker = gr.Dropdown(
            label="Patch", interactive=True, filterable=False, elem_id="eval-patch", scale=2, min_width=240
        )
        count = gr.Slider(5, 100, value=20, step=5, label="Prompts of each suite", elem_id="eval-count", scale=2)
        run = gr.Button("Run", variant="primary", elem_id="eval-run", elem_classes="nr-go", size="md", min_width=80)
        halt = gr.Button("Stop", elem_id="eval-stop", elem_classes="nr-go", size="md", min_width=80)
    shown = gr.HTML(elem_id="eval", padding=False)

    def clicked(label: str | None, number: float) -> Iterator[str]:
        yield from evaluation(desk, label, int(number))

    running = run.click(clicked, [picker, count], shown, show_progress="hidden", concurrency_limit=2)
    halt.click(None, cancels=[running])
    return picker, gr.HTML(elem_id="comparison", padding=False)


def _about(desk: Desk) -> str:
    return (
        f"{desk.offer.about} A few of each suite are drawn with seed {SEED}, and answered by base and patch. "
        "Few prompts mean wide intervals: `nest-runtime eval` runs all you give it."
    )


def evaluation(desk: Desk, label: str | None, count: int) -> Iterator[str]:
    """Run a quick evaluation; yields the bars as they stand."""
    try:
        sides = desk.sides(label, True)
        cases = quick_cases(desk.backend, count)
        job: Job[Standing] = Job()
        yield markup.wrap(markup.progress("answers", 0, 2 * len(cases)))
        for standing in job.run(lambda job: measure(job, desk.backend, sides, cases)):
            if standing is not None:
                yield standing_html(standing, sides, judge_for(desk.backend).name, desk.offer.suites)
    except NestError as error:
        yield markup.wrap(markup.alert(error))


def standing_html(
    standing: Standing, sides: tuple[Choice, Choice], judge: str, suites: Sequence[tuple[str, str, str]]
) -> str:
    """Progress, and a bar for each measure and side."""
    names = [BASE if side.label == BASE else side.label for side in sides]
    there = {(row.suite, row.measure) for rows in standing.records for row in rows}
    groups = [
        (title, [(name, standing.rate(side, suite, measured)) for side, name in enumerate(names)])
        for suite, measured, title in suites
        if (suite, measured) in there
    ]
    done = standing.done == standing.total
    label = f"finished, judge {judge}; answers" if done else "answers"
    return markup.wrap(markup.progress(label, standing.done, standing.total), markup.bars(groups))


def comparison_folder() -> Path | None:
    """Where the measured comparison lies: in an installed wheel, or in a checkout; None where it is missing."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_results" / "compare", package.parent / "docs" / "results" / "compare"):
        if (folder / "comparison.json").is_file():
            return folder
    return None


def results_html(desk: Desk) -> str:
    """What was measured on the model shown: the comparison where that was made on it, else what its patches state."""
    folder, head = comparison_folder(), "<h2>What was measured</h2>"
    if folder is not None and _is_of(folder, desk.backend):
        return comparison_html(folder)
    rows = [row for entry in desk.entries() for row in _stated(entry.key, desk.patch(entry.digest).header()["metrics"])]
    if rows and desk.backend.model_hash is not None:
        words = "What the headers of its patches state; nothing is run here."
        columns = ("patch", "figure", "rate", "95 % interval", "n")
        table = markup.table(columns, rows, caption=f"Results on {desk.backend.name}", numbers=columns[2:])
        return markup.wrap(head, markup.note(words), table)
    if desk.backend.name == REFERENCE:
        words = "The measured comparison is not part of this installation; `nest-runtime compare` makes one."
    else:
        words = (
            f"There are no results for {desk.backend.name} here. `nest-runtime eval` measures a patch on your own "
            "prompts, `nest-runtime compare` sets it beside other methods."
        )
    return markup.wrap(head, markup.note(words))


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
        share, ends, count = value.get("rate", value.get("asr")), value.get("ci95"), value.get("n")
        if isinstance(share, int | float) and isinstance(ends, list) and len(ends) == 2 and isinstance(count, int):
            interval = f"{100 * float(ends[0]):.1f} to {100 * float(ends[1]):.1f} %"
            rows.append([markup.text(patch), markup.text(prefix + key), markup.percent(share), interval, f"{count:,}"])
        else:
            rows += _stated(patch, value, f"{prefix}{key}, ")
    return rows


def comparison_html(folder: Path) -> str:
    """The comparison's table and plots."""
    head = "<h2>Beside what else one would try</h2>"
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    about = f"{len(data['seeds'])} seeds, judge {data['judge']}, {data['created'][:10]}"
    made = f"Model {data['model']}, {about}; not run now."
    columns = ("method", "trained numbers", "jailbreak ASR", "95 % interval", "garbled", "over-refusal", "utility")
    rows = [_row(row) for row in data["rows"]]
    marked = [n for n, row in enumerate(data["rows"]) if row["method"].startswith("nest") or "@" in row["method"]]
    table = markup.table(columns, rows, caption="Every method on the same prompts", numbers=columns[1:], marked=marked)
    there = [(folder / f"{name}.png", words) for name, words in PLOTS if (folder / f"{name}.png").is_file()]
    plots = "".join(_plot(path, words) for path, words in there)
    return markup.wrap(head, markup.note(made), table, plots)


def _plot(path: Path, words: str) -> str:
    image = figures.picture(path.read_bytes(), words)
    return f"<figure><figcaption>{markup.text(words)}</figcaption>{image}</figure>"


def _row(row: dict[str, Any]) -> list[str]:
    low, high = row["ci95"]
    return [
        markup.text(row["title"]),
        f"{row['trainable']:,}",
        markup.percent(row["asr"]),
        f"{100 * low:.1f} to {100 * high:.1f} %",
        markup.percent(row["other"]),
        markup.percent(row["over_refusal"]),
        markup.percent(row["utility"]),
    ]
