"""The command retarget: a patch for a fine-tuned sibling of its base (train/retarget.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands.patches import PatchArgument
from nest_runtime.cli.common import examples, model_flag, prompts_named
from nest_runtime.cli.options import Flags, with_flags
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, Output
from nest_runtime.cli.training import (
    PROMPTS,
    RecipeRef,
    Resume,
    Version,
    check_answers,
    check_out,
    join,
    keeping,
    name_and_version,
    recipe_of,
    write_patch,
)
from nest_runtime.errors import UsageError
from nest_runtime.escape import short
from nest_runtime.train.recipe import Recipe

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.result import TrainResult

_OWN = "the reference world's where the patch was trained on those"


Sibling = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=complete.models,
        help="The fine-tuned sibling of the patch's base.",
    ),
]
OwnHarmful = Annotated[
    str | None, typer.Option("--harmful", metavar="FILE", help=f"Prompts to refuse: {PROMPTS} By default {_OWN}.")
]
OwnBenign = Annotated[
    str | None, typer.Option("--benign", metavar="FILE", help="Prompts to answer as before, in the same forms.")
]
PatchOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="The patch to write; NAME-vK.safetensors by default.")
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Its name; MODEL-safety.")]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "retarget",
        rich_help_panel="Make patches",
        epilog=examples(
            "nest-runtime retarget v3 --model ./my-fine-tune --out mine.safetensors",
            "nest-runtime retarget p.safetensors --model M --harmful x.txt --benign y.txt",
        ),
    )(with_flags(retarget))


def retarget(
    ctx: typer.Context,
    *,
    patch: Annotated[str, PatchArgument],
    model: Sibling,
    harmful: OwnHarmful = None,
    benign: OwnBenign = None,
    out_file: PatchOut = None,
    name: Name = None,
    version: Version = None,
    settings: Annotated[Mapping[str, Any], Flags(Recipe, only=("steps", "seed"), unset=True)],
    recipe_name: RecipeRef = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: Resume = True,
    as_json: JsonOption = False,
) -> None:
    """Bring a patch to a fine-tuned sibling of its base: locate there anew, start from its rows, tune shortly.

    Without --steps and --recipe that takes 3 in 10 of the steps of training anew.
    Measure the result with eval: how much of the patch's effect comes over depends on how far the models are apart.
    """
    out = Output.of(ctx, as_json)
    if (harmful is None) != (benign is None):
        raise UsageError("one of --harmful and --benign without the other", "give both, or neither")
    from nest_runtime.patch.patch import check_names

    check_names(name, version)
    from nest_runtime.model.load import load_model
    from nest_runtime.resolve import load_patch
    from nest_runtime.train.retarget import retarget_patch

    before = load_patch(patch)
    bad, good = _prompts(before, harmful, benign)
    recipe = _settings(before, recipe_name, settings)
    team = join(out)
    loaded = load_model(model, device=device, dtype=dtype)
    check_answers(out, loaded, {harmful or "its prompts": bad, benign or "its benign prompts": good}, good)
    named, numbered = name_and_version(name, version, loaded, None)
    target = out_file or _own_file(named, numbered)
    workdir = check_out(target, ".safetensors")
    out.note(f"bringing {before.label} to {loaded.name}, as {named}@{numbered}")
    with keeping(workdir), out.bars() as bars:
        result = retarget_patch(
            loaded.model,
            loaded.reader,
            before,
            bad,
            good,
            recipe=recipe,
            name=named,
            version=numbered,
            base_hash=loaded.hash,
            base_model=loaded.name,
            workdir=workdir,
            resume=resume,
            progress=bars,
        )
    if team.main:
        _write(out, result, target, before, model)


def _own_file(name: str, version: str) -> Path:
    """The file that the new patch is written to where none is named. Raises UsageError if it is there."""
    target = Path(f"{name}-{version}.safetensors")
    if target.exists():
        raise UsageError(f"{target} is there already", "name the new patch's file with --out")
    return target


def _write(out: Output, result: TrainResult, target: Path, before: Patch, model: str) -> None:
    neurons, label = result.report["parent_neurons"], before.label
    kept = f"{neurons['kept']:,} kept, {neurons['added']:,} added, {neurons['dropped']:,} dropped"
    origin = {"patch": label, "digest": before.digest, "base_hash": before.base_hash}
    write_patch(
        out,
        result,
        target,
        rows={"from": f"{label}  {short(before.digest)}", "neurons": kept},
        then=f"nest-runtime eval{model_flag(model)} --patch {target} --with-base",
        **{"from": origin},
    )


def _prompts(patch: Patch, harmful: str | None, benign: str | None) -> tuple[list[Example], list[Example]]:
    from nest_runtime.train.retarget import prompts_of

    if harmful is None or benign is None:
        return prompts_of(patch)
    return prompts_named(harmful, "harmful"), prompts_named(benign, "benign")


def _settings(patch: Patch, name: str | None, settings: Mapping[str, Any]) -> Recipe:
    """The recipe named, else the patch's own, shortened; the command line's settings on top."""
    from nest_runtime.train.retarget import retarget_recipe

    if name is not None:
        return recipe_of(name, **settings)
    return retarget_recipe(patch).evolve(**{key: value for key, value in settings.items() if value is not None})
