"""Commands that make patches: locate (which neurons, which clusters) and train (the whole way to a file)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import base_id, examples, model_flag, model_for, prompts_named, writable_file
from nest_runtime.cli.output import DeviceOption, DtypeOption, Interrupted, JsonOption, ModelOption, Output, size
from nest_runtime.errors import UsageError
from nest_runtime.escape import short
from nest_runtime.io import MAX_SETTINGS, parse_json, read_text

if TYPE_CHECKING:
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.recipe import Recipe
    from nest_runtime.train.run import TrainResult
    from nest_runtime.train.workers import Workers

PROMPTS = "JSONL, CSV, TXT, hf://datasets/org/name\\[:split], or a bundled name."
Harmful = Annotated[str, typer.Option("--harmful", metavar="FILE", help=f"Prompts to refuse: {PROMPTS}")]
Benign = Annotated[str, typer.Option("--benign", metavar="FILE", help=f"Prompts to answer as before: {PROMPTS}")]
RecipeRef = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE.json",
        autocompletion=complete.recipes,
        help="default, paper, fast, or a file of settings, as `inspect --json` shows under method.",
    ),
]
Borderline = Annotated[
    str | None,
    typer.Option(
        "--borderline",
        metavar="FILE",
        help="Benign prompts that look harmful, answered as before; none leaves them out. Default: the bundled ones.",
    ),
]
Z = Annotated[
    float | None, typer.Option("--z", metavar="Z", help="Keep neurons whose probe weight has a z-score above this.")
]
KMax = Annotated[int | None, typer.Option("--k-max", metavar="K", min=1, help="Most clusters of one projection.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Seed of every random choice.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on after an interrupt, or start anew and drop what was kept.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    panel = "Make patches"
    app.command(
        "locate",
        rich_help_panel=panel,
        epilog=examples("nest-runtime locate --harmful bad.jsonl --benign good.jsonl --out sites.json"),
    )(locate)
    app.command(
        "train",
        rich_help_panel=panel,
        epilog=examples(
            "nest-runtime train --harmful bad.txt --benign good.txt --out v1.safetensors",
            "nest-runtime train --from v2 --harmful new.txt --benign good.txt \\",
            "    --rehearsal bad.txt --out v3.safetensors",
        ),
    )(train)


def locate(
    ctx: typer.Context,
    harmful: Harmful,
    benign: Benign,
    out_file: Annotated[Path, typer.Option("--out", metavar="SITES.json", help="Where to write the located sites.")],
    model: ModelOption = "reference",
    z: Z = None,
    k_max: KMax = None,
    seed: Seed = None,
    recipe_name: RecipeRef = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: Resume = True,
    as_json: JsonOption = False,
) -> None:
    """Find the safety neurons of a model, and their clusters, without training anything."""
    out = Output.of(ctx, as_json)
    recipe = recipe_of(recipe_name, model, z=z, k_max=k_max, seed=seed)
    workdir = check_out(out_file, ".json")
    from nest_runtime.model.load import load_model
    from nest_runtime.train.pipeline import locate_sites

    bad, good = prompts_named(harmful, "harmful"), prompts_named(benign, "benign")
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
        columns = ("NEURONS", "CLUSTERS", "SILHOUETTE", "PROBE ACCURACY")
        rows = [(s["site"], s["neurons"], s["clusters"], s["silhouette"], s["probe_accuracy"]) for s in sites]
        out.table(("SITE", *columns), rows, right=columns)
        out.line(f"{sum(s['neurons'] for s in sites):,} neurons at {len(sites)} sites, written to {out_file}")
        files = f"--harmful {shlex.quote(harmful)} --benign {shlex.quote(benign)}"
        out.note(f"next: nest-runtime train{model_flag(model)} {files} --out v1.safetensors")

    out.result(document, render)


def train(
    ctx: typer.Context,
    harmful: Harmful,
    benign: Benign,
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The patch to write, a .safetensors file.")],
    model: ModelOption = "reference",
    borderline: Borderline = None,
    parent: Annotated[
        str | None, typer.Option("--from", metavar="PATCH", autocompletion=complete.patches, help="Re-tune this patch.")
    ] = None,
    rehearsal: Annotated[
        str | None,
        typer.Option("--rehearsal", metavar="FILE", help="With --from: earlier harmful prompts, tuned on again."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Its name; the parent's, or MODEL-safety.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", metavar="vK", help="Its version; the next free one.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="ORG/NAME", help="What the Hub calls the base; the model's own name."),
    ] = None,
    loadings: Annotated[
        bool | None, typer.Option("--loadings/--tied", help="A trained loading per neuron, or the paper's tied rows.")
    ] = None,
    z: Z = None,
    k_max: KMax = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=0, help="Training steps.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate of the cluster rows.")] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            metavar="random",
            autocompletion=complete.controls,
            help="As a control: as many random neurons instead.",
        ),
    ] = None,
    seed: Seed = None,
    recipe_name: RecipeRef = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: Resume = True,
    as_json: JsonOption = False,
) -> None:
    """Train a safety patch: locate, cluster, tune, and write one file.

    An interrupted run goes on where it stopped when the same command is given again.
    For several GPUs: accelerate launch -m nest_runtime train …
    """
    out = Output.of(ctx, as_json)
    model = model_for(ctx, out, model, parent)
    kind = None if loadings is None else ("learned" if loadings else "tied")
    given = {"z": z, "k_max": k_max, "steps": steps, "lr": lr, "control": control, "seed": seed, "loadings": kind}
    recipe = recipe_of(recipe_name, model, **given)
    workdir, named_base = check_out(out_file, ".safetensors"), base_id(base_model)
    if named_base is not None and model == "reference":
        raise UsageError("--base-model names a base of the Hub's, and the model is the built-in one", "leave it out")
    if rehearsal and not parent:
        raise UsageError(
            "--rehearsal without --from", "name the patch to re-tune with --from, or leave --rehearsal out"
        )
    from nest_runtime.model.load import load_model
    from nest_runtime.prompts.examples import load_examples
    from nest_runtime.resolve import load_patch
    from nest_runtime.train.pipeline import train_patch

    bad, again = prompts_named(harmful, "harmful"), load_examples(rehearsal) if rehearsal else []
    good, near = prompts_named(benign, "benign"), borderline_of(borderline, model, recipe)
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
    if not team.main:
        return
    report = result.report
    size_row = f"{report['parameters']:,} parameters, {report['neurons']:,} neurons, {report['clusters']} clusters"
    write_patch(
        out,
        result,
        out_file,
        rows={"parent": short(report["parent"]), "size": size_row},
        then=f"nest-runtime chat{model_flag(model)} --patch {out_file}   or: nest-runtime add {out_file}",
    )


def check_answers(
    out: Output, loaded: LoadedModel, sources: Mapping[str, Sequence[Example]], benign: Sequence[Example]
) -> None:
    """Refuse the reference world's answers on another model, and say where benign ones look foreign to it."""
    from nest_runtime.reference.recognize import refuse_world_answers
    from nest_runtime.train.familiar import foreign_note

    refuse_world_answers(sources.items(), loaded.tokenizer, loaded.name)
    note = foreign_note(loaded.model, loaded.tokenizer, benign, loaded.name)
    if note is not None:
        out.note(f"note: {note}")


def join(out: Output) -> Workers:
    """The processes that a launcher started with this one; only the main one speaks."""
    from nest_runtime.train.workers import Workers

    team = Workers.current()
    out.quiet = out.quiet or not team.main
    return team


def recipe_of(name: str | None, model: str = "", **given: Any) -> Recipe:
    """The recipe of a name or a file, else the model's usual one, with the command line's settings on top.

    Args:
        name: ``default``, ``paper``, ``fast``, ``reference``, or a JSON file, whose missing settings are those of the
            model's usual recipe: ``reference`` for the built-in model, which is a world of its own, ``default`` for
            every other.
        model: the model's reference.
        given: settings by field; None leaves the recipe's.
    """
    from nest_runtime.train.recipe import RECIPES, Recipe, named_recipe

    path, usual = Path(name or ""), RECIPES["reference" if model == "reference" else "default"]
    if name is not None and name not in RECIPES and path.suffix == ".json":
        try:
            values = parse_json(read_text(path, MAX_SETTINGS))
        except (OSError, ValueError) as error:
            raise UsageError(f"the recipe {path} cannot be read: {error}", "give a JSON object of settings") from error
        if not isinstance(values, dict):
            raise UsageError(f"the recipe {path} is a JSON {type(values).__name__}", "give a JSON object of settings")
        recipe = Recipe.from_json({**usual.to_json(), **values})
    else:
        recipe = usual if name is None else named_recipe(name)
    changes = {key: value for key, value in given.items() if value is not None}
    if "k_max" in changes:  # --k-max 1 means one cluster, also where the recipe starts at two
        changes["k_min"] = min(recipe.k_min, changes["k_max"])
    return recipe.evolve(**changes)


def borderline_of(ref: str | None, model: str, recipe: Recipe) -> list[Example]:
    """The borderline-benign prompts to train on: those named, or the bundled ones where the recipe asks in framings.

    The reference model's world knows nothing of them.
    """
    from nest_runtime.prompts.examples import load_examples

    if ref == "none" or (ref is None and (model == "reference" or not recipe.framings)):
        return []
    return load_examples(ref or "borderline")


def check_out(path: Path, suffix: str) -> Path:
    """Refuse what could not be written in the end, before the work; gives the folder for interrupted work."""
    if path.suffix != suffix:
        raise UsageError(
            f"--out is {path}; expected a name that ends with {suffix}", f"write --out {path.with_suffix(suffix)}"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise UsageError(f"--out {path} {what}", "make the folder, or name a file elsewhere")
    writable_file(path)
    return path.with_name(path.name + ".work")


@contextmanager
def keeping(workdir: Path) -> Iterator[None]:
    """Say on Ctrl-C what is kept; remove the work folder where nothing is."""
    try:
        yield
    except KeyboardInterrupt as error:
        if workdir.is_dir() and not any(workdir.iterdir()):
            workdir.rmdir()
        kept = (
            f"; finished steps are kept in {workdir}: the same command goes on from there" if workdir.is_dir() else ""
        )
        raise Interrupted(f"interrupted{kept}") from error


def name_and_version(
    name: str | None, version: str | None, loaded: LoadedModel, parent: Patch | None
) -> tuple[str, str]:
    """What is given, else the parent's name or MODEL-safety, and the next version that nothing has yet."""
    from nest_runtime.store.store import Store

    if name is None:
        name = parent.name if parent else re.sub(r"[^\w.+-]+", "-", loaded.name) + "-safety"
    if version is None:
        known = [entry.version for entry in Store().list(loaded.hash) if entry.name == name]
        known += [parent.version] if parent and parent.name == name else []
        numbers = [int(found[1]) for item in known if (found := re.fullmatch(r"v(\d+)", item))]
        version = f"v{max(numbers, default=0) + 1}"
    return name, version


def write_patch(
    out: Output,
    result: TrainResult,
    target: Path,
    *,
    rows: Mapping[str, str],
    then: str,
    **more: Any,
) -> None:
    """Write the patch that was trained, and report it.

    Args:
        out: where to report.
        result: of ``train_patch`` or ``retarget_patch``.
        target: the file to write.
        rows: what else people are told of it.
        then: the command they would give next.
        more: what else the JSON document holds.
    """
    patch, path = result.patch, result.patch.save(target)
    document = {
        "name": patch.name,
        "version": patch.version,
        **result.report,
        "base_hash": patch.base_hash,
        **more,
        "out": str(path),
    }

    def render() -> None:
        seconds = "  ".join(f"{stage} {value:.1f} s" for stage, value in result.report["seconds"].items())
        out.pairs(
            {
                "patch": patch.label,
                "digest": patch.digest,
                **rows,
                "took": seconds,
                "file": f"{path} ({size(path.stat().st_size)})",
            }
        )
        for note in result.report["notes"]:
            out.note(f"note: {note}")
        out.note(f"next: {then}")

    out.result(document, render)
