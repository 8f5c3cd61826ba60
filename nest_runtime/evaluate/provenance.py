"""Where figures come from: version, commit, code, packages, machine, date. Reads the installation, changes nothing."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nest_runtime import __version__

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn", "peft")
# What decides how a method is fitted and answers; judging has identities of its own.
_DECIDES = ("train", "baselines", "runtime", "generate.py")


def provenance() -> dict[str, Any]:
    """``nest_runtime``, ``commit``, ``code``, ``packages``, ``machine`` and ``created`` (ISO 8601, UTC)."""
    return {
        "nest_runtime": __version__,
        "commit": commit(),
        "code": code_digest(),
        "packages": packages(),
        "machine": machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def commit() -> str | None:
    """The git commit of the running code, ``-dirty`` added where the package differs from it; None where unknown.

    Known in a checkout, and where pip installed from a repository.
    """
    if (PACKAGE.parent / ".git").exists():
        try:
            head = _git("rev-parse", "HEAD")
            return f"{head}-dirty" if _git("status", "--porcelain", "--", PACKAGE.name) else head
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        origin = json.loads(metadata.distribution("nest-runtime").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    found = origin.get("vcs_info", {}).get("commit_id")
    return None if found is None else str(found)


def _git(*args: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=10, encoding="utf-8"
    )
    return done.stdout.strip()


@cache
def code_digest() -> str:
    """``sha256:<hex>`` over the source that fits methods and makes answers: another digest, perhaps other figures."""
    digest = hashlib.sha256()
    for name in _DECIDES:
        place = PACKAGE / name
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def packages() -> dict[str, str]:
    """Versions of the packages that figures depend on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Where this runs: processor, cores, memory, torch and its threads, GPU."""
    import os

    import psutil
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
