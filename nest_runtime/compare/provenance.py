"""Where figures come from: version, commit, code, packages, machine, date. Reads the installation, changes nothing."""

from __future__ import annotations

import ast
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
_DATA = (".json", ".jsonl", ".txt", ".csv")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn", "peft")
# Where methods are fitted and answers are made; what these import decides as well. Judging has identities of its own.
_DECIDES = ("train", "compare/methods", "runtime", "prompts/generate.py")


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
    """The git commit of the running code, ``-dirty`` added where the package differs from it; None if unknown.

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
def code_digest(package: Path = PACKAGE) -> str:
    """``sha256:<hex>`` over the source that fits methods and makes answers: another digest may mean other figures."""
    digest = hashlib.sha256()
    for path in deciding_files(package):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def deciding_files(package: Path = PACKAGE) -> list[Path]:
    """The modules that fit methods and make answers, every module that they import, and the data beside them.

    Imports are read from the source, those inside functions too; those for type checkers alone do not count.
    """
    roots = [package / name for name in _DECIDES]
    todo = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            names = _imported(ast.parse(path.read_text(encoding="utf-8")), package.name)
            todo += [file for name in names if (file := _module_file(package, name)) is not None]
    beside = {item for folder in {path.parent for path in found} for item in folder.iterdir() if item.is_file()}
    data = {item for item in beside if item.suffix in _DATA}
    return sorted(found | data)


def _imported(node: ast.AST, package: str) -> set[str]:
    """The package's modules, and names in them, that some source imports when it runs; their packages with them."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == package:
            found |= {*_with_packages(child.module), *(f"{child.module}.{alias.name}" for alias in child.names)}
        elif isinstance(child, ast.Import):
            names = (alias.name for alias in child.names if alias.name.split(".")[0] == package)
            found |= {whole for name in names for whole in _with_packages(name)}
        found |= _imported(child, package)
    return found


def _with_packages(name: str) -> list[str]:
    """``a.b.c`` with ``a.b`` and ``a``, which are loaded before it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _module_file(package: Path, name: str) -> Path | None:
    place = package.joinpath(*name.split(".")[1:])
    choices = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in choices if path.is_file()), None)


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
