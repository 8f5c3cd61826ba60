"""The training data of the comparison: the same prompts, answers and split for every method.

The answers, the split and the token rows come from train/, so that a method here sees exactly what
``train_patch`` gives NeST under the same recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nest_runtime.compare.methods.base import FitData, Target
from nest_runtime.model.anatomy import find_projections
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example, make_examples
from nest_runtime.train.batches import refusal_for
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.run import Run


def reference_prompts() -> tuple[list[Example], list[Example]]:
    """The reference world's training prompts: vanilla harmful ones of the train acts, and benign ones."""
    from nest_runtime.reference.world import training_prompts

    harmful, benign = training_prompts()
    return make_examples(harmful, "reference/harmful"), make_examples(benign, "reference/benign")


def prepare_data(
    target: Target,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    recipe: Recipe,
    *,
    workdir: Path,
    progress: Progress | None = None,
) -> FitData:
    """Fill in the base's own answers, hold validation rows out, and make token rows.

    Args:
        target: the bare base.
        harmful: prompts to refuse.
        benign: prompts to answer; their response where given, else the base's own greedy answer.
        recipe: its split, seed, refusals and answer length count.
        workdir: answers are kept here, so that a rerun does not make them again.
        progress: called as (stage, done, total).
    """
    model, projections = target.model, find_projections(target.model)
    run = Run(model, target.tokenizer, projections, recipe, target.base_hash, target.name, workdir, progress)
    teaching, refusals = run.teaching(harmful, benign), run.refusing(harmful).refusals

    def refused(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(example, response=refusal_for(example, refusals)) for example in examples)

    return FitData(
        harmful=refused(harmful),
        benign=(*teaching.benign.train, *teaching.benign.held),
        train_harmful=refused(teaching.harmful.train),
        train_benign=teaching.benign.train,
        held_harmful=refused(teaching.harmful.held),
        held_benign=teaching.benign.held,
        train=teaching.train,
        validation=teaching.validation,
    )
