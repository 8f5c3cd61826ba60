"""The command eval: attack success, over-refusal and utility of a model, with a patch or without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.case_options import (
    AttacksOption,
    BatchSizeOption,
    CaseFilesOption,
    JudgesOption,
    MaxTokensOption,
    SampleSeedOption,
)
from nest_runtime.cli.common import choose_patch, examples, model_flag, model_for, writable_file, writable_folder
from nest_runtime.cli.evaluate_view import render
from nest_runtime.cli.measuring import cases_of
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output
from nest_runtime.errors import UsageError
from nest_runtime.escape import short

if TYPE_CHECKING:
    from nest_runtime.evaluate import Case, EvalResult, Judge
    from nest_runtime.evaluate.attacks import Attack
    from nest_runtime.evaluate.lm_eval import Tasks
    from nest_runtime.evaluate.standard import Standard
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.progress import Progress
    from nest_runtime.runtime import PatchRuntime


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
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch",
            metavar="PATCH",
            autocompletion=complete.patches,
            help="The patch to measure; the active one by default.",
        ),
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
            autocompletion=complete.suites,
            help="standard (or parts: standard:wild,mmlu), reference, plain, jailbreak-seen, jailbreak-held-out, "
            "over-refusal, utility, or general ability: lm-eval:gsm8k,mmlu; repeat it.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            envvar="NEST_TEST_DATA",
            help="The folder of public prompt sets that the standard suite asks.",
        ),
    ] = None,
    behaviors: CaseFilesOption = None,
    attacks: AttacksOption = None,
    judge: JudgesOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="At most N cases of each suite, drawn by seed; of lm-eval the first N."
        ),
    ] = None,
    seed: SampleSeedOption = 0,
    max_tokens: MaxTokensOption = 64,
    batch_size: BatchSizeOption = 64,
    lm_eval_include: Annotated[
        Path | None, typer.Option("--lm-eval-include", metavar="DIR", help="A folder with lm-eval tasks of your own.")
    ] = None,
    lm_eval_shots: Annotated[
        int | None,
        typer.Option("--lm-eval-shots", metavar="N", min=0, help="Examples in lm-eval's prompts; each task's own."),
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Keep every answer and verdict in this file.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE.html", help="Write a page for the browser: tables, plots and every answer."
        ),
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
    for option, file in (("--out", out_file), ("--html", html_file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{option} {file} lies in a folder that does not exist", "make the folder first")
        if file is not None:
            writable_file(file, option)
    if workdir is not None:
        writable_folder(workdir, "--workdir")
    model = model_for(ctx, out, model, patch)
    from nest_runtime.evaluate.lm_eval import load_tasks, split_suites
    from nest_runtime.evaluate.standard import load_standard, split_standard

    suites, names = split_suites(suite or [])
    suites, parts = split_standard(suites)
    standard = None if parts is None else load_standard(parts, data=data, n=limit, seed=seed)
    tasks = load_tasks(names, include=lm_eval_include, limit=limit, shots=lm_eval_shots) if names else None
    asked = EvalOptions(judge or [], attacks or [], seed, max_tokens, batch_size, workdir, device, dtype)
    no_others = (names or standard is not None) and not suites and not behaviors
    cases = [] if no_others else _cases(model, suites, behaviors or [], limit, seed)
    session = _open(out, asked, Asked(cases, tasks, standard), model, patch, no_patch)
    if standard is not None and workdir is None:
        out.note("answers are not kept; with --workdir DIR the same command goes on where it was interrupted")
    with out.bars() as bars:
        result = session.run(bars, with_base)
    if out_file is not None:
        result.save(out_file)
    if html_file is not None:
        from nest_runtime.evaluate.page import write_page

        write_page(result, html_file)
    out.result(result.summary(), lambda: render(out, result))
    if session.patch is not None and not out.json:
        out.note(f"next: nest-runtime serve --patch {patch or short(session.patch.digest)}{model_flag(model)}")


@dataclass(frozen=True)
class EvalOptions:
    """How the user wants it measured."""

    judge: list[str]
    attacks: list[str]
    seed: int
    max_tokens: int
    batch_size: int
    workdir: Path | None
    device: str
    dtype: str


@dataclass(frozen=True)
class Asked:
    """What is asked: cases of other suites, lm-eval's tasks, the standard suite."""

    others: list[Case]
    tasks: Tasks | None
    standard: Standard | None

    @property
    def cases(self) -> list[Case]:
        """Those of all suites."""
        return [*(self.standard.cases if self.standard else ()), *self.others]


def _cases(model: str, suites: list[str], behaviors: list[str], limit: int | None, seed: int) -> list[Case]:
    from nest_runtime.evaluate import sample_cases

    cases = cases_of(model, suites, behaviors)
    return cases if limit is None else sample_cases(cases, limit, seed=seed)


def _open(
    out: Output,
    asked: EvalOptions,
    what: Asked,
    model: str,
    patch: str | None,
    no_patch: bool,
) -> EvalSession:
    """Check everything that can be checked before answers are paid for, then load the model and the patch."""
    from nest_runtime.evaluate import make_judge, parse_attacks
    from nest_runtime.evaluate.run import check_judges
    from nest_runtime.evaluate.suites import default_judge
    from nest_runtime.model.load import load_model
    from nest_runtime.runtime import PatchRuntime

    attacks, cases = parse_attacks(asked.attacks) if asked.attacks else [], what.cases
    if attacks and not cases:
        raise UsageError("--attacks without cases to attack", "add --suite or --behaviors")
    judges = [make_judge(name, device=asked.device) for name in asked.judge or [default_judge(cases)]] if cases else []
    if cases:
        check_judges(judges)
    loaded = load_model(model, device=asked.device, dtype=asked.dtype)
    chosen = choose_patch(out, patch, no_patch, loaded.hash)
    runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
    if chosen is not None:
        runtime.add(chosen)
    return EvalSession(asked, what, attacks, judges, loaded, runtime, chosen)


@dataclass(frozen=True)
class EvalSession:
    """All that one evaluation needs, checked and loaded."""

    asked: EvalOptions
    what: Asked
    attacks: list[Attack]
    judges: list[Judge]
    loaded: LoadedModel
    runtime: PatchRuntime
    patch: Patch | None

    def run(self, bars: Progress, with_base: bool) -> EvalResult:
        """Measure the patch, and the base too where asked for."""
        from nest_runtime.evaluate import apply_attacks

        model, cases = self.loaded, self.what.cases
        if self.attacks:
            key = None if self.patch is None else self.patch.digest
            with self.runtime.using(key):  # a white-box attack is made against what is measured
                cases = apply_attacks(
                    cases,
                    self.attacks,
                    seed=self.asked.seed,
                    model=model.model,
                    tokenizer=model.tokenizer,
                    progress=bars,
                )
        result = self._measure(cases, self.patch, bars)
        if not with_base or self.patch is None:
            return result
        return result.compared_with(self._measure(cases, None, bars))

    def _measure(self, cases: list[Case], patch: Patch | None, bars: Progress) -> EvalResult:
        from nest_runtime.evaluate import evaluate as run

        standard = self.what.standard
        return run(
            self.loaded.model,
            self.loaded.reader,
            cases,
            self.judges,
            tasks=self.what.tasks,
            questions=None if standard is None else standard.questions,
            sources=None if standard is None else standard.sources,
            runtime=self.runtime,
            patch=patch,
            model_name=self.loaded.name,
            base_hash=self.loaded.hash,
            batch_size=self.asked.batch_size,
            max_new_tokens=self.asked.max_tokens,
            workdir=self.asked.workdir,
            progress=bars,
        )
