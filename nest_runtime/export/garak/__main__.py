"""Puts the plugins into the garak of this environment: ``python -m nest_runtime.export.garak``."""

from __future__ import annotations

import sys

from nest_runtime.errors import NestError
from nest_runtime.export.garak import install


def main() -> int:
    """Install, and say where."""
    try:
        written = install()
    except NestError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
