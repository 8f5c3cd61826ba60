"""Files of a training run that are valid at every moment: written aside, synced, then renamed.

Also the keys of a run's stages: a digest over everything a stage's result depends on, so that a rerun
takes up finished work only where it would come out the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nest_runtime.io import canonical_json, replacing

_KEY = "[0-9a-f]" * 16  # as a glob
STAGES = ("answers", "otherwise", "refusals", "activations", "probes", "clusters", "tune")


def stage_key(**parts: Any) -> str:
    """Sixteen hex digits over JSON values; another value of any part gives another key."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()[:16]


def stage_folder(workdir: Path, stage: str, key: str) -> Path:
    """The folder of a stage's results under ``key``; folders of the same stage with other keys are removed."""
    folder = workdir / f"{stage}-{key}"
    if workdir.is_dir():
        for old in workdir.glob(f"{stage}-{_KEY}"):
            if old != folder:
                shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_stages(workdir: Path) -> None:
    """Delete a finished run's stage folders, and the work folder when nothing else is in it."""
    for stage in STAGES:
        for folder in workdir.glob(f"{stage}-{_KEY}"):
            shutil.rmtree(folder)
    if workdir.is_dir() and not any(workdir.iterdir()):
        workdir.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], notes: Any = None) -> None:
    """Write named tensors of any shape and dtype as a safetensors file, atomically; with ``notes``, as JSON."""
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    metadata = {"notes": json.dumps(notes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Any] | None:
    """The tensors and notes of ``write_tensors``, shapes and dtypes as written; None if there is no file."""
    if not path.is_file():
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        notes = json.loads((file.metadata() or {}).get("notes", "null"))
    return load_file(path), notes
