"""Exit status 0 where the server of this container is alive. Reads the variables that `nest-runtime serve` reads."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request

port = os.environ.get("NEST_SERVE_PORT", "8000")
secure = bool(os.environ.get("NEST_SERVE_SSL_CERTFILE"))
# The certificate is made out to the name that clients use, and this asks the same machine.
trusting = ssl._create_unverified_context() if secure else None

try:
    address = f"{'https' if secure else 'http'}://127.0.0.1:{port}/health"
    with urllib.request.urlopen(address, timeout=4, context=trusting) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except OSError as error:
    sys.exit(f"unhealthy: {error}")
