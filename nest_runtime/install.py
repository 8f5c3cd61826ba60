"""How this package and its optional parts are installed, as errors, cards and documents say it.

There is no release yet: everything starts from the repository, at the address where it is to be published. When there
is a release, only this file changes.
"""

from __future__ import annotations

import shlex
from importlib import metadata

PACKAGE = "nest-runtime"
SOURCE = "https://github.com/nest-runtime/nest-runtime"  # as pyproject.toml has it; a test holds the two together


def install(extras: str = "") -> str:
    """One line that installs the package without a checkout, for cards.

    Args:
        extras: their names, separated by commas.
    """
    return f"pip install '{PACKAGE}{f'[{extras}]' if extras else ''} @ git+{SOURCE}'"


def from_clone(extras: str = "") -> tuple[str, ...]:
    """The lines that documents begin with: a clone, an environment, and the package with tested versions."""
    folder = SOURCE.rpartition("/")[2]
    return (
        f"git clone {SOURCE} && cd {folder}",
        "python3 -m venv .venv && . .venv/bin/activate",
        in_clone(extras),
    )


def in_clone(extras: str = "") -> str:
    """The line that installs the package, or more of its parts, in a clone; editable, so that a pull is enough."""
    what = f"'.[{extras}]'" if extras else "."
    return f"pip install -c constraints.txt -e {what}"


def extra(name: str) -> str:
    """What to type for an optional part: its packages themselves, which needs neither a release nor a clone."""
    found = [
        line.partition(";")[0].strip()
        for line in metadata.requires(PACKAGE) or []
        if f'extra == "{name}"' in line.replace("'", '"')
    ]
    return f"pip install {' '.join(shlex.quote(item) for item in found)}"
