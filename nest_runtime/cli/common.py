"""Steps that several commands share: examples in help, the model's hash, which patch to use and which model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nest_runtime.errors import BaseMismatch, PatchNotFound, UsageError, reason_of

if TYPE_CHECKING:
    import typer

    from nest_runtime.cli.output import Output
    from nest_runtime.patch.patch import Patch
    from nest_runtime.prompts.examples import Example


def examples(*lines: str) -> str:
    r"""The epilog of a command's help: example lines of at most 78 characters; one that continues ends in ``\``."""
    escaped = [line.replace("[", r"\[") for line in lines]
    return "\n\n".join(["[bold]Examples[/bold]" if len(lines) > 1 else "[bold]Example[/bold]", *escaped])


def writable_file(path: Path, option: str = "--out") -> None:
    """Refuse a file that could not be written in the end, before the work. Raises UsageError."""
    from nest_runtime.io import check_writable

    _tried(check_writable, path, option)


def writable_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that could not be made or written to in the end, before the work. Raises UsageError."""
    from nest_runtime.io import check_folder

    _tried(check_folder, path, option)


def _tried(check: Callable[[Path], None], path: Path, option: str) -> None:
    try:
        check(path)
    except OSError as error:
        raise UsageError(
            f"{option} {path} cannot be written: {reason_of(error)}", "name a place where you may write"
        ) from error


def base_hash_of(model: str | None) -> str | None:
    """The hash of a model reference, or of a ``sha256:…`` that is one already; None for None."""
    if model is None or model.startswith("sha256:"):
        return model
    from nest_runtime.model.fingerprint import hash_report
    from nest_runtime.model.load import resolve_model

    return str(hash_report(resolve_model(model)[1])["hash"])


def model_flag(model: str | None) -> str:
    """`` --model M`` for a command that is named to people; nothing for the reference model, which is the default."""
    return "" if model in (None, "reference") else f" --model {shlex.quote(str(model))}"


def base_flag(base_hash: str, base_model: str) -> str:
    """The same for a patch's base: where it was seen last, else BASE to fill in. Loads no torch, and hashes nothing."""
    from nest_runtime.model.bases import noted_base

    return "" if base_model == "reference" else model_flag(noted_base(base_hash) or "BASE")


def source_of(ctx: typer.Context, name: str) -> str:
    """Where an option's value comes from: ``COMMANDLINE``, ``ENVIRONMENT``, ``DEFAULT``, or nothing where unknown."""
    return getattr(ctx.get_parameter_source(name), "name", "")


def model_for(ctx: typer.Context, out: Output, model: str, patch: str | None) -> str:
    """The model to load: the one named with ``--model``; without, the base that the patch was made on.

    Args:
        ctx: the command's, which knows whether ``--model`` was given.
        out: where to say which base was found.
        model: the option's value; the reference model by default.
        patch: the patch named, or None.

    Raises:
        BaseMismatch: the patch's base is not the reference model, and it is not known where that is.
        NestError: as load_patch, where the patch cannot be had.
    """
    if patch is None or source_of(ctx, "model") != "DEFAULT":
        return model
    found = base_named(patch)
    if found is None:
        return model
    base_hash, name = found
    if base_hash == base_hash_of(model):
        return model
    place = where_is(base_hash, name, patch)
    out.note(f"with {name or 'the model'} at {place}, which {patch} was made on")
    return place


def where_is(base_hash: str, name: str, patch: str) -> str:
    """The model reference of a patch's base. Raises BaseMismatch, naming it, where that is not known."""
    from nest_runtime.model.bases import noted_base
    from nest_runtime.model.load import known_base

    place, noted = known_base(base_hash), noted_base(base_hash)
    if place is not None:
        return place
    why = f"{noted}, where it was, holds it no more" if noted else "and this machine has not seen that model yet"
    raise BaseMismatch(
        f"{patch} is for base {name or 'of no name'} ({base_hash}), {why}", "say where it is: --model FOLDER-OR-FILE"
    )


def base_named(ref: str) -> tuple[str, str] | None:
    """Hash and name of the base of a patch reference; of the reference model's where that has one so called.

    None if nothing has that name: the command itself gives the better error.
    """
    from nest_runtime.resolve import load_patch
    from nest_runtime.store.entries import is_path, is_repository
    from nest_runtime.store.store import Store

    if is_path(ref) or is_repository(ref):
        patch = load_patch(ref)
        return patch.base_hash, patch.base_model
    store = Store()
    for model_hash in (base_hash_of("reference"), None):
        try:
            entry = store.find(ref, model_hash=model_hash)
        except PatchNotFound:
            continue
        return entry.base_hash, entry.base_model
    return None


def choose_patch(out: Output, ref: str | None, no_patch: bool, model_hash: str) -> Patch | None:
    """The patch a command runs with: the one named, none, or the one active in the store; says which on stderr.

    Raises:
        UsageError: both a patch and none are asked for.
        NestError: as load_patch.
    """
    from nest_runtime.resolve import load_patch
    from nest_runtime.store.store import Store

    if ref is not None and no_patch:
        raise UsageError("--patch and --no-patch exclude each other", "give one of them")
    if no_patch:
        return None
    if ref is not None:
        return load_patch(ref, model_hash=model_hash)
    patch = Store().active_patch(model_hash)
    if patch is None:
        out.note("no patch is active for this model: the bare base answers (choose one with --patch)")
    else:
        out.note(f"with {patch.label}, the active patch of this model")
    return patch


def base_id(name: str | None) -> str | None:
    """The value of ``--base-model``. Raises UsageError for what is no id of the Hub's."""
    from nest_runtime.hub.card import base_on_hub

    if name is not None and base_on_hub(name) is None:
        raise UsageError(
            f"--base-model is {name!r:.120}; expected org/name, as the Hub has it",
            "leave it out for a base of your own",
        )
    return name


def prompts_named(ref: str, which: Literal["harmful", "benign"]) -> list[Example]:
    """The prompts of an option: a file's, or with ``reference`` those that the built-in model's patches learned from.

    Raises:
        DataError: as load_examples.
    """
    from nest_runtime.io import expand
    from nest_runtime.prompts.examples import load_examples

    if ref != "reference" or expand(ref).exists():
        return load_examples(ref)
    from nest_runtime.compare.methods.data import reference_prompts

    return reference_prompts()[("harmful", "benign").index(which)]


def seconds_of(text: str, option: str) -> float:
    """Seconds of ``90``, ``90s``, ``10m``, ``12h`` or ``30d``. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if not 0 < seconds < 1e9:
        raise UsageError(f"{option} is {text!r}; expected a time such as 60s, 10m, 12h or 30d", "check it for typos")
    return seconds
