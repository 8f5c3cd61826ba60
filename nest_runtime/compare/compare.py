"""Every method on the same data, budget, judge and prompts: fit, answer, judge, and keep each finished cell.

A cell is one method with one value of its knob and one seed, on one set of cases. It is written when it
is finished (cells.py), so that a rerun redoes no finished cell. The sweep runs cells on validation cases and chooses
each method's value; rows, tables and claims are made from cells in rows.py, pictures in plots/comparison.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nest_runtime.compare.cells import Cell, cases_digest, cell_key, notes_on, read_cell, write_cell
from nest_runtime.compare.methods.base import FitData, Fitted, Method, Target
from nest_runtime.compare.methods.data import prepare_data
from nest_runtime.compare.provenance import provenance
from nest_runtime.compare.sweep import SweepRow, edge_notes, held_cases, mark_chosen, sweep_row
from nest_runtime.errors import DataError, UsageError
from nest_runtime.evaluate.ability import Score
from nest_runtime.evaluate.cases import Case, digest_of
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.prompting import PrefillView
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.rounds import BASE
from nest_runtime.evaluate.run import Answerer, Subject, check_judges, evaluate_answers
from nest_runtime.evaluate.standard import Standard
from nest_runtime.evaluate.utility import Questions, Way, measure_utility
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example, examples_digest
from nest_runtime.train.recipe import Recipe

CELL_FILE = "cell.json"


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
        methods: ``base`` first.
        recipe: steps, batches, schedule and early stop of every method; NeST's own settings too.
        seeds: each gives a split of the data, batches and starting values.
        values: by method, the value of its knob where no sweep chooses one.
        sweep: choose the values anew, on the first seed and the validation cases.
        max_new_tokens, batch_size: of generation.
    """

    methods: tuple[Method, ...]
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)
    values: Mapping[str, float] = field(default_factory=dict)
    sweep: bool = False
    max_new_tokens: int = 64
    batch_size: int = 64

    def value_of(self, method: Method) -> float:
        """The method's value without a sweep: the plan's, else the method's fallback."""
        return float(self.values.get(method.name, method.fallback_for(self.recipe)))

    def seeds_of(self, method: Method) -> tuple[int, ...]:
        """The seeds that a method runs with: one where none matters."""
        return self.seeds if method.seeded else self.seeds[:1]


@dataclass(frozen=True)
class Outcome:
    """All cells of a comparison, the sweep that chose the values, what identifies the run, and remarks on it."""

    cells: tuple[Cell, ...]
    sweep: tuple[SweepRow, ...]
    values: Mapping[str, float]
    identity: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Comparison:
    """One comparison under way: the model, the data, and the folder of finished cells.

    Args:
        target: the bare model.
        harmful, benign: the training prompts, the same for every method.
        cases: what is reported on; never used to choose anything.
        validation_cases: what the sweep chooses on; None makes them from the held-out training rows.
        judge: the same for every method.
        workdir: finished cells and artifacts.
        standard: the standard suite where its cases are among these: its questions of utility are asked under every
            method, and the report says where its suites come from.
        resume: take finished cells up again.
        progress: called as (stage, done, total).

    Raises:
        DataError: no prompts of a class. EvaluationError: a judge that cannot work.
    """

    def __init__(
        self,
        target: Target,
        harmful: Sequence[Example],
        benign: Sequence[Example],
        cases: Sequence[Case],
        judge: Judge,
        *,
        workdir: Path,
        validation_cases: Sequence[Case] | None = None,
        standard: Standard | None = None,
        resume: bool = True,
        progress: Progress | None = None,
    ) -> None:
        for kind, examples in (("harmful", harmful), ("benign", benign)):
            if len(examples) < 2:
                raise DataError(
                    f"{len(examples)} {kind} training prompts; at least 2 are needed", f"give more {kind} prompts"
                )
        check_judges([judge])
        self.target, self.harmful, self.benign, self.judge = target, list(harmful), list(benign), judge
        self.digests = (examples_digest(self.harmful), examples_digest(self.benign))
        self.cases, self.validation_cases = list(cases), validation_cases
        self.questions, self.sources = (standard.questions, standard.sources) if standard else (None, {})
        self.workdir, self.resume, self.progress = workdir, resume, progress
        self._data: dict[str, FitData] = {}
        self._seen: list[Cell] = []  # of the sweep too

    def run(self, plan: Plan) -> Outcome:
        """Sweep where the plan says so, then every method and seed on the cases."""
        self._seen.clear()
        sweep = self.sweep(plan) if plan.sweep else ()
        values = {row.method: row.value for row in sweep if row.chosen}
        values = {m.name: values.get(m.name, plan.value_of(m)) for m in plan.methods if m.knob}
        jobs = [(method, seed) for method in plan.methods for seed in plan.seeds_of(method)]
        cells = []
        for number, (method, seed) in enumerate(jobs):
            self._tell("methods", number, len(jobs))
            value = values.get(method.name, 0.0)
            cells.append(self.cell(plan, method, value, seed, self.cases, "test", self.questions))
            self._seen.append(cells[-1])
        self._tell("methods", len(jobs), len(jobs))
        notes = [*edge_notes(sweep), *self._other_prompts(cells), *notes_on(self._seen)]
        return Outcome(tuple(cells), tuple(sweep), values, self.identity(plan), tuple(notes))

    def sweep(self, plan: Plan) -> tuple[SweepRow, ...]:
        """Every value of every method's grid on the validation cases, the best of each method marked."""
        rows: list[SweepRow] = []
        jobs = [(method, value) for method in plan.methods for value in method.grid_for(plan.recipe)]
        cases = self._validation(plan)
        for number, (method, value) in enumerate(jobs):
            self._tell("sweep", number, len(jobs))
            cell = self.cell(plan, method, value, plan.seeds[0], cases, "sweep")
            self._seen.append(cell)
            rows.append(sweep_row(cell.method, cell.knob, cell.value, cell.result))
        self._tell("sweep", len(jobs), len(jobs))
        return mark_chosen(rows)

    def cell(
        self,
        plan: Plan,
        method: Method,
        value: float,
        seed: int,
        cases: Sequence[Case],
        kind: str,
        questions: Questions | None = None,
    ) -> Cell:
        """A finished cell from the folder, or a new one, kept there."""
        recipe = plan.recipe.evolve(seed=seed)
        key = cell_key(self.target, method, value, recipe, self.digests, cases, plan.max_new_tokens, questions)
        folder = self.workdir / "cells" / f"{kind}-{method.name}-s{seed}-{key}"
        known = read_cell(folder / CELL_FILE) if self.resume else None
        if known is not None:
            judged = self._judged(plan, known, cases, key, folder)
            if judged is not None:
                return judged
        if folder.exists():  # answers of an interrupted or another fit are not this one's
            shutil.rmtree(folder)
        fitted = method.fit(self.target, self.data(recipe), recipe, value=value, workdir=folder, progress=self.progress)
        result = self._evaluate(plan, fitted, cases, key, folder)
        if questions is not None:
            result = replace(result, ability=self._utility(plan, fitted, questions, key, folder))
        fit = {
            "trainable": fitted.trainable,
            "artifact_bytes": fitted.artifact_bytes,
            "seconds": None if fitted.seconds is None else round(fitted.seconds, 3),
            "peak_bytes": fitted.peak_bytes,
            "report": dict(fitted.report),
        }
        cell = Cell(method.name, method.knob, value, seed, fit, result, self.judge.identity, provenance())
        write_cell(folder / CELL_FILE, cell)
        return cell

    def _judged(self, plan: Plan, cell: Cell, cases: Sequence[Case], key: str, folder: Path) -> Cell | None:
        """The cell with this judge's verdicts; None if they would need answers that it does not have."""
        if cell.judge == self.judge.identity:
            return cell
        try:
            result = self._result(plan, cell.method, _no_answers, cases, key, folder)
        except _Unanswered:
            return None
        result = replace(result, ability=cell.result.ability)  # no judge has a part in it
        again = replace(cell, result=result, judge=self.judge.identity)
        write_cell(folder / CELL_FILE, again)
        return again

    def data(self, recipe: Recipe) -> FitData:
        """The training data under a seed, made once; the base's answers are kept in a folder of their own."""
        key = digest_of(recipe.to_json())
        if key not in self._data:
            folder = self.workdir / "data" / key.removeprefix("sha256:")[:16]
            self._data[key] = prepare_data(
                self.target, self.harmful, self.benign, recipe, workdir=folder, progress=self.progress
            )
        return self._data[key]

    def identity(self, plan: Plan) -> dict[str, Any]:
        """What this comparison is about, and where it comes from: data, cases, judge, recipe; commit, machine, date."""
        return {
            "model": self.target.name,
            "base_hash": self.target.base_hash,
            "harmful": {"digest": self.digests[0], "count": len(self.harmful)},
            "benign": {"digest": self.digests[1], "count": len(self.benign)},
            "cases": {"digest": cases_digest(self.cases), "count": len(self.cases)},
            "questions": None if self.questions is None else {"digest": self.questions.digest},
            "suites": {name: source.to_json() for name, source in self.sources.items()},
            "validation_cases": None if self.validation_cases is None else len(self.validation_cases),
            "judge": self.judge.name,
            "recipe": plan.recipe.to_json(),
            "seeds": list(plan.seeds),
            "max_new_tokens": plan.max_new_tokens,
            **provenance(),
        }

    def _evaluate(self, plan: Plan, fitted: Fitted, cases: Sequence[Case], key: str, folder: Path) -> EvalResult:
        target = replace(self.target, tokenizer=PrefillView(self.target.tokenizer))

        def answer(conversations: Any, on_batch: Any) -> list[str]:
            sizes = {"max_new_tokens": plan.max_new_tokens, "batch_size": plan.batch_size}
            return fitted.answers(target, conversations, on_batch, **sizes)

        return self._result(plan, fitted.method, answer, cases, key, folder)

    def _result(
        self, plan: Plan, method: str, answer: Answerer, cases: Sequence[Case], key: str, folder: Path
    ) -> EvalResult:
        subject = self._subject(plan, method, key)
        return evaluate_answers(answer, cases, [self.judge], subject=subject, progress=self.progress, workdir=folder)

    def _utility(self, plan: Plan, fitted: Fitted, questions: Questions, key: str, folder: Path) -> tuple[Score, ...]:
        """What a method costs in utility. The base's own answers are made once for all methods."""
        bare = fitted.method == BASE
        subject = self._subject(plan, BASE if bare else fitted.method, None if bare else key)
        shared = self.workdir / "utility"
        return measure_utility(
            self.target.model,
            self.target.tokenizer,
            questions,
            subject,
            way=Way(on=fitted.applied, rewrite=fitted.rewrite, screen=fitted.screen),
            batch_size=plan.batch_size,
            workdir=shared if bare else folder,
            base_workdir=shared,
            progress=self.progress,
        )

    def _subject(self, plan: Plan, method: str, key: str | None) -> Subject:
        return Subject(
            model=self.target.name,
            model_hash=self.target.base_hash,
            patch=method,
            digest=key,
            settings={"max_new_tokens": plan.max_new_tokens, "decoding": "greedy"},
        )

    def _validation(self, plan: Plan) -> list[Case]:
        if self.validation_cases is not None:
            return list(self.validation_cases)
        data = self.data(plan.recipe.evolve(seed=plan.seeds[0]))
        if not data.held_harmful or not data.held_benign:
            raise UsageError(
                "the sweep has no validation prompts", "raise validation_fraction in the recipe, or give more prompts"
            )
        return held_cases(data)

    def _other_prompts(self, cells: Sequence[Cell]) -> list[str]:
        """Which finished patches were trained on other prompts than the methods here."""
        notes = []
        for cell in cells:
            named = cell.fit["report"].get("data") or {}
            used = tuple((named.get(kind) or {}).get("digest") for kind in ("harmful", "benign"))
            if cell.fit["peak_bytes"] is None and used != self.digests:
                notes.append(f"{cell.method} was trained elsewhere, on other prompts than the methods here")
        return notes

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


class _Unanswered(Exception):
    """Judging a finished cell again asks for answers that it does not have (later tries of best-of-N)."""


def _no_answers(conversations: Any, on_batch: Any) -> list[str]:
    raise _Unanswered
