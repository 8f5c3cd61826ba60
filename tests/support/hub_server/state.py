"""Repositories in memory: commits are whole trees, branches and tags point at commits."""

from __future__ import annotations

import hashlib
import itertools
import threading
from dataclasses import dataclass, field

MAIN = "main"


@dataclass(frozen=True)
class Blob:
    """A file in a commit. ``content`` is None for one that only the Xet store holds."""

    content: bytes | None
    size: int
    lfs: str = ""  # SHA-256 in hex, where it is an LFS file
    xet: str = ""  # Xet hash, where it is in the Xet store

    @classmethod
    def inline(cls, content: bytes) -> Blob:
        return cls(content, len(content))

    @property
    def oid(self) -> str:
        """The git object's id; of an LFS file that of its pointer, more or less."""
        data = self.content if not self.lfs else f"pointer {self.lfs}".encode()
        assert data is not None
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.lfs or self.oid


@dataclass
class Repo:
    """One model repository.

    Attributes:
        id: ``org/name``.
        private, gated: only tokens named in ``readers`` get in.
        readers: users who may read it.
        writers: users who may write.
        commits: sha → path → file.
        heads: branch → sha.
        tags: tag → sha.
    """

    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # (sha, message), oldest first

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or (short) sha names."""
        for names in (self.heads, self.tags):
            if revision in names:
                return names[revision]
        if len(revision) >= 7:
            return next((sha for sha in self.commits if sha.startswith(revision)), None)
        return None

    def commit(self, tree: dict[str, Blob], message: str, branch: str = MAIN) -> str:
        """Put a tree on top of a branch; gives the new commit's sha."""
        text = f"{self.id} {self.heads.get(branch)} {message} {next(_COUNTER)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(tree)
        self.heads[branch] = sha
        self.log.append((sha, message))
        return sha

    @property
    def tree(self) -> dict[str, Blob]:
        """The files on main."""
        return self.commits[self.heads[MAIN]]


class State:
    """Everything the server knows. Change it under ``lock``.

    Attributes:
        tokens: token → user.
        read_only: tokens that may not write.
        repos: id → repository.
        objects: LFS oid → content, uploaded and perhaps not committed yet.
        parts: multipart uploads under way: oid → part number → content.
        mode: how files go up: "lfs", "multipart" or "xet".
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tokens: dict[str, str] = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "alice"}
        self.read_only: set[str] = {"hf_reader"}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.mode = "lfs"

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False, owner: str = "alice") -> Repo:
        """A new repository with a first commit, as the Hub makes it."""
        repo = Repo(repo_id, private, gated, {owner}, {owner})
        attributes = Blob.inline(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo.commit({".gitattributes": attributes}, "initial commit")
        self.repos[repo_id] = repo
        return repo


_COUNTER = itertools.count()
