"""The weight files of a checkpoint folder: which ones transformers would load, and the header of each."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nest_runtime.errors import ModelError, reason_of
from nest_runtime.io import expand
from nest_runtime.patch.frame import Frame, FramingError, header_length, parse_frame

_HEADER_LIMIT = 100 << 20  # as in the safetensors package


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from a folder.

    Raises:
        ModelError: there are none, the index is damaged, or a file it names is missing.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "name a folder with config.json and *.safetensors")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if named := _named_weights(folder):
        return _indexed_files(named) if named.name.endswith(".index.json") else [named]
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}); expected *.safetensors",
            "load it where you trust it and save it with save_pretrained, which writes safetensors",
        )
    raise ModelError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json",
        "name the folder of a complete safetensors checkpoint",
    )


def _named_weights(folder: Path) -> Path | None:
    """The weights that config.json names itself (``transformers_weights``): transformers takes those first."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}", "fetch the checkpoint again") from error
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    path = folder / str(name)
    if not path.name.endswith((".safetensors", ".safetensors.index.json")) or not path.is_file():
        raise ModelError(
            f"config.json names the weights {name!r}; expected a safetensors file in {folder}",
            "remove transformers_weights from config.json, or fetch the checkpoint again",
        )
    return path


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} is damaged: {type(error).__name__}: {error}", "fetch the checkpoint again"
        ) from error
    files = [index.parent / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ModelError(
            f"{index.name} names {len(files)} files; missing: {', '.join(missing[:3]) or 'all'}",
            "fetch the checkpoint again: it is incomplete",
        )
    return files


def read_frame(path: Path) -> Frame:
    """The header of a safetensors file.

    Raises:
        ModelError: it cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), size, _HEADER_LIMIT)
            return parse_frame(file.read(length), size - 8 - length)
    except (FramingError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read: {reason_of(error)}", "fetch the checkpoint again: it is damaged"
        ) from error
