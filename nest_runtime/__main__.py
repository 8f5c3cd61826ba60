"""``python -m nest_runtime`` is the command ``nest-runtime``."""

import sys

from nest_runtime.cli.main import main

sys.exit(main())
