"""Commands that make patches: locate (which neurons, which clusters) and train (the whole way to a file)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import base_id, examples, model_flag, model_for, prompts_named
from nest_runtime.cli.options import Flags, with_flags
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output
from nest_runtime.cli.training import (
    Benign,
    Borderline,
    Harmful,
    RecipeRef,
    Resume,
    Version,
    borderline_of,
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
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.result import TrainResult


PatchOut = Annotated[Path, typer.Option("--out", metavar="FILE", help="The patch to write, a .safetensors file.")]
Parent = Annotated[
    str | None, typer.Option("--from", metavar="PATCH", autocompletion=complete.patches, help="Re-tune this patch.")
]
Rehearsal = Annotated[
    str | None,
    typer.Option("--rehearsal", metavar="FILE", help="With --from: earlier harmful prompts, tuned on again."),
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Its name; the parent's, or MODEL-safety.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ORG/NAME", help="What the Hub calls the base; the model's own name."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    panel = "Make patches"
    app.command(
        "locate",
        rich_help_panel=panel,
        epilog=examples("nest-runtime locate --harmful bad.jsonl --benign good.jsonl --out sites.json"),
    )(with_flags(locate))
    app.command(
        "train",
        rich_help_panel=panel,
        epilog=examples(
            "nest-runtime train --harmful bad.txt --benign good.txt --out v1.safetensors",
            "nest-runtime train --from v2 --harmful new.txt --benign good.txt \\",
            "    --rehearsal bad.txt --out v3.safetensors",
        ),
    )(with_flags(train))


def locate(
    ctx: typer.Context,
    *,
    harmful: Harmful,
    benign: Benign,
    out_file: Annotated[Path, typer.Option("--out", metavar="SITES.json", help="Where to write the located sites.")],
    model: ModelOption = "reference",
    settings: Annotated[Mapping[str, Any], Flags(Recipe, only=("z", "k_max", "seed"), unset=True)],
    recipe_name: RecipeRef = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: Resume = True,
    as_json: JsonOption = False,
) -> None:
    """Find the safety neurons of a model, and their clusters, without training anything."""
    out = Output.of(ctx, as_json)
    recipe = recipe_of(recipe_name, model, **settings)
    workdir = check_out(out_file, ".json")
    from nest_runtime.model.load import load_model
    from nest_runtime.prompts.examples import check_sides
    from nest_runtime.train.pipeline import locate_sites

    bad, good = prompts_named(harmful, "harmful"), prompts_named(benign, "benign")
    check_sides(bad, good)
    team = join(out)
    loaded = load_model(model, device=device, dtype=dtype)
    with keeping(workdir), out.bars() as bars:
        found = locate_sites(
            loaded.model,
            loaded.reader,
            bad,
            good,
            recipe=recipe,
            base_hash=loaded.hash,
            base_model=loaded.name,
            workdir=workdir,
            resume=resume,
            progress=bars,
        )
    if not team.main:
        return
    found.file.save(out_file)
    sites = [site.summary() for site in found.file.sites]
    document = {"sites": sites, "seconds": found.seconds, "out": str(out_file), "base_hash": loaded.hash}

    def render() -> None:
        """The sites in a table, and the command that trains on the same prompts."""
        columns = ("NEURONS", "CLUSTERS", "SILHOUETTE", "PROBE ACCURACY")
        rows = [(s["site"], s["neurons"], s["clusters"], s["silhouette"], s["probe_accuracy"]) for s in sites]
        out.table(("SITE", *columns), rows, right=columns)
        out.line(f"{sum(s['neurons'] for s in sites):,} neurons at {len(sites)} sites, written to {out_file}")
        files = f"--harmful {shlex.quote(harmful)} --benign {shlex.quote(benign)}"
        out.note(f"next: nest-runtime train{model_flag(model)} {files} --out v1.safetensors")

    out.result(document, render)


def train(
    ctx: typer.Context,
    *,
    harmful: Harmful,
    benign: Benign,
    out_file: PatchOut,
    model: ModelOption = "reference",
    borderline: Borderline = None,
    parent: Parent = None,
    rehearsal: Rehearsal = None,
    name: Name = None,
    version: Version = None,
    base_model: BaseModel = None,
    settings: Annotated[Mapping[str, Any], Flags(Recipe, unset=True)],
    recipe_name: RecipeRef = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: Resume = True,
    as_json: JsonOption = False,
) -> None:
    """Train a safety patch: locate, cluster, tune, and write one file.

    An interrupted run continues where it stopped when the same command is given again.
    For several GPUs: accelerate launch -m nest_runtime train …
    """
    out = Output.of(ctx, as_json)
    model = model_for(ctx, out, model, parent)
    recipe, again = recipe_of(recipe_name, model, **settings), _rehearsed(rehearsal, parent)
    workdir, named_base = check_out(out_file, ".safetensors"), _base_name(base_model, model)
    from nest_runtime.patch.patch import check_names

    check_names(name, version)
    from nest_runtime.model.load import load_model
    from nest_runtime.prompts.examples import check_sides
    from nest_runtime.resolve import load_patch
    from nest_runtime.train.pipeline import train_patch

    bad, good = prompts_named(harmful, "harmful"), prompts_named(benign, "benign")
    near = borderline_of(borderline, model, recipe)
    check_sides([*bad, *again], [*good, *near])
    team = join(out)
    loaded = load_model(model, device=device, dtype=dtype)
    check_answers(out, loaded, {harmful: bad, benign: good, rehearsal or "": again}, good)
    before = load_patch(parent, model_hash=loaded.hash) if parent else None
    named, numbered = name_and_version(name, version, loaded, before)
    counts = f"{len(bad)} harmful and {len(good) + len(near)} benign prompts"
    out.note(f"training {named}@{numbered} for {loaded.name} on {counts}")
    with keeping(workdir), out.bars() as bars:
        result = train_patch(
            loaded.model,
            loaded.reader,
            bad,
            [*good, *near],
            recipe=recipe,
            name=named,
            version=numbered,
            base_hash=loaded.hash,
            base_model=named_base or loaded.name,
            parent=before,
            rehearsal=again,
            workdir=workdir,
            resume=resume,
            progress=bars,
        )
    if team.main:
        _write(out, result, out_file, model)


def _base_name(base_model: str | None, model: str) -> str | None:
    """What the Hub calls the base. Raises UsageError for the built-in model, which is not there."""
    name = base_id(base_model)
    if name is not None and model == "reference":
        raise UsageError("--base-model names a base of the Hub's, and the model is the built-in one", "leave it out")
    return name


def _rehearsed(rehearsal: str | None, parent: str | None) -> list[Example]:
    """Earlier harmful prompts that are tuned on again. Raises UsageError where no patch is re-tuned."""
    from nest_runtime.prompts.examples import load_examples

    if rehearsal and not parent:
        raise UsageError(
            "--rehearsal without --from", "name the patch to re-tune with --from, or leave --rehearsal out"
        )
    return load_examples(rehearsal) if rehearsal else []


def _write(out: Output, result: TrainResult, out_file: Path, model: str) -> None:
    report = result.report
    size_row = f"{report['parameters']:,} parameters, {report['neurons']:,} neurons, {report['clusters']} clusters"
    write_patch(
        out,
        result,
        out_file,
        rows={"parent": short(report["parent"]), "size": size_row},
        then=f"nest-runtime chat{model_flag(model)} --patch {out_file}   or: nest-runtime add {out_file}",
    )
