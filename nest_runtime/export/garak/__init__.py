"""Plugins for garak, NVIDIA's scanner: this project's judge as a detector, a running server as a generator.

    python -m nest_runtime.export.garak            # in garak's environment: puts both into the garak that is installed
    garak --target_type nest --target_name reference --probes dan --detectors nest.JudgeDetector

garak looks for plugins in its own package and nowhere else: two files are copied there. The detector needs numpy and
safetensors, no torch: ``pip install --no-deps .`` of a clone beside garak will do.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from nest_runtime.errors import NestError, reason_of

PLUGINS = {"detector.py": "detectors/nest.py", "generator.py": "generators/nest.py"}


def garak_folder() -> Path:
    """The package folder of the garak of this environment.

    Raises:
        NestError: there is none.
    """
    found = find_spec("garak")
    if found is None or not found.submodule_search_locations:
        raise NestError("garak is not installed in this environment", "run this with the python that garak runs with")
    return Path(next(iter(found.submodule_search_locations)))


def install(folder: Path | None = None) -> list[Path]:
    """Copy the plugins into garak; what is there of them already is replaced.

    Args:
        folder: garak's package folder; that of this environment by default.

    Raises:
        NestError: no garak, or its folder cannot be written to.
    """
    folder = garak_folder() if folder is None else folder
    written = []
    for name, place in PLUGINS.items():
        target = folder / place
        try:
            target.write_text(files(__package__).joinpath(name).read_text(encoding="utf-8"), encoding="utf-8")
        except OSError as error:
            raise NestError(
                f"{target} cannot be written: {reason_of(error)}", "run this where garak's folder is yours"
            ) from error
        written.append(target)
    return written
