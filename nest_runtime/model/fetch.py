"""Models from the Hub: what is fetched of a repository, and what its refusals mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nest_runtime.errors import ModelError
from nest_runtime.model.gguf.header import find_gguf

# What a checkpoint needs and nothing that could be pickled.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
T = TypeVar("T")


def fetch_model(ref: str, *, code: bool = False, config_only: bool = False) -> Path:
    """A Hub model's folder, or its GGUF file where the repository holds one and no safetensors; downloaded once.

    Args:
        ref: ``org/name[@revision]``.
        code: fetch Python files too.
        config_only: fetch nothing but the configuration; of a GGUF file, which holds its own, all of it.

    Raises:
        ModelError: there is no such model, it cannot be fetched, or which of several GGUF files is meant is not said.
    """
    patterns = ["config.json"] if config_only else [*HUB_FILES, *(["*.py"] if code else [])]
    folder = _snapshot(ref, patterns)
    if (folder / "config.json").is_file() and (config_only or any(folder.glob("*.safetensors*"))):
        return folder
    return find_gguf(folder) or _fetch_gguf(ref) or folder


def _fetch_gguf(ref: str) -> Path | None:
    """The repository's only GGUF model, by the list of its files, lest all quantizations of a model be fetched."""
    from huggingface_hub import list_repo_files

    repo, _, revision = ref.partition("@")
    files = _asked(ref, lambda: list_repo_files(repo, revision=revision or None))
    names = sorted(
        name for name in files if name.endswith(".gguf") and not name.rpartition("/")[2].startswith("mmproj")
    )
    if any(name.endswith(".safetensors") for name in files) or not names:
        return None
    if len(names) > 1:
        raise ModelError(
            f"{repo} holds {len(names)} GGUF files: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}; "
            "expected one",
            f"fetch the one that is meant and name the file: hf download {repo} {names[0]} --local-dir .",
        )
    return _snapshot(ref, names) / names[0]


def _snapshot(ref: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = ref.partition("@")
    return Path(_asked(ref, lambda: snapshot_download(repo, revision=revision or None, allow_patterns=patterns)))


def _asked(ref: str, ask: Callable[[], T]) -> T:
    """What the Hub answers; its refusals as ModelError."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    repo, _, revision = ref.partition("@")
    try:
        with quiet():
            return ask()
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}", "see its branches and tags on the Hub") from error
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is no Hub id: {str(error).splitlines()[0]}", "use org/name[@revision]") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"there is no folder {ref!r}, and the Hub could not be reached for it",
            "check the path, or the network; a model downloaded before works offline",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"the Hub gave no model {ref!r}: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "check the id; for a gated or private model run `hf auth login` first",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' and the Hub's progress bars off for a while, and as they were afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    hub_was_off, bars_were_on = are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not hub_was_off:
            enable_progress_bars()
        if bars_were_on:
            logging.enable_progress_bar()
