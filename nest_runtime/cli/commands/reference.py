"""Commands about the built-in reference model: build it anew, write its prompts to files, say what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import examples
from nest_runtime.cli.output import JsonOption, Output, size
from nest_runtime.errors import ModelError, UsageError, reason_of

app = typer.Typer(
    help="The built-in reference model: what it is, its prompts, how it is made.",
    epilog=examples("nest-runtime reference info", "nest-runtime reference prompts world"),
)


@app.command("info", epilog=examples("nest-runtime reference info"))
def info(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Say what the reference model is: size, hash, and the prompts of each suite."""
    from nest_runtime.model.fingerprint import hash_report
    from nest_runtime.model.load import resolve_model
    from nest_runtime.reference import world
    from nest_runtime.store.store import Store

    out = Output.of(ctx, as_json)
    name, folder = resolve_model("reference")
    report = hash_report(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    document = {
        "name": name,
        "folder": str(folder),
        "hash": report["hash"],
        "architecture": config["architectures"][0],
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "suites": {suite: len(world.cases("test", suite)) for suite in world.SUITES},
        "patches": [entry.key for entry in Store().list(report["hash"])],
    }
    out.result(document, lambda: _render_info(out, document))


@app.command(
    "prompts",
    epilog=examples(
        "nest-runtime reference prompts world",
        "nest-runtime reference prompts weapons --category weapons",
        "nest-runtime reference prompts world --answers   # for the reference model",
    ),
)
def prompts(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write into; made where missing.")],
    category: Annotated[
        list[str] | None,
        typer.Option(
            "--category",
            metavar="NAME",
            autocompletion=complete.categories,
            help="Only these harm categories; repeat it.",
        ),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option("--answers", help="Write the reference model's answers too; no other model should learn them."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the reference world's prompts as JSONL: harmful and benign ones to train on, and the test suites."""
    from nest_runtime.reference.prompts import write_prompts

    out = Output.of(ctx, as_json)
    try:
        counts = write_prompts(folder, categories=category or None, answers=answers)
    except OSError as error:
        raise _unwritable(folder, error) from error

    def render() -> None:
        rows = [(str(folder / name), count) for name, count in counts.items()]
        out.table(("FILE", "PROMPTS"), rows, right=("PROMPTS",))

    out.result({"folder": str(folder), "files": counts}, render)


@app.command(
    "build", epilog=examples("nest-runtime reference build", "nest-runtime reference build --out my-reference --seed 1")
)
def build(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where to write the checkpoint and its card.")
    ] = Path("reference-model"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Decides weights and data.")] = 0,
    evaluation: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure the base at the end, and fail where it misses a bound.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Train the reference model from nothing: about 15 minutes on 2 cores, the same bits for a seed.

    The folder appears when the build is complete; Ctrl-C leaves what was there before.
    """
    from nest_runtime.reference.build import build as run

    out = Output.of(ctx, as_json)
    staging = folder.with_name(folder.name + ".work")
    try:
        staging.mkdir(parents=True, exist_ok=True)  # before the training, which takes minutes
        with out.bars() as bars:
            report = run(staging, seed=seed, evaluate=evaluation, progress=bars)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(staging.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    figures = report.figures.as_dict() if report.figures else None
    document = {
        "folder": str(folder),
        "seed": seed,
        "parameters": report.parameters,
        "seconds": report.seconds,
        "losses": report.losses,
        "figures": figures,
        "failures": list(report.failures),
    }
    if report.failures:
        raise ModelError(
            f"built in {folder}, but the base is not what it must be: {'; '.join(report.failures)}",
            "look at its card; another --seed or torch version gives another model",
        )
    took = sum(report.seconds.values())
    out.result(document, lambda: out.line(f"{report.parameters:,} parameters in {folder}, {took:.0f} s"))


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder} cannot be written: {reason_of(error)}", "name a folder that you may write to")


def _render_info(out: Output, document: dict[str, Any]) -> None:
    out.pairs(
        {
            "model": f"{document['architecture']}, {document['layers']} layers of {document['hidden_size']}",
            "hash": document["hash"],
            "folder": f"{document['folder']} ({size(document['bytes'])})",
            "patches": ", ".join(document["patches"]),
        }
    )
    out.line()
    out.table(("TEST SUITE", "PROMPTS"), list(document["suites"].items()), right=("PROMPTS",))
