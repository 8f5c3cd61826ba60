"""The demo as a Hugging Face Space: the reference model, its patches, no buttons that change anything.

Settings are the Space's variables: ``NEST_MODEL`` and ``NEST_PATCH`` name another model and patch, ``NEST_URL`` a
running server instead, ``NEST_LOGIN_FILE`` a file of logins, and ``PORT`` another port than Spaces' 7860. Runs
anywhere else just as well: ``python apps/app.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nest_runtime.demo.server import Listen, bind, read_logins, serve
from nest_runtime.demo.start import Source, open_demo, require_gradio
from nest_runtime.errors import NestError


def main() -> int:
    """Serve the demo to everybody who reaches this machine; gives the exit status."""
    setting = os.environ.get
    try:
        require_gradio()
        login = setting("NEST_LOGIN_FILE")
        logins = read_logins(Path(login)) if login else {}
        listen = Listen(setting("HOST") or "0.0.0.0", int(setting("PORT") or 7860), logins, framed=True)
        with bind(listen) as port:
            source = Source(setting("NEST_MODEL") or "reference", setting("NEST_PATCH"), setting("NEST_URL"))
            serve(open_demo(source), listen, port, lambda url: print(f"ready at {url}", flush=True))
    except NestError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # the server has ended in order
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
