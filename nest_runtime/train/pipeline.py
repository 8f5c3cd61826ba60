"""From prompts to a patch: answers → activations → locate → cluster → tune → a validated Patch.

Every stage's result is kept in a work folder, under a digest of everything that it depends on. So the same call after
an interrupt continues where it stopped and ends with the same bits; a changed setting or prompt repeats only the
stages that it affects. Processes that a launcher started together share the work (workers.py) and all get the result.
evaluate/ measures patches on held-out attacks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError, UsageError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.patch.patch import Patch, check_names
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example, check_sides
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.result import TrainResult
from nest_runtime.train.run import Run
from nest_runtime.train.sites import SitesFile
from nest_runtime.train.stages import remove_stages
from nest_runtime.train.warm_start import check_parent, check_sibling
from nest_runtime.train.workers import Workers

__all__ = ["LocateResult", "Recipe", "TrainResult", "locate_sites", "train_patch"]


@dataclass(frozen=True)
class LocateResult:
    """Located and clustered sites, and the seconds that each stage took."""

    file: SitesFile
    seconds: dict[str, float]


def train_patch(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    recipe: Recipe | None = None,
    name: str,
    version: str,
    base_hash: str,
    base_model: str = "",
    parent: Patch | None = None,
    sibling: bool = False,
    rehearsal: Sequence[Example] = (),
    serial: int | None = None,
    workdir: str | Path | None = None,
    resume: bool = True,
    keep_workdir: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a patch on a model, or re-tune one.

    Args:
        model: the bare base in eval mode, no patch active or folded; its weights do not change.
        tokenizer: its tokenizer.
        harmful: prompts to refuse, with their response if given, else with a refusal of the recipe's list.
        benign: prompts to answer as before, with their response if given, else with the base's own answer.
        recipe: all settings; None takes the defaults.
        name, version: of the patch.
        base_hash: the base's model hash.
        base_model: the base's name for people.
        parent: re-tune this patch: its rows are the start.
        sibling: the parent was made for another base, of which the model is a fine-tuned sibling (retarget.py).
        rehearsal: with a parent, earlier harmful prompts to tune on as well, so that their effect stays.
        serial: of the patch; None counts up from the parent's, or starts at 1.
        workdir: keep stage results here and resume an interrupted run; None uses a temporary folder.
        resume: False drops what the work folder holds.
        keep_workdir: keep the stage results after success.
        progress: called as (stage, done, total).

    Returns:
        A validated Patch, with figures measured on the numbers that it ships, and the report.

    Raises:
        UsageError: arguments that do not belong together, or a name that no patch can have.
        DataError: no prompts of a class, or a prompt in both.
        TrainingError: training cannot start or continue.
        BaseMismatch, SiteMismatch: the parent is not for this model.
        UnknownArchitecture: no FFN projections are known for the model.
    """
    settings = recipe or Recipe()
    check_names(name, version)
    _check_prompts(harmful, benign, rehearsal, parent)
    projections = find_projections(model)
    if parent is not None:
        (check_sibling if sibling else check_parent)(parent, projections, base_hash)
    team = Workers.current()
    with _work_folder(workdir, resume, keep_workdir, team) as folder:
        run = Run(model, tokenizer, projections, settings, base_hash, base_model, folder, progress, team)
        return run.train(harmful, benign, rehearsal, parent, name, version, serial)


def locate_sites(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    recipe: Recipe | None = None,
    base_hash: str,
    base_model: str = "",
    workdir: str | Path | None = None,
    resume: bool = True,
    keep_workdir: bool = False,
    progress: Progress | None = None,
) -> LocateResult:
    """Locate and cluster only, as ``nest-runtime locate`` does. Arguments as in :func:`train_patch`.

    Returns:
        The sites, and seconds by stage.

    Raises:
        DataError, TrainingError, UnknownArchitecture: as :func:`train_patch`.
    """
    settings = recipe or Recipe()
    _check_prompts(harmful, benign, (), None)
    team = Workers.current()
    with _work_folder(workdir, resume, keep_workdir, team) as folder:
        run = Run(model, tokenizer, find_projections(model), settings, base_hash, base_model, folder, progress, team)
        found = run.locate(harmful, benign)
    return LocateResult(found, run.rounded_seconds())


def _check_prompts(
    harmful: Sequence[Example], benign: Sequence[Example], rehearsal: Sequence[Example], parent: Patch | None
) -> None:
    for kind, examples in (("harmful", harmful), ("benign", benign)):
        if not examples:
            raise DataError(f"there are no {kind} prompts", f"give a file of {kind} prompts")
    if rehearsal and parent is None:
        raise UsageError("rehearsal prompts without a parent patch", "name the patch to re-tune")
    check_sides([*harmful, *rehearsal], benign)


@contextmanager
def _work_folder(workdir: str | Path | None, resume: bool, keep: bool, team: Workers) -> Iterator[Path]:
    """The run's folder: the caller's, made if missing, or a temporary one that goes away.

    The caller's is emptied of a finished run's stages unless they are to be kept; after an error they stay.
    """
    if workdir is None:
        made: list[tempfile.TemporaryDirectory[str]] = []
        name = team.from_main(lambda: _temporary(made))
        try:
            yield Path(name)
            team.wait()  # the main process takes it away, when nobody reads it any more
        finally:
            for temporary in made:
                temporary.cleanup()
        return
    folder = Path(workdir)
    with team.main_first():
        if not resume and folder.is_dir() and team.main:
            remove_stages(folder)
        folder.mkdir(parents=True, exist_ok=True)
    yield folder
    team.wait()
    if not keep and team.main:
        remove_stages(folder)


def _temporary(made: list[tempfile.TemporaryDirectory[str]]) -> str:
    made.append(tempfile.TemporaryDirectory(prefix="nest-train-"))
    return made[-1].name
