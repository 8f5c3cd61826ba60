"""The command judge: what answers made elsewhere are, and how far a judge agrees with their labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import examples
from nest_runtime.cli.output import DeviceOption, JsonOption, Output, percent

if TYPE_CHECKING:
    from nest_runtime.evaluate.judging import Judged

SHOWN = 20  # disagreements printed for people; --json has all of them


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "judge",
        rich_help_panel="Measure",
        epilog=examples(
            "nest-runtime judge answers.jsonl",
            "nest-runtime judge labelled.csv --judge phrases --json",
        ),
    )(judge)


def judge(
    ctx: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="JSONL or CSV with the columns prompt and answer, and label where people judged too."
        ),
    ],
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="NAME",
            autocompletion=complete.judges,
            help="local, phrases, hf:MODEL, openai:MODEL.",
        ),
    ] = "local",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what answers made elsewhere are: refused, complied, evasive or garbled."""
    out = Output.of(ctx, as_json)
    from nest_runtime.evaluate.judges import make_judge
    from nest_runtime.evaluate.judging import judge_file

    if judge == "reference":
        out.note("the judge `reference` knows the built-in model's answers, and no others")
    judged = judge_file(file, make_judge(judge, device=device))
    out.result({"file": str(file), **judged.to_json()}, lambda: _render(out, judged))


def _render(out: Output, judged: Judged) -> None:
    """Counts by outcome; then, if there are labels, the agreement and where it fails."""
    n = len(judged.rows)
    out.line(f"{n} answers judged by {judged.judge}")
    out.table(
        ("OUTCOME", "ANSWERS", "SHARE"),
        [(outcome, count, percent(count / n)) for outcome, count in judged.counts.items()],
        right=("ANSWERS", "SHARE"),
    )
    agreement = judged.agreement
    if agreement is None:
        return
    kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
    out.line()
    out.line(f"agrees with {agreement.n} labels on {percent(agreement.agreed.value)}; Cohen's kappa {kappa}")
    apart = judged.disagreements
    if not apart:
        return
    out.line()
    rows = [(row.where, row.label, said.outcome, _start(row.answer)) for row, said in apart[:SHOWN]]
    out.table(("ROW", "LABEL", "JUDGE", "ANSWER"), rows)
    if len(apart) > SHOWN:
        out.note(f"{len(apart) - SHOWN} more disagreements; --json has all")


def _start(answer: str) -> str:
    """An answer's first words, on a line."""
    line = " ".join(answer.split())
    return line if len(line) <= 60 else line[:59] + "…"
