"""The command scale: a patch at another strength, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nest_runtime.cli.commands.patches import PatchArgument, WhoseModel
from nest_runtime.cli.common import base_flag, base_hash_of, examples
from nest_runtime.cli.output import JsonOption, Output, size
from nest_runtime.cli.training import check_out, next_version


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "scale",
        rich_help_panel="Make patches",
        epilog=examples(
            "nest-runtime scale v3 --by 1.1 --out stronger.safetensors",
            "nest-runtime scale my.safetensors --by 0.8 --out milder.safetensors",
        ),
    )(scale)


def scale(
    ctx: typer.Context,
    patch: Annotated[str, PatchArgument],
    by: Annotated[float, typer.Option("--by", metavar="FACTOR", help="What its rows are multiplied with: 0.8, 1.1.")],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The new patch's file.")],
    version: Annotated[
        str | None, typer.Option("--version", metavar="vK", help="Its version; the next free one.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Its name; the patch's own.")] = None,
    model: WhoseModel = None,
    as_json: JsonOption = False,
) -> None:
    """Write a patch at another strength. Above 1 it refuses more, of what is harmless too; below 1 less.

    Measure both on prompts that you choose settings by, and keep the better one.
    """
    from nest_runtime.patch.patch import check_names

    out = Output.of(ctx, as_json)
    check_names(name, version)
    check_out(out_file, ".safetensors")
    from nest_runtime.patch import algebra
    from nest_runtime.resolve import load_patch
    from nest_runtime.train.result import created_now

    before = load_patch(patch, model_hash=base_hash_of(model))
    called = name or before.name
    after = algebra.scale(
        before, by, version=version or next_version(called, before.base_hash, before), name=called
    ).evolve(created=created_now())
    path = after.save(out_file)
    document = {
        "name": after.name,
        "version": after.version,
        "digest": after.digest,
        "parent": before.digest,
        "factor": by,
        "out": str(path),
    }

    def render() -> None:
        """What was made of what, and what to do next."""
        rows = {"patch": after.label, "digest": after.digest, "made of": f"{before.label}, times {by:g}"}
        out.pairs({**rows, "file": f"{path} ({size(path.stat().st_size)})"})
        out.note("note: its figures are not its parent's: measure attack success and over-refusal")
        out.note(f"next: nest-runtime eval --patch {path} --with-base{base_flag(before.base_hash, before.base_model)}")

    out.result(document, render)
