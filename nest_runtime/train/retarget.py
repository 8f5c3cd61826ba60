"""A patch brought to a fine-tuned sibling of its base: located again there, and tuned on from what it was.

Fine-tuning moves a model's neurons little, so the patch's own rows are most of the answer. Locating in
the sibling adds the neurons that matter there now, tuning is short, and the result is an ordinary patch for the
sibling, whose parent is the patch. Whether two models are siblings is not checked beyond shapes: what the result
does has to be measured (evaluate/).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.patch.patch import Patch
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example, examples_digest, make_examples
from nest_runtime.train.pipeline import TrainResult, train_patch
from nest_runtime.train.recipe import RECIPES, Recipe

STEPS_SHARE = 0.3  # of the steps of training anew


def retarget_patch(
    model: Any,
    tokenizer: Any,
    patch: Patch,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    recipe: Recipe | None = None,
    name: str,
    version: str,
    base_hash: str,
    base_model: str = "",
    workdir: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainResult:
    """Make a patch for a fine-tuned sibling of a patch's base.

    Args:
        model: the sibling, bare, in eval mode; its weights do not change.
        tokenizer: its tokenizer.
        patch: the patch to bring over.
        harmful, benign: prompts, as for :func:`train_patch`; those the patch was trained on do.
        recipe: all settings; None takes ``retarget_recipe(patch)``.
        name, version: of the new patch.
        base_hash, base_model: the sibling's hash and name.
        workdir, resume, progress: as for :func:`train_patch`.

    Returns:
        A validated Patch for the sibling, and the report: beside train_patch's figures ``parent_kept`` (share of the
        patch's squared norm that was the start) and ``parent_neurons`` (kept, added, dropped).

    Raises:
        UsageError: the model is the patch's own base.
        SiteMismatch: the model has other sites, or of other shapes.
        DataError, TrainingError, UnknownArchitecture: as train_patch.
    """
    return train_patch(
        model,
        tokenizer,
        harmful,
        benign,
        recipe=recipe or retarget_recipe(patch),
        name=name,
        version=version,
        base_hash=base_hash,
        base_model=base_model,
        parent=patch,
        sibling=True,
        workdir=workdir,
        resume=resume,
        progress=progress,
    )


def retarget_recipe(patch: Patch) -> Recipe:
    """The patch's own recipe, with ``STEPS_SHARE`` of the steps that training anew would take, at strength 1.

    A patch that does not say how it was made (or names settings of another release) gets the default recipe.
    """
    stated = patch.method.get("recipe")
    own = Recipe.of_header(stated) if stated else Recipe()
    anew = RECIPES["reference"] if patch.base_model == "reference" else RECIPES["default"]
    steps = max(own.steps, anew.steps)  # re-tuned patches tell those of the last round
    steps = max(round(STEPS_SHARE * steps), 1)
    return own.evolve(steps=steps, control="none", relocate=False, strength=1.0)  # the patch's rows have theirs


def prompts_of(patch: Patch) -> tuple[list[Example], list[Example]]:
    """The prompts a patch was trained on, harmful and benign, where this package can make them: the reference world's.

    Raises:
        DataError: it was trained on others.
    """
    from nest_runtime.reference.world import CATEGORIES, training_prompts

    for categories in (CATEGORIES, CATEGORIES[::2]):
        harmful, benign = (make_examples(rows, "reference") for rows in training_prompts(categories))
        if patch.data.get("harmful", {}).get("digest") == examples_digest(harmful):
            return harmful, benign
    raise DataError(
        f"the prompts that {patch.label} was trained on are not in this package",
        "give them with --harmful and --benign",
    )
