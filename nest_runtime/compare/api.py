"""``nest.compare``: what the command ``compare`` does, as one call; no pictures, no tables."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.compare.methods.base import Target
    from nest_runtime.compare.methods.shipped import Shipped
    from nest_runtime.evaluate.judges import Judge
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.progress import Progress
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.recipe import Recipe


def compare(
    methods: Sequence[str] = ("base", "lora", "nest"),
    model: str | Path | LoadedModel = "reference",
    *,
    harmful: str | Path | Sequence[Example] | None = None,
    benign: str | Path | Sequence[Example] | None = None,
    patches: Sequence[str | Path | Patch] = (),
    suites: Sequence[str] = (),
    behaviors: Sequence[str | Path] = (),
    data: str | Path | None = None,
    attacks: Sequence[str] = (),
    judge: str | Judge | None = None,
    limit: int | None = None,
    recipe: Recipe | None = None,
    values: Mapping[str, float] | None = None,
    seeds: int = 1,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit methods on the same prompts, under the same recipe, and measure each on the same cases with the same judge.

    Args:
        methods: names as ``compare --methods`` takes them; ``base`` is added if it is missing.
        model: a model reference, or what ``load_model`` gave.
        harmful, benign: training prompts or files of them; the reference world's for the reference model.
        patches: finished patches, each as one more row.
        suites, behaviors, attacks, limit: what to ask, as in ``nest.evaluate``; ``standard`` measures utility too.
        data: the folder of public sets that the suite ``standard`` asks; by default $NEST_TEST_DATA.
        judge: a judge or its name; None takes the one that fits the cases.
        recipe: steps, batches and early stop of every method; None takes the command's.
        values: a method's own setting by its name, mostly a learning rate; usual ones for the others.
        seeds: how many seeds each method is fitted with.
        max_new_tokens, batch_size: of generation; decoding is greedy.
        workdir: where finished cells are kept; the same call continues from them. None uses a temporary folder.
        progress: called as (stage, done, total).

    Returns:
        What ``compare`` writes as comparison.json: ``rows`` first, one a method, ``base`` first of them.

    Raises:
        UsageError: an unknown method, suite, attack or judge; no prompts for another model than the reference.
        DataError: a file cannot be read. BaseMismatch: a finished patch is for another base.
    """
    from nest_runtime.compare.compare import Comparison, Plan
    from nest_runtime.compare.methods.registry import make_methods
    from nest_runtime.compare.rows import document
    from nest_runtime.evaluate.api import find_asked, find_judges, listed, opened
    from nest_runtime.evaluate.attacks import apply_attacks, parse_attacks

    made = make_methods([str(name) for name in listed("methods", methods)])
    bad, good = _prompts(model, harmful, benign)
    asked = find_asked(model, suites, behaviors, data, (), limit, 0)
    cases = apply_attacks(asked.cases, parse_attacks(list(attacks))) if attacks else asked.cases
    judges = find_judges(judge, cases)
    target, finished = _target(opened(model), patches)
    known, usual = settings_for(target)
    chosen = {**usual, **(values or {})}
    plan = Plan((*made, *finished), recipe or known, tuple(range(seeds)), chosen, False, max_new_tokens, batch_size)
    with nullcontext(str(workdir)) if workdir is not None else tempfile.TemporaryDirectory() as folder:
        about = (target, bad, good, cases, judges[0])
        comparison = Comparison(*about, workdir=Path(folder), standard=asked.standard, progress=progress)
        return document(comparison.run(plan), plan.methods)


def _target(loaded: LoadedModel, patches: Sequence[str | Path | Patch]) -> tuple[Target, list[Shipped]]:
    """The model to fit methods on, and finished patches, each seen to fit it. Raises BaseMismatch."""
    from nest_runtime.compare.methods.base import Target
    from nest_runtime.compare.methods.shipped import shipped
    from nest_runtime.resolve import load_patch

    target = Target(loaded.model, loaded.tokenizer, loaded.hash, loaded.name)
    given = [load_patch(p, model_hash=loaded.hash) if isinstance(p, str | Path) else p for p in patches]
    return target, shipped(given, target)


def settings_for(target: Target, path: Path | None = None) -> tuple[Recipe, dict[str, float]]:
    """Recipe and learning rates: of a file of settings, of the shipped sweep where it was made for this base.

    Else the recipe is the default one, and there are no learning rates: methods have usual ones.
    """
    from nest_runtime.compare.methods.registry import DEFAULTS, read_settings
    from nest_runtime.model.load import REFERENCE
    from nest_runtime.train.recipe import RECIPES, Recipe

    if path is not None or DEFAULTS.is_file():
        found = read_settings(path or DEFAULTS)
        if path is not None or found["base_hash"] == target.base_hash:
            return Recipe.of_header(found["recipe"]), dict(found["values"])
    return RECIPES["reference" if target.name == REFERENCE else "default"], {}


def _prompts(
    model: str | Path | LoadedModel,
    harmful: str | Path | Sequence[Example] | None,
    benign: str | Path | Sequence[Example] | None,
) -> tuple[list[Example], list[Example]]:
    from nest_runtime.compare.methods.data import reference_prompts
    from nest_runtime.model.load import REFERENCE
    from nest_runtime.prompts.examples import load_examples

    name = str(model) if isinstance(model, str | Path) else model.name
    if harmful is not None and benign is not None:
        both = [load_examples(str(g)) if isinstance(g, str | Path) else list(g) for g in (harmful, benign)]
        return both[0], both[1]
    if harmful is not None or benign is not None:
        missing = "benign" if benign is None else "harmful"
        raise UsageError(f"{missing} prompts are missing", "give both, or neither for the reference world's prompts")
    if name != REFERENCE:
        raise UsageError(
            f"no training prompts for {name}: the reference world's are for the reference model",
            "give harmful=FILE and benign=FILE",
        )
    return reference_prompts()
