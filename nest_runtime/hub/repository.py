"""What a repository of patches is, wherever it is stored: its layout, how it is named, and what can be read and
    written.

    patch.safetensors, manifest.json, patch.sig     the newest version, and its signature
    README.md                                       the card; not signed: the Hub changes it
    channels/stable.json + .sig                     which version a channel names
    revocations.json + .sig                         what must not be active any more

On the Hub each version is a commit with a tag of the version's name. In a folder or under an fsspec URL (a mirror) it
is a folder ``tags/<version>`` of the same files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nest_runtime.errors import HubError, UsageError
from nest_runtime.io import expand
from nest_runtime.trust.documents import MAX_DOCUMENT
from nest_runtime.trust.material import PATCH_FILE

CARD_FILE = "README.md"
HUB = "hf://"
MAX_PATCH = 1 << 30  # bytes; as in patch/file.py, which needs torch
LATEST = "main"  # the newest version
USUAL_CHANNELS = ("stable", "canary", "beta")
_ID = r"[\w.-]+/[\w.-]+"
_REVISION = r"[A-Za-z0-9][\w./+-]*"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}"
_VERSION = re.compile(r"v?\d.*")
_HUB_REF = re.compile(rf"(hf://)?(?P<repo>{_ID})((@(?P<name>{_NAME}))?@(?P<revision>{_REVISION}))?")
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://.+")
_SUFFIX = re.compile(rf"(?P<place>.+)@(?P<revision>{_REVISION})")
_NAMED = re.compile(rf"(?P<place>.+)@(?P<name>{_NAME})")


@dataclass(frozen=True)
class RepoRef:
    """A repository and what is wanted of it.

    Attributes:
        place: ``hf://org/name``, an absolute folder, or an fsspec URL.
        revision: a version, a channel, a commit, or None.
        name: what the patch must be called; None for whatever this machine knows the place to hold.
    """

    place: str
    revision: str | None = None
    name: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether it is a repository of the Hub rather than a mirror."""
        return self.place.startswith(HUB)

    @property
    def repo_id(self) -> str:
        """``org/name`` of a repository on the Hub."""
        return self.place.removeprefix(HUB)

    def __str__(self) -> str:
        return "@".join(part for part in (self.place, self.name, self.revision) if part)


@dataclass(frozen=True)
class Refs:
    """The state of a repository.

    Attributes:
        head: what changes whenever anything on main does: the commit's sha, or a digest of a mirror's files.
        tags: version → revision to read it at.
    """

    head: str
    tags: Mapping[str, str] = field(default_factory=dict)


class Remote(Protocol):
    """A repository that can be read and written. Every error is a NestError; nothing waits without bound."""

    name: str

    def refs(self) -> Refs:
        """The state of the repository; one request."""

    def read(self, path: str, revision: str, limit: int | None = None) -> bytes | None:
        """A file's content, or None if there is no such file.

        Raises:
            HubError: there are more bytes than ``limit`` (by default what a file of that name may have); none has come.
        """

    def publish(self, files: Mapping[str, bytes], message: str, *, parent: str, tag: str | None = None) -> str:
        """Replace files on main in one step and tag the result; returns the revision. ``parent``: the expected head."""

    def create(self, *, private: bool) -> None:
        """Make the repository, if there is none."""

    def url(self, revision: str) -> str:
        """Where people can look at a revision."""


def size_limit(path: str) -> int:
    """How many bytes a repository's file may have, where nothing more is known."""
    return MAX_PATCH if path == PATCH_FILE else MAX_DOCUMENT


def too_large(where: str, limit: int) -> HubError:
    """The error for a file that goes beyond its limit."""
    return HubError(f"{where} has more than the {limit} bytes it may have", "ask its publisher what this is")


def parse_repo(text: str) -> RepoRef:
    """The repository that a text names: ``org/name``, ``hf://org/name``, a folder or an fsspec URL.

    ``@revision`` may follow, or ``@name@revision`` with the name that the patch must have. A folder starts with
    ``/``, ``.`` or ``~``; ``org/name`` is always the Hub's. Raises UsageError.
    """
    found = _HUB_REF.fullmatch(text)
    if found and not text.startswith("."):
        return RepoRef(HUB + found["repo"], found["revision"], found["name"])
    if text.startswith(HUB):
        raise UsageError(
            f"{text!r} is no Hub reference; expected hf://org/repo or hf://org/repo@v3", "check it for typos"
        )
    split = _SUFFIX.fullmatch(text)
    place, revision = (split["place"], split["revision"]) if split and "/" not in split["revision"] else (text, None)
    place = place.removeprefix("file://") if place.startswith("file:///") else place
    named = _NAMED.fullmatch(place) if revision is not None and not os.path.isdir(expand(place)) else None
    place, name = (named["place"], named["name"]) if named else (place, None)
    if _URL.fullmatch(place):
        return RepoRef(place.rstrip("/"), revision, name)
    if place.startswith((".", "~", os.sep)) or os.path.isabs(place):
        return RepoRef(str(expand(place).absolute()), revision, name)
    raise UsageError(
        f"{text!r} names no repository; expected org/name, a folder such as ./mirror, or a URL",
        "for a folder write ./name",
    )


def may_be_channel(name: str) -> bool:
    """Whether a revision's name can be a channel's: versions begin with a digit, with ``v`` before it or not."""
    return _VERSION.fullmatch(name) is None
