"""HTTP clients of this package. Loads httpx2 when the first one is made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import UsageError, reason_of

if TYPE_CHECKING:
    import httpx2

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def web_client(**options: Any) -> httpx2.Client:
    """An HTTP client; ``options`` are httpx2's.

    Raises:
        UsageError: a variable names a file of certificates that cannot be read.
    """
    import httpx2

    try:
        return httpx2.Client(**options)
    except OSError as error:  # ssl.SSLError too: a file that holds no certificate
        named = [f"{name}={os.environ[name]}" for name in CERTIFICATES if os.environ.get(name)]
        raise UsageError(
            f"the certificates of {' and '.join(named) or 'this machine'} cannot be read: {reason_of(error)}",
            "name a PEM file of certificates in SSL_CERT_FILE, or unset it",
        ) from error
