"""Files of bearer tokens, which open the API and the admin API."""

from __future__ import annotations

import hmac
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from nest_runtime.errors import UsageError
from nest_runtime.secret_files import secret_lines

SHORTEST = 8  # characters; the server warns of shorter ones
MAKE_ONE = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


@dataclass(frozen=True)
class AccessTokens:
    """Secrets of one file: bearer tokens that open the API or the admin API."""

    secrets: tuple[str, ...] = ()

    def matches(self, given: str) -> bool:
        """Whether ``given`` is one of the secrets; takes the same time wherever they differ."""
        found = False
        for secret in self.secrets:
            found |= hmac.compare_digest(secret.encode(), given.encode())
        return found

    @property
    def shortest(self) -> int:
        """The characters of the shortest."""
        return min(map(len, self.secrets))


def read_tokens(path: Path, what: str, *, secret: bool = False) -> AccessTokens:
    """The tokens of a file, one per line; blank lines and lines that start with ``#`` are skipped.

    Args:
        path: the file.
        what: how to call it in errors, e.g. "admin token file".
        secret: refuse it where others on the machine may read it.

    Raises:
        UsageError: the file cannot be read, holds none, or one that could never match, or others may write it.
    """
    lines = [(number, line.strip()) for number, line in secret_lines(Path(path), what, secret=secret)]
    for number, token in lines:
        if not (token.isascii() and token.isprintable()):
            raise UsageError(
                f"the {what} {path}, line {number}: a character that no request can carry",
                "use printable ASCII characters in tokens",
            )
    secrets = tuple(token for _, token in lines)
    if not secrets:
        raise UsageError(f"the {what} {path} holds no token", "write one token per line into it")
    return AccessTokens(secrets)


def readable_by_others(path: Path) -> bool:
    """Whether users other than the owner can read a file of secrets."""
    return os.name == "posix" and bool(os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH))
