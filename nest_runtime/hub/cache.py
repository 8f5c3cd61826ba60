"""The Hub client's cache: a file counts only if its bytes have the hash that the Hub names for it.

The client compares only sizes, for Xet too, and anyone who can write to a cache can change it. huggingface.py fetches.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from pathlib import Path

from nest_runtime.errors import DigestMismatch, HubError
from nest_runtime.hub.errors import first_line
from nest_runtime.hub.repository import too_large
from nest_runtime.io import Unfit, read_bytes

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


def checked(path: Path, what: str, limit: int) -> bytes:
    """A cached file's bytes, against the hash that the Hub names for it: SHA-256 for large files, git's for others.

    That hash is what the client calls the file's blob in the repository's own cache. A blob that came over Xet is
    itself a link, into a store shared by all repositories, where Xet's hash is the name: that one is not asked.
    """
    places = _links(path)
    try:
        data = read_bytes(path, limit)
    except Unfit as error:
        if error.errno == errno.EFBIG:
            raise too_large(what, limit) from error
        raise HubError(f"{what} is no file in the cache: {error.strerror}", "see HF_HOME") from error
    except OSError as error:
        raise HubError(
            f"{what} cannot be read from the cache: {first_line(error)}", "free some space; see HF_HOME"
        ) from error
    wanted = places[1].name if len(places) > 1 else ""
    if _SHA256.fullmatch(wanted):
        good = hashlib.sha256(data).hexdigest() == wanted
    elif _SHA1.fullmatch(wanted):
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        good = wanted in (git, hashlib.sha1(data, usedforsecurity=False).hexdigest())
    else:  # a proxy's own ETag, or a cache without links: the signature and the patch's digest still stand
        return data
    if not good:
        for item in places:
            with contextlib.suppress(OSError):
                item.unlink()
        raise DigestMismatch(
            f"{what}: its {len(data)} bytes are not those that the Hub names ({wanted[:16]}…)",
            "they were damaged on the way, or changed in the cache, and are removed now: fetch it again",
        )
    return data


def _links(path: Path) -> list[Path]:
    """A path and what it links to, one link at a time; the last is the file itself."""
    places = [path]
    while places[-1].is_symlink() and len(places) < 8:
        places.append(places[-1].parent / places[-1].readlink())
    return places


def known_missing(repo_id: str, path: str, revision: str) -> bool:
    """Whether the cache remembers that a commit has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo_id, path, revision=revision) is _CACHED_NO_EXIST
