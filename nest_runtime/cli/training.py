"""What the commands locate, train, retarget and plan share: their options, the recipe they go by, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import writable_file
from nest_runtime.cli.output import Interrupted, Output, size
from nest_runtime.errors import UsageError, reason_of
from nest_runtime.hints import did_you_mean
from nest_runtime.io import MAX_SETTINGS, parse_json, read_text
from nest_runtime.train.recipe import RECIPES, Recipe, named_recipe

if TYPE_CHECKING:
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.prompts.examples import Example
    from nest_runtime.train.result import TrainResult
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
        help="default, paper, fast, reference, or a file of settings, as `inspect --json` shows under method.",
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
Version = Annotated[str | None, typer.Option("--version", metavar="vK", help="Its version; the next free one.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on after an interrupt, or start anew and drop what was kept.")
]


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
    path, usual = Path(name or ""), RECIPES["reference" if model == "reference" else "default"]
    if name is not None and name not in RECIPES and path.suffix == ".json":
        try:
            values = parse_json(read_text(path, MAX_SETTINGS))
        except (OSError, ValueError) as error:
            beside = (item.name for item in path.parent.glob("*.json")) if not path.exists() else ()
            raise UsageError(
                f"the recipe {path} cannot be read: {reason_of(error)}",
                f"{did_you_mean(path.name, beside)}give a JSON object of settings",
            ) from error
        if not isinstance(values, dict):
            raise UsageError(f"the recipe {path} is a JSON {type(values).__name__}", "give a JSON object of settings")
        recipe = usual.evolve(**values)
    else:
        recipe = usual if name is None else named_recipe(name)
    changes = {key: value for key, value in given.items() if value is not None}
    if "k_max" in changes:  # --k-max 1 means one cluster, also where the recipe starts at two
        changes["k_min"] = min(recipe.k_min, changes["k_max"])
    return recipe.evolve(**changes)


BORDERLINE = (
    "borderline",
    "imperatives",
    "pasted",
    "small-talk",
)  # near harmful ones in words, form or length


def borderline_of(ref: str | None, model: str, recipe: Recipe) -> list[Example]:
    """The borderline-benign prompts to train on: those named, or ``BORDERLINE`` where the recipe asks in framings.

    The reference model's world knows nothing of them.
    """
    from nest_runtime.prompts.examples import load_examples

    if ref == "none" or (ref is None and (model == "reference" or not recipe.framings)):
        return []
    return [example for name in ([ref] if ref else BORDERLINE) for example in load_examples(name)]


def check_out(path: Path, suffix: str) -> Path:
    """Refuse what could not be written in the end, before the work; returns the folder for interrupted work."""
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
    """Say on Ctrl-C what is kept; remove the work folder if nothing is."""
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
    if name is None:
        name = parent.name if parent else re.sub(r"[^\w.+-]+", "-", loaded.name.removesuffix(".gguf")) + "-safety"
    return name, version or next_version(name, loaded.hash, parent)


def next_version(name: str, base_hash: str, parent: Patch | None) -> str:
    """``v`` and a number that no patch of this name and base has, in the store, in the package, or as the parent."""
    from nest_runtime.store.store import Store

    known = [entry.version for entry in Store().list(base_hash) if entry.name == name]
    known += [parent.version] if parent and parent.name == name else []
    numbers = [int(found[1]) for item in known if (found := re.fullmatch(r"v(\d+)", item))]
    return f"v{max(numbers, default=0) + 1}"


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
        """What was made, how long each stage took, and what to do next."""
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
