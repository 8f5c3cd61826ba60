"""The command eval: attack success, over-refusal and utility of a model, with a patch or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli.common import choose_patch, examples
from nest_runtime.cli.measuring import cases_of, change, families_table, interval
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output, percent, short
from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.evaluate import EvalResult
    from nest_runtime.evaluate.stats import PairedChange, Rate

TITLES = {"asr": "attack success", "over_refusal": "over-refusal", "utility": "utility"}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "eval",
        rich_help_panel="Measure",
        epilog=examples(
            "nest-runtime eval --patch v3 --with-base",
            "nest-runtime eval --patch v3 --suite plain --attacks all --limit 200 --json",
            "nest-runtime eval --model ./my-model --behaviors harmbench.csv --judge phrases",
        ),
    )(evaluate)


def evaluate(
    ctx: typer.Context,
    model: ModelOption = "reference",
    patch: Annotated[
        str | None, typer.Option("--patch", metavar="PATCH", help="The patch to measure; the active one by default.")
    ] = None,
    no_patch: Annotated[bool, typer.Option("--no-patch", help="Measure the bare base.")] = False,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Measure the base on the same cases too, and compare in pairs.")
    ] = False,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help="reference, plain, jailbreak-seen, jailbreak-held-out, over-refusal, utility; repeat it.",
        ),
    ] = None,
    behaviors: Annotated[
        list[str] | None,
        typer.Option(
            "--behaviors", metavar="FILE", help="Cases of a file: HarmBench, XSTest, … or prompts; repeat it."
        ),
    ] = None,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attacks",
            metavar="FILE",
            help="Attack the harmful cases too: all, NAME, NAME:N, a template file; repeat it.",
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge", metavar="NAME", help="reference, phrases, hf:MODEL, openai:MODEL; the first one counts."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most N cases of each suite, drawn by seed.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of --limit and --attacks.")] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts in one batch.")] = 64,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Keep every answer and verdict in this file.")
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option("--workdir", metavar="DIR", help="Keep answers here; the same command goes on from them."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure attack success, over-refusal and utility. A low attack success alone says nothing."""
    out = Output.of(ctx, as_json)
    if out_file is not None and not out_file.absolute().parent.is_dir():
        raise UsageError(f"--out {out_file} lies in a folder that does not exist", "make the folder first")
    from nest_runtime.evaluate import apply_attacks, make_judge, parse_attacks, sample_cases
    from nest_runtime.evaluate import evaluate as run
    from nest_runtime.evaluate.run import check_judges
    from nest_runtime.evaluate.suites import default_judge
    from nest_runtime.models import load_model
    from nest_runtime.runtime import PatchRuntime

    cases = cases_of(model, suite or [], behaviors or [])
    if limit is not None:
        cases = sample_cases(cases, limit, seed=seed)
    chosen_attacks = parse_attacks(attacks) if attacks else []
    judges = [make_judge(name, device=device) for name in judge or [default_judge(cases)]]
    check_judges(judges)
    loaded = load_model(model, device=device, dtype=dtype)
    chosen = choose_patch(out, patch, no_patch, loaded.hash)
    runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
    key = runtime.add(chosen) if chosen else None
    shared: dict[str, Any] = {
        "runtime": runtime,
        "model_name": loaded.name,
        "base_hash": loaded.hash,
        "batch_size": batch_size,
        "max_new_tokens": max_tokens,
        "workdir": workdir,
    }
    with out.bars() as bars:
        if chosen_attacks:
            with runtime.using(key):  # a white-box attack is made against what is measured
                cases = apply_attacks(
                    cases, chosen_attacks, seed=seed, model=loaded.model, tokenizer=loaded.tokenizer, progress=bars
                )
        result = run(loaded.model, loaded.tokenizer, cases, judges, patch=chosen, progress=bars, **shared)
        if with_base and chosen is not None:
            base = run(loaded.model, loaded.tokenizer, cases, judges, progress=bars, **shared)
            result = result.compared_with(base)
    if out_file is not None:
        result.save(out_file)
    out.result(result.summary(), lambda: _render(out, result))


def _render(out: Output, result: EvalResult) -> None:
    from nest_runtime.evaluate.records import rates_by

    subject = f"{result.patch} ({short(result.digest)})" if result.digest else "the bare base"
    out.line(f"{result.model} with {subject}, judged by {', '.join(result.judges)}")
    columns = ["SUITE", "MEASURE", "RATE", "95 % CI", "N", "OTHER", *(["BASE", "CHANGE"] if result.changes else [])]
    out.table(columns, _rows(result), right=columns[2:])
    attacked = [record for record in result.trials if record.measure == "asr"]
    families_table(out, rates_by(attacked, lambda record: record.family))
    _render_notes(out, result)


def _rows(result: EvalResult) -> list[list[object]]:
    """A row per suite and measure, and one for all jailbreaks where there are several suites of them."""
    from nest_runtime.evaluate.records import other_share
    from nest_runtime.evaluate.report import JAILBREAK

    rows = []
    for suite, measure in dict.fromkeys((record.suite, record.measure) for record in result.trials):
        paired = result.changes[suite][measure] if result.changes else None
        rate, other = result.rate(measure, suite), result.other(measure, suite)
        rows.append(_row(suite, TITLES[measure], rate, other, paired))
    wrapped = [r for r in result.trials if r.measure == "asr" and r.suite.startswith(JAILBREAK)]
    if result.jailbreak is not None and len({record.suite for record in wrapped}) > 1:
        pooled = (result.jailbreak, other_share(wrapped), result.jailbreak_change)
        rows.append(_row("all jailbreaks", TITLES["asr"], *pooled))
    return rows


def _row(suite: str, title: str, rate: Rate, other: float | None, paired: PairedChange | None) -> list[object]:
    row: list[object] = [suite, title, percent(rate.value), interval(rate.ci95), rate.n, percent(other)]
    return row if paired is None else [*row, percent(paired.base.value), change(paired.relative)]


def _render_notes(out: Output, result: EvalResult) -> None:
    lost = [name for name in ("empty", "unparsable") if any(record.outcome == name for record in result.records)]
    for name in lost:
        count = sum(record.outcome == name for record in result.records)
        out.line(f"{count} of {len(result.records)} answers were {name}; they stay in the denominator")
    agreement = result.agreement
    if agreement is not None:
        kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
        out.line(f"{' and '.join(agreement.judges)} agree on {percent(agreement.agreed.value)}; Cohen's kappa {kappa}")
    for name, value in result.cost.items():
        out.line(f"judge cost, {name}: {value}")
    for note in result.notes:
        out.note(note)
