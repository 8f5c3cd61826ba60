"""The command eval: attack success, over-refusal and utility of a model, with a patch or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.case_options import (
    STANDARD_SUITES,
    AttacksOption,
    BatchSizeOption,
    CaseFilesOption,
    DataOption,
    JudgesOption,
    MaxTokensOption,
    SampleSeedOption,
    suite_option,
)
from nest_runtime.cli.common import choose_patch, examples, model_flag, model_for, writable_file, writable_folder
from nest_runtime.cli.evaluate_view import render
from nest_runtime.cli.measuring import assumptions, sampled
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output
from nest_runtime.errors import UsageError
from nest_runtime.escape import short

if TYPE_CHECKING:
    from nest_runtime.evaluate import Case, Judge
    from nest_runtime.evaluate.session import Asked

PatchOption = Annotated[
    str | None,
    typer.Option(
        "--patch",
        metavar="PATCH",
        autocompletion=complete.patches,
        help="The patch to measure; the active one by default.",
    ),
]
NoPatchOption = Annotated[bool, typer.Option("--no-patch", help="Measure the bare base.")]
WithBaseOption = Annotated[
    bool, typer.Option("--with-base", help="Measure the base on the same cases too, and compare in pairs.")
]
SuitesOption = Annotated[list[str] | None, suite_option(f"{STANDARD_SUITES}, or general ability: lm-eval:gsm8k,mmlu")]
EvalLimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, help="At most N cases of each suite, drawn by seed; of lm-eval the first N."
    ),
]
IncludeOption = Annotated[
    Path | None, typer.Option("--lm-eval-include", metavar="DIR", help="A folder with lm-eval tasks of your own.")
]
ShotsOption = Annotated[
    int | None,
    typer.Option("--lm-eval-shots", metavar="N", min=0, help="Examples in lm-eval's prompts; each task's own."),
]
OutFileOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE.json", help="Keep every answer and verdict in this file.")
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE.html", help="Write a page for the browser: tables, plots and every answer."),
]
WorkdirOption = Annotated[
    Path | None,
    typer.Option("--workdir", metavar="DIR", help="Keep answers here; the same command goes on from them."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "eval",
        rich_help_panel="Measure",
        epilog=examples(
            "nest-runtime eval --patch v3 --with-base",
            "nest-runtime eval --patch v3 --suite plain --attacks all --limit 200 --json",
            "nest-runtime eval --model ./mine --behaviors harmbench.csv --judge phrases",
            "nest-runtime eval --model ./mine --suite lm-eval:gsm8k,mmlu",
            "nest-runtime eval --model ./mine --suite standard --data ./public",
        ),
    )(evaluate)


def evaluate(
    ctx: typer.Context,
    model: ModelOption = "reference",
    patch: PatchOption = None,
    no_patch: NoPatchOption = False,
    with_base: WithBaseOption = False,
    suite: SuitesOption = None,
    data: DataOption = None,
    behaviors: CaseFilesOption = None,
    attacks: AttacksOption = None,
    judge: JudgesOption = None,
    limit: EvalLimitOption = None,
    seed: SampleSeedOption = 0,
    max_tokens: MaxTokensOption = 64,
    batch_size: BatchSizeOption = 64,
    lm_eval_include: IncludeOption = None,
    lm_eval_shots: ShotsOption = None,
    out_file: OutFileOption = None,
    html_file: HtmlOption = None,
    workdir: WorkdirOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure attack success, over-refusal and utility. A low attack success alone says nothing."""
    out = Output.of(ctx, as_json)
    _check_outputs(out_file, html_file, workdir)
    model = model_for(ctx, out, model, patch)
    from nest_runtime.evaluate.session import EvalSession
    from nest_runtime.model.load import load_model

    asked = _asked(
        model,
        suite or [],
        data,
        behaviors or [],
        attacks or [],
        limit,
        seed,
        include=lm_eval_include,
        shots=lm_eval_shots,
    )
    judges = _judges(judge or [], asked.cases, device)
    for remark in assumptions(behaviors or []):
        out.note(remark)
    loaded = load_model(model, device=device, dtype=dtype)
    chosen = choose_patch(out, patch, no_patch, loaded.hash)
    session = EvalSession(asked, judges, loaded, chosen, batch_size, max_tokens, workdir)
    if asked.standard is not None and workdir is None:
        out.note("answers are not kept; with --workdir DIR the same command goes on where it was interrupted")
    with out.bars() as bars:
        result = session.run(with_base=with_base, progress=bars)
    if out_file is not None:
        result.save(out_file)
    if html_file is not None:
        from nest_runtime.evaluate.page import write_page

        write_page(result, html_file)
    out.result(result.summary(), lambda: render(out, result))
    if chosen is not None and not out.json:
        out.note(f"next: nest-runtime serve --patch {patch or short(chosen.digest)}{model_flag(model)}")


def _check_outputs(out_file: Path | None, html_file: Path | None, workdir: Path | None) -> None:
    """Refuse files and a folder that could not be written in the end. Raises UsageError."""
    for option, file in (("--out", out_file), ("--html", html_file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{option} {file} lies in a folder that does not exist", "make the folder first")
        if file is not None:
            writable_file(file, option)
    if workdir is not None:
        writable_folder(workdir, "--workdir")


def _asked(
    model: str,
    suite: list[str],
    data: Path | None,
    behaviors: list[str],
    attacks: list[str],
    limit: int | None,
    seed: int,
    *,
    include: Path | None,
    shots: int | None,
) -> Asked:
    """What to ask, read and checked before a model is loaded."""
    from nest_runtime.evaluate import parse_attacks
    from nest_runtime.evaluate.lm_eval import load_tasks, split_suites
    from nest_runtime.evaluate.session import Asked

    suites, names = split_suites(suite)
    tasks = load_tasks(names, include=include, limit=limit, shots=shots) if names else None
    cases, standard = sampled(model, suites, behaviors, data=data, limit=limit, seed=seed, others=tasks is not None)
    asked = Asked(cases, standard, tasks, parse_attacks(attacks) if attacks else [], seed)
    if attacks and not asked.cases:
        raise UsageError("--attacks without cases to attack", "add --suite or --behaviors")
    return asked


def _judges(names: list[str], cases: list[Case], device: str) -> list[Judge]:
    """The judges named, else the one that fits the cases; each has shown that it works. None if there are no cases."""
    from nest_runtime.evaluate import make_judge
    from nest_runtime.evaluate.run import check_judges
    from nest_runtime.evaluate.suites import default_judge

    if not cases:
        return []
    judges = [make_judge(name, device=device) for name in names or [default_judge(cases)]]
    check_judges(judges)
    return judges
