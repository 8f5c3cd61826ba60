"""Steps that several commands share: examples in help, the model's hash, which patch to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    from nest_runtime.cli.output import Output
    from nest_runtime.patch import Patch


def examples(*lines: str) -> str:
    r"""The epilog of a command's help: example lines of at most 78 characters; one that goes on ends in ``\``."""
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
            f"{option} {path} cannot be written: {error.strerror or error}", "name a place where you may write"
        ) from error


def base_hash_of(model: str | None) -> str | None:
    """The hash of a model reference, or of a ``sha256:…`` that is one already; None for None."""
    if model is None or model.startswith("sha256:"):
        return model
    from nest_runtime.fingerprint import hash_report
    from nest_runtime.models import resolve_model

    return str(hash_report(resolve_model(model)[1])["hash"])


def choose_patch(out: Output, ref: str | None, no_patch: bool, model_hash: str) -> Patch | None:
    """The patch a command runs with: the one named, none, or the one active in the store; says which on stderr.

    Raises UsageError where both a patch and none are asked for, and whatever load_patch raises.
    """
    from nest_runtime.registry.store import Store
    from nest_runtime.resolve import load_patch

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
        out.note(f"with {patch.name}@{patch.version}, the active patch of this model")
    return patch
