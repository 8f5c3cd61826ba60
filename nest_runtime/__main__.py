"""``python -m nest_runtime`` is the command ``nest-runtime``."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # pip refuses older ones; a checkout can be run by any
    sys.stderr.write(
        "error: nest-runtime needs Python 3.11 or newer; this is {}.{}\n".format(*sys.version_info)
        + "hint: make an environment with a newer one: python3.11 -m venv .venv\n"
    )
    sys.exit(2)

from nest_runtime.cli.main import main

sys.exit(main())
