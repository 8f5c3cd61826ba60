"""The machine and what is installed on it: Python, packages, devices, the folder for patches."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from nest_runtime.doctor.finding import NOTE, OK, PROBLEM, Finding
from nest_runtime.install import PACKAGE, in_clone
from nest_runtime.io import nest_home

SHOWN = ("nest-runtime", "torch", "transformers", "huggingface_hub", "safetensors")
OLDEST_PYTHON = (3, 11)
LITTLE_DISK = 1 << 30  # bytes
GPU_DEVICE = Path("/dev/nvidia0")
_NOT_FOR_USERS = ("test", "docs")
_APART = {"vllm": "docs/guide/engines.md"}  # it wants older versions of what everything else here wants


def python() -> Finding:
    """The interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("python", PROBLEM, found, "nest-runtime needs Python 3.11 or newer")
    return Finding("python", OK, found)


def packages() -> Finding:
    """Whether what the package requires is there, in versions it allows."""
    wrong = list(_unmet(_requirements()))
    if wrong:
        wanted = " ".join(shlex.quote(f"{item.name}{item.specifier}") for item, _ in wrong)
        return Finding("packages", PROBLEM, "; ".join(why for _, why in wrong), f"pip install {wanted}")
    return Finding("packages", OK, ", ".join(f"{name} {_version(name) or 'unknown'}" for name in SHOWN))


def extras() -> Finding:
    """Which optional parts are complete."""
    names = [name for name in metadata.metadata(PACKAGE).get_all("Provides-Extra") or [] if name not in _NOT_FOR_USERS]
    missing = [name for name in names if list(_unmet(_requirements(name)))]
    there = ", ".join(name for name in names if name not in missing) or "none"
    wanted = ",".join(name for name in missing if name not in _APART)
    advice = [f"for more, in a clone: {in_clone(wanted)}"] if wanted else []
    advice += [f"{name} wants an environment of its own ({page})" for name, page in _APART.items() if name in missing]
    return Finding("extras", OK, f"{there}; not installed: {', '.join(missing) or 'none'}", "; ".join(advice))


def devices() -> Finding:
    """What models can run on."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    found = [
        f"cpu with {os.cpu_count()} cores, {torch.get_num_threads()} threads in use, "
        f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free"
    ]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append(f"cuda:{number} {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    if torch.backends.mps.is_available():
        found.append("mps")
    if GPU_DEVICE.exists() and not torch.cuda.is_available():
        why = f"this torch ({torch.__version__}) cannot use the NVIDIA device that is here"
        return Finding("devices", PROBLEM, f"{'; '.join(found)}; {why}", "install torch for CUDA, or its driver")
    return Finding("devices", OK, "; ".join(found))


def home() -> Finding:
    """The folder for patches and caches."""
    folder = nest_home()
    whence = "NEST_HOME" if os.environ.get("NEST_HOME") else "the default"
    return folder_finding("home", folder, whence, "set NEST_HOME to a folder of yours")


def folder_finding(name: str, folder: Path, whence: str, elsewhere: str) -> Finding:
    """Whether a folder can be written, or made, and has room; it is not touched.

    Args:
        name: of the finding.
        folder: which.
        whence: who named it.
        elsewhere: what to do where it cannot be used.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    text = f"{folder} ({whence})"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, PROBLEM, f"{text} cannot be written", elsewhere)
    free = shutil.disk_usage(existing).free
    text += f", {free / 1e9:.1f} GB free" + ("" if folder.exists() else ", not made yet")
    if free < LITTLE_DISK:
        return Finding(name, NOTE, text, f"free some space, or {elsewhere}")
    return Finding(name, OK, text)


def _requirements(extra: str = "") -> list[Requirement]:
    """What the package, or one of its extras, requires here."""
    found = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    always = [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [item for item in found if item not in always and item.marker and item.marker.evaluate({"extra": extra})]


def _unmet(requirements: Iterable[Requirement]) -> Iterable[tuple[Requirement, str]]:
    for item in requirements:
        version = _version(item.name)
        if version is None:
            yield item, f"{item.name} is missing"
        elif not item.specifier.contains(version, prereleases=True):
            yield item, f"{item.name} is {version}; expected {item.specifier}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
