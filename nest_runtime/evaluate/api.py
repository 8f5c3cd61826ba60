"""``nest.evaluate``: what the command ``eval`` does, as one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.evaluate.cases import Case
    from nest_runtime.evaluate.judges import Judge
    from nest_runtime.evaluate.report import EvalResult
    from nest_runtime.evaluate.session import Asked
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.progress import Progress


def evaluate(
    model: str | Path | LoadedModel = "reference",
    patch: str | Path | Patch | None = None,
    *,
    suites: Sequence[str] = (),
    behaviors: Sequence[str | Path] = (),
    data: str | Path | None = None,
    attacks: Sequence[str] = (),
    judge: str | Judge | Sequence[str | Judge] | None = None,
    limit: int | None = None,
    seed: int = 0,
    with_base: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure attack success, over-refusal and utility of a model under a patch, or of the bare base.

    Args:
        model: a model reference, or what ``load_model`` gave.
        patch: a patch, or a reference to one; None measures the bare base.
        suites, behaviors: what to ask, as ``eval --suite`` and ``--behaviors`` take it. Without both, the reference
            model is asked all of its world's test suites.
        data: the folder of public sets that the suite ``standard`` asks; by default $NEST_TEST_DATA.
        attacks: jailbreaks to wrap the harmful cases in, as ``--attacks`` takes them.
        judge: a judge or its name, or several; None takes the one that fits the cases.
        limit: at most so many cases of each suite, drawn by ``seed``.
        seed: of ``limit`` and of the attacks.
        with_base: measure the base too, and compare with it, case by case.
        max_new_tokens, batch_size: of generation; decoding is greedy.
        workdir: where answers and verdicts are kept; the same call continues from them.
        progress: called as (stage, done, total).

    Returns:
        The result: ``rate("asr")``, ``over_refusal``, ``utility``, ``summary()``, ``markdown()``, ``save(path)``.

    Raises:
        UsageError: nothing to ask of another model than the reference, or no such suite, attack or judge.
        DataError: a file of behaviors cannot be read.
        EvaluationError: a judge cannot work. BaseMismatch: the patch is for another base.
    """
    from nest_runtime.evaluate.session import EvalSession
    from nest_runtime.resolve import load_patch

    asked = find_asked(model, suites, behaviors, data, attacks, limit, seed)
    judges = _judges(judge, asked.cases)
    loaded = opened(model)
    chosen = load_patch(patch, model_hash=loaded.hash) if isinstance(patch, str | Path) else patch
    session = EvalSession(asked, judges, loaded, chosen, batch_size, max_new_tokens, workdir)
    return session.run(with_base=with_base, progress=progress)


def find_asked(
    model: str | Path | LoadedModel,
    suites: Sequence[str],
    behaviors: Sequence[str | Path],
    data: str | Path | None,
    attacks: Sequence[str],
    limit: int | None,
    seed: int,
) -> Asked:
    """What to ask; the reference world's suites only where nothing else is named. Raises as ``evaluate``."""
    from nest_runtime.evaluate.attacks import parse_attacks
    from nest_runtime.evaluate.session import Asked
    from nest_runtime.evaluate.standard import load_standard, split_standard

    own, parts = split_standard([str(name) for name in listed("suites", suites)])
    standard = None if parts is None else load_standard(parts, data=data, n=limit, seed=seed)
    others = find_cases(model, own, behaviors, limit, seed) if standard is None or own or behaviors else []
    return Asked(others, standard, attacks=parse_attacks(list(attacks)) if attacks else [], seed=seed)


def _judges(judge: str | Judge | Sequence[str | Judge] | None, cases: Sequence[Case]) -> list[Judge]:
    """The judges of some cases, each of which has shown that it works; none if there are no cases."""
    from nest_runtime.evaluate.run import check_judges

    if not cases:
        return []
    judges = find_judges(judge, cases)
    check_judges(judges)
    return judges


def opened(model: str | Path | LoadedModel) -> LoadedModel:
    """A model reference, loaded; or a model that is loaded already."""
    from nest_runtime.model.load import load_model

    return load_model(model) if isinstance(model, str | Path) else model


def listed(name: str, given: Sequence[str | Path]) -> Sequence[str | Path]:
    """The list given. Raises UsageError if it is one text."""
    if isinstance(given, str | Path):
        raise UsageError(f"{name} is one text, {str(given)!r}; expected a list", f"give {name}=[{str(given)!r}]")
    return given


def find_cases(
    model: str | Path | LoadedModel,
    suites: Sequence[str],
    behaviors: Sequence[str | Path],
    limit: int | None = None,
    seed: int = 0,
) -> list[Case]:
    """The cases asked for; by default, all of the reference world's for the reference model.

    Raises:
        UsageError: nothing is said for another model, or a text is given instead of a list; no such suite.
        DataError: a file cannot be read.
    """
    from nest_runtime.evaluate.suites import load_behaviors, load_suites, sample_cases
    from nest_runtime.model.load import REFERENCE

    listed("suites", suites)
    listed("behaviors", behaviors)
    name = str(model) if isinstance(model, str | Path) else model.name
    if not suites and not behaviors:
        if name != REFERENCE:
            raise UsageError(f"nothing to measure {name} on: no suites and no behaviors", "give behaviors=[FILE]")
        suites = ["reference"]
    cases = [*load_suites(list(suites)), *(case for file in behaviors for case in load_behaviors(file))]
    return cases if limit is None else sample_cases(cases, limit, seed=seed)


def find_judges(judge: str | Judge | Sequence[str | Judge] | None, cases: Sequence[Case]) -> list[Judge]:
    """The judges named; by default, the one that fits the cases."""
    from nest_runtime.evaluate.judges import make_judge
    from nest_runtime.evaluate.judges.base import Judge as Made
    from nest_runtime.evaluate.suites import default_judge

    given = [default_judge(cases)] if judge is None else [judge] if isinstance(judge, str | Made) else list(judge)
    return [make_judge(item) if isinstance(item, str) else item for item in given]
