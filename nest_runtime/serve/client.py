"""The admin API of a running server, from another process; its refusals become our own errors.

Loads no torch. It asks for changes; for answers the demo has a client of its own (demo/remote.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nest_runtime import errors
from nest_runtime.errors import AdminApiOff, EngineError, NestError, PatchNotFound, StoreError, TrustError, UsageError
from nest_runtime.secret_files import secret_lines
from nest_runtime.web import web_client

TIMEOUT = 600.0  # seconds: an activation may fetch a patch and try it
LOOK = 2.0  # seconds that a server may take to say what it answers with


class AdminClient:
    """One server's admin API.

    Args:
        url: where it listens, with or without ``/v1``.
        token: an admin token.

    Every method raises the error behind the server's refusal: PatchNotFound, TrustError, StoreError and so on. It
    raises UsageError for a wrong token, AdminApiOff if there is no admin API, and EngineError if nobody answers or
    there is no such server.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = _base(url)
        self._client = web_client(
            base_url=self.url, headers={"authorization": f"Bearer {token}"}, timeout=TIMEOUT, follow_redirects=False
        )

    def patches(self) -> dict[str, Any]:
        """What is loaded and active, and what the store names."""
        return self._ask("GET", "/v1/patches")

    def load(self, ref: str) -> dict[str, Any]:
        """Load and verify a patch, without activating it."""
        return self._ask("POST", "/v1/patches", {"patch": ref})

    def activate(self, ref: str, policy: str | None = None) -> dict[str, Any]:
        """Activate a patch."""
        return self._ask("POST", "/v1/patches/activate", {"patch": ref, "policy": policy})

    def rollback(self, policy: str | None = None) -> dict[str, Any]:
        """Activate the patch before."""
        return self._ask("POST", "/v1/patches/rollback", {"policy": policy})

    def audit(self, limit: int) -> dict[str, Any]:
        """The last ``limit`` entries of the audit log, and whether its chain holds."""
        return self._ask("GET", f"/v1/audit?limit={limit}")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx2

        try:
            response = self._client.request(method, path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise EngineError(f"{self.url} cannot be reached: {error or type(error).__name__}", _why(error)) from error
        try:
            answer: Any = response.json()
        except ValueError:
            answer = None
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        raise self._refusal(response.status_code, answer)

    def _refusal(self, status: int, answer: Any) -> NestError:
        """The error of an answer that is no success."""
        said = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(said, dict) or not isinstance(said.get("message"), str):
            return EngineError(f"{self.url} answered {status}, not as nest-runtime does", "check the URL")
        message, code = f"{self.url}: {said['message']}", said.get("code")
        if status == 401:
            return UsageError(message, "give the file that the server was started with as --token-file")
        if status == 404 and code != "patch_not_found":
            return AdminApiOff(message, "its admin API is off, or elsewhere: see --admin-token-file, --admin-port")
        kind = _KINDS.get(str(code)) or _BY_STATUS.get(status, EngineError)
        return kind(message, "the server is as it was")


def read_token(path: Path) -> str:
    """The first token of a file that only its owner can read. Raises UsageError."""
    lines = secret_lines(path, "admin token file")
    if not lines:
        raise UsageError(f"the admin token file {path} holds no token", "write one token per line into it")
    return lines[0][1].strip()


def answering(url: str) -> tuple[str, str] | None:
    """Label and digest of what a server answers with, as its ``/ready`` says; None if it does not say in time."""
    import httpx2

    try:
        answer = httpx2.get(
            f"{_base(url)}/ready", timeout=LOOK, verify=False
        ).json()  # on this machine; nothing is told
        return str(answer["patch"]), str(answer["digest"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError):
        return None


def _base(url: str) -> str:
    """The URL without ``/v1``. Raises UsageError for what is none."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        raise UsageError(f"--url is {url!r:.200}; expected http://HOST:PORT", "copy it from what `serve` printed")
    return url.rstrip("/").removesuffix("/v1")


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


_KINDS: dict[str, type[NestError]] = {
    _snake(name): kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, NestError) and not issubclass(kind, EngineError)
}
_BY_STATUS: dict[int, type[NestError]] = {
    400: UsageError,
    403: TrustError,
    404: PatchNotFound,
    409: StoreError,
    422: NestError,
}


def _why(error: Exception) -> str:
    """What to do about an answer that did not come."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "to trust a certificate of your own, name its file in the variable SSL_CERT_FILE"
    if "without sending a response" in str(error):
        return "does the server speak TLS? Then its address begins with https://"
    return "is the server running, and is that where its admin API listens?"
