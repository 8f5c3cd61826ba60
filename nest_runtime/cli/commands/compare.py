"""The command compare: NeST beside everything one would try instead, on the same prompts, budget and judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.case_options import (
    AttacksOption,
    BatchSizeOption,
    CaseFilesOption,
    DataOption,
    JudgeOption,
    LimitOption,
    MaxTokensOption,
    StandardOption,
)
from nest_runtime.cli.common import examples, model_for, prompts_named, writable_folder
from nest_runtime.cli.compare_view import render
from nest_runtime.cli.measuring import sampled
from nest_runtime.cli.output import (
    DeviceOption,
    DtypeOption,
    Interrupted,
    JsonOption,
    ModelOption,
    Output,
)
from nest_runtime.cli.training import check_answers
from nest_runtime.compare.methods.registry import method_names
from nest_runtime.errors import UsageError
from nest_runtime.hints import did_you_mean

if TYPE_CHECKING:
    from nest_runtime.compare.compare import Comparison, Outcome, Plan
    from nest_runtime.compare.methods.base import Method
    from nest_runtime.compare.methods.shipped import Shipped
    from nest_runtime.evaluate.cases import Case
    from nest_runtime.evaluate.standard import Standard
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.recipe import Recipe

DEFAULT_METHODS = ",".join(method_names(usual=True))
VALIDATION_SUITES = ("jailbreak-seen", "over-refusal", "utility")
VALIDATION_CASES = 150  # of each suite: the sweep answers them some forty times


MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="LIST",
        autocompletion=complete.methods,
        show_default=False,  # one long word would be cut
        help=f"Names with commas between them. All by default: {DEFAULT_METHODS.replace(',', ', ')}.",
    ),
]
PatchesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--patch",
        metavar="PATCH",
        autocompletion=complete.patches,
        help="A finished patch as one more row; repeat it.",
    ),
]
HarmfulOption = Annotated[
    str | None,
    typer.Option("--harmful", metavar="FILE", help="Prompts to refuse; the reference world's by default."),
]
BenignOption = Annotated[
    str | None,
    typer.Option("--benign", metavar="FILE", help="Prompts to answer; the reference world's by default."),
]
SeedsOption = Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Repeat with N seeds.")]
SweepOption = Annotated[
    bool, typer.Option("--sweep", help="Choose each method's learning rate anew, on validation prompts.")
]
SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE", help="Take learning rates and recipe from a sweep's file."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="METHOD=VALUE", help="A method's own setting instead of its usual one: lora=1e-3; repeat it."
    ),
]
WriteSettingsOption = Annotated[
    Path | None, typer.Option("--write-settings", metavar="FILE", help="Keep what --sweep chooses in this file.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Training steps of all methods.")]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Results, plots, and finished cells to go on from.")
]
PlotsOption = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the pictures.")]
ResumeOption = Annotated[bool, typer.Option("--resume/--fresh", help="Take finished cells up again, or start anew.")]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "compare",
        rich_help_panel="Measure",
        epilog=examples(
            "nest-runtime compare",
            "nest-runtime compare --methods base,lora,nest --limit 200 --json",
            "nest-runtime compare --methods base,filter,lora --patch v3",
            "nest-runtime compare --seeds 3 --sweep --out runs/seeds",
            "nest-runtime compare --methods lora,nest --suite standard --data ./public",
        ),
    )(compare)


def compare(
    ctx: typer.Context,
    methods: MethodsOption = DEFAULT_METHODS,
    patch: PatchesOption = None,
    model: ModelOption = "reference",
    harmful: HarmfulOption = None,
    benign: BenignOption = None,
    suite: StandardOption = None,
    data: DataOption = None,
    behaviors: CaseFilesOption = None,
    attacks: AttacksOption = None,
    judge: JudgeOption = None,
    seeds: SeedsOption = 1,
    sweep: SweepOption = False,
    settings: SettingsOption = None,
    chosen: SetOption = None,
    write_settings: WriteSettingsOption = None,
    steps: StepsOption = None,
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = 64,
    batch_size: BatchSizeOption = 64,
    out_folder: OutOption = Path("runs/compare"),
    plots: PlotsOption = True,
    resume: ResumeOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare every method on the same data, budget and judge: safety, over-refusal, utility and cost."""
    out = Output.of(ctx, as_json)
    if write_settings is not None and not sweep:
        raise UsageError("--write-settings without --sweep: nothing is chosen", "add --sweep")
    from nest_runtime.compare.methods.registry import check_names, make_methods
    from nest_runtime.plots.style import require_matplotlib

    made = make_methods(check_names([name.strip() for name in methods.split(",") if name.strip()]))
    own = _values(chosen or [], made, sweep)
    if plots:
        require_matplotlib(", or --no-plots")
    model = model_for(ctx, out, model, patch[0] if patch else None)
    asked = CompareOptions(model, harmful, benign, suite, data, behaviors, attacks, judge, limit, device, dtype)
    from nest_runtime.compare.compare import Plan

    writable_folder(out_folder)
    comparison = _comparison(out, asked, out_folder, resume)
    finished = _finished(patch, comparison)
    recipe, values = _settings(
        out, settings, comparison, steps, quiet=sweep or own.keys() == {m.name for m in made if m.knob}
    )
    plan = Plan((*made, *finished), recipe, tuple(range(seeds)), {**values, **own}, sweep, max_tokens, batch_size)
    outcome = _run(out, comparison, plan, out_folder)
    document = write_results(outcome, plan, out_folder, plots)
    if write_settings is not None:
        from nest_runtime.compare.sweep import settings_file
        from nest_runtime.io import write_json

        write_json(write_settings, settings_file(outcome.values, outcome.sweep, outcome.identity))
    out.result(document, lambda: render(out, document, out_folder))


@dataclass(frozen=True)
class CompareOptions:
    """What the user named: model, data, cases and judge."""

    model: str
    harmful: str | None
    benign: str | None
    suite: list[str] | None
    data: Path | None
    behaviors: list[str] | None
    attacks: list[str] | None
    judge: str | None
    limit: int | None
    device: str
    dtype: str


def _comparison(out: Output, asked: CompareOptions, folder: Path, resume: bool) -> Comparison:
    """Read data and cases, check everything, then load the model."""
    bad, good = _prompts(asked)
    cases, standard = _cases(asked)
    from nest_runtime.compare.compare import Comparison
    from nest_runtime.compare.methods.base import Target
    from nest_runtime.evaluate import make_judge
    from nest_runtime.evaluate.suites import default_judge
    from nest_runtime.model.load import load_model

    judge = make_judge(asked.judge or default_judge(cases), device=asked.device)
    loaded = load_model(asked.model, device=asked.device, dtype=asked.dtype)
    check_answers(out, loaded, {asked.harmful or "the harmful": bad, asked.benign or "the benign": good}, good)
    target = Target(loaded.model, loaded.tokenizer, loaded.hash, loaded.name)
    return Comparison(
        target,
        bad,
        good,
        cases,
        judge,
        workdir=folder,
        validation_cases=_validation_cases(asked),
        standard=standard,
        resume=resume,
    )


def _finished(refs: Sequence[str] | None, comparison: Comparison) -> list[Shipped]:
    """The patches named, each seen to fit the model."""
    from nest_runtime.compare.methods.shipped import shipped
    from nest_runtime.resolve import load_patch

    target = comparison.target
    return shipped([load_patch(ref, model_hash=target.base_hash) for ref in refs or []], target)


def _prompts(asked: CompareOptions) -> tuple[list[Example], list[Example]]:
    if (asked.harmful is None) != (asked.benign is None):
        missing = "--benign" if asked.benign is None else "--harmful"
        raise UsageError(f"{missing} is missing", "give both files, or neither for the reference world's prompts")
    if asked.harmful is not None and asked.benign is not None:
        return prompts_named(asked.harmful, "harmful"), prompts_named(asked.benign, "benign")
    if asked.model != "reference":
        raise UsageError(
            f"no training prompts for {asked.model}: the reference world's are for the reference model",
            "give --harmful FILE and --benign FILE",
        )
    from nest_runtime.compare.methods.data import reference_prompts

    return reference_prompts()


def _cases(asked: CompareOptions) -> tuple[list[Case], Standard | None]:
    """The cases asked for; and the standard suite, whose cases are among them, where it is asked for."""
    from nest_runtime.evaluate import apply_attacks, parse_attacks

    attacks = parse_attacks(asked.attacks) if asked.attacks else []
    others, standard = sampled(
        asked.model, asked.suite or [], asked.behaviors or [], data=asked.data, limit=asked.limit
    )
    cases = [*(standard.cases if standard else ()), *others]
    if not cases:
        raise UsageError("nothing to compare attack success on: questions of utility alone", "name more of the suite")
    return apply_attacks(cases, attacks) if attacks else cases, standard


def _validation_cases(asked: CompareOptions) -> list[Case] | None:
    """The reference world's validation acts, its seen wrappings only; None: the held-out training prompts."""
    if asked.model != "reference" or asked.harmful is not None:
        return None
    from nest_runtime.evaluate import load_suites, sample_cases

    return sample_cases(load_suites(VALIDATION_SUITES, split="validation"), VALIDATION_CASES)


def _values(chosen: Sequence[str], methods: Sequence[Method], sweep: bool) -> dict[str, float]:
    """What ``--set`` says, by method. Raises UsageError."""
    if chosen and sweep:
        raise UsageError("--set and --sweep exclude each other: the sweep chooses every method's setting", "drop one")
    knobs = {method.name: method.knob for method in methods if method.knob}
    values: dict[str, float] = {}
    for text in chosen:
        name, _, value = text.partition("=")
        if name not in knobs:
            raise UsageError(
                f"--set {text}: {name or 'nothing'} is none of the methods compared that have a setting",
                f"{did_you_mean(name, knobs)}they are {', '.join(knobs) or 'none'}: --set METHOD=VALUE",
            )
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        if not 0 <= values[name] < math.inf:
            raise UsageError(f"--set {text}: {value!r} is no {knobs[name]}", f"give a number: --set {name}=0.001")
    return values


def _settings(
    out: Output, path: Path | None, comparison: Comparison, steps: int | None, *, quiet: bool
) -> tuple[Recipe, dict[str, float]]:
    """Recipe and values: of the file named, of the shipped sweep where it was made for this base, else defaults."""
    from nest_runtime.compare.api import settings_for

    recipe, values = settings_for(comparison.target, path)
    if not values and not quiet:
        out.note(
            "no sweep was made for this model: learning rates are the methods' usual ones (choose them with --sweep)"
        )
    return (recipe if steps is None else recipe.evolve(steps=steps)), values


def _run(out: Output, comparison: Comparison, plan: Plan, folder: Path) -> Outcome:
    try:
        with out.bars() as bars:
            comparison.progress = bars
            return comparison.run(plan)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished cells are kept in {folder}: the same command goes on") from None


def write_results(outcome: Outcome, plan: Plan, folder: Path, plots: bool) -> dict[str, Any]:
    """Write comparison.json, comparison.md and the pictures; returns the JSON."""
    from nest_runtime.compare.rows import document
    from nest_runtime.compare.tables import markdown
    from nest_runtime.io import write_json, write_text

    made = document(outcome, plan.methods)
    write_json(folder / "comparison.json", made)
    write_text(folder / "comparison.md", markdown(made))
    if plots:
        from nest_runtime.plots.comparison import draw

        draw(made, folder)
    return made
