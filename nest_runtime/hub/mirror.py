"""A repository in a folder or under an fsspec URL (``s3://…``, ``file://…``): for machines without the Hub.

The files are those on the Hub (repository.py). A version is the folder ``tags/<version>``, and the root is the newest
one. A plain download of a repository, without ``tags``, is a mirror of that one version. In a folder a push is atomic
(a rename), and a lock keeps two pushers apart. Object stores have neither: let one machine push there. Nothing read
from a mirror is trusted because of where it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nest_runtime.errors import HubError, RepoMissing
from nest_runtime.hub.repository import Refs, size_limit, too_large
from nest_runtime.io import Unfit, atomic_write, open_file, parse_json, sync_folder
from nest_runtime.trust.documents import MAX_DOCUMENT
from nest_runtime.trust.material import MANIFEST_FILE, PATCH_FILE, SIGNATURE_FILE

TAGS = "tags"
ROOT = "main"
LOCK_SECONDS = 30.0
_LOCK = ".nest-mirror.lock"


class MirrorRemote:
    """A repository in a folder or under a URL.

    Args:
        place: an absolute folder, or an fsspec URL.
    """

    def __init__(self, place: str) -> None:
        self.name = place
        self._local = "://" not in place

    def refs(self) -> Refs:
        """A digest over everything on the root that may change, and where each version lies. Raises HubError."""
        with self._errors("reading"):
            fs, root = self._open()
            if not fs.isdir(root):
                raise RepoMissing(f"there is no mirror at {self.name}", "check the path, or push a patch there first")
            tags = {name: f"{TAGS}/{name}" for name in self._names(fs, f"{root}/{TAGS}") if not name.startswith(".")}
            found = hashlib.sha256(json.dumps(sorted(tags)).encode())
            for path in self._changing(fs, root):
                data = self._get(fs, f"{root}/{path}")
                found.update(f"{path} {-1 if data is None else len(data)}\n".encode() + (data or b""))
            if (version := self._root_version(fs, root)) is not None:
                tags.setdefault(version, ROOT)
            return Refs(found.hexdigest(), tags)

    def read(self, path: str, revision: str, limit: int | None = None) -> bytes | None:
        """A file of a version, or of the root for any other revision; None if there is none. Raises HubError."""
        with self._errors(f"reading {path}"):
            fs, root = self._open()
            folder = f"{root}/{revision}" if revision.startswith(f"{TAGS}/") else root
            return self._get(fs, f"{folder}/{path}", size_limit(path) if limit is None else limit)

    def publish(self, files: Mapping[str, bytes], message: str, *, parent: str, tag: str | None = None) -> str:
        """Write a version's folder and then the root. Raises HubError if another was faster, or nothing was written.

        ``message`` is kept nowhere: a mirror has no history.
        """
        with self._errors("writing"), self._alone():
            fs, root = self._open()
            if self.refs().head != parent:
                raise HubError(
                    f"somebody else changed {self.name} meanwhile",
                    "nothing of yours was published; look at what is there now, then push again",
                )
            if tag is not None:
                self._put_version(fs, root, tag, files)
            for path in sorted(files, key=_order):
                self._put(fs, f"{root}/{path}", files[path])
            return f"{TAGS}/{tag}" if tag is not None else self.refs().head

    def create(self, *, private: bool) -> None:
        """Make the folder. A private one is for its owner only, where the file system knows owners."""
        with self._errors("creating"):
            fs, root = self._open()
            if self._local:
                Path(root).mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
            else:
                fs.makedirs(root, exist_ok=True)

    def url(self, revision: str) -> str:
        """Where a revision lies."""
        return f"{self.name}/{revision}" if revision.startswith(f"{TAGS}/") else self.name

    def _open(self) -> tuple[Any, str]:
        import fsspec

        fs, root = fsspec.core.url_to_fs(self.name)
        fs.invalidate_cache()  # somebody else may have pushed
        return fs, str(root).rstrip("/")

    @staticmethod
    def _names(fs: Any, folder: str) -> list[str]:
        try:
            return sorted(str(row).rstrip("/").rsplit("/", 1)[-1] for row in fs.ls(folder, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _changing(self, fs: Any, root: str) -> list[str]:
        channels = [f"channels/{name}" for name in self._names(fs, f"{root}/channels") if not name.startswith(".")]
        return [*channels, "revocations.json", "revocations.sig", MANIFEST_FILE, SIGNATURE_FILE, "README.md"]

    def _root_version(self, fs: Any, root: str) -> str | None:
        """The version at the root by its manifest; an unsigned one says nothing, and is read without a version."""
        data = self._get(fs, f"{root}/{MANIFEST_FILE}")
        try:
            version = parse_json(data)["version"] if data else None
        except (ValueError, KeyError, TypeError):  # a damaged manifest is refused when its patch is read
            return None
        return version if isinstance(version, str) else None

    def _get(self, fs: Any, path: str, limit: int = MAX_DOCUMENT) -> bytes | None:
        try:
            with open_file(path) if self._local else fs.open(path, "rb") as file:
                data = bytes(file.read(limit + 1))
        except Unfit as error:
            if error.errno == errno.EISDIR:
                return None
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        if len(data) > limit:
            raise too_large(path, limit)
        return data

    def _put(self, fs: Any, path: str, data: bytes) -> None:
        if self._local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(Path(path), data)
            return
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with fs.open(path, "wb") as file:
            file.write(data)

    def _put_version(self, fs: Any, root: str, tag: str, files: Mapping[str, bytes]) -> None:
        target = f"{root}/{TAGS}/{tag}"
        taken = HubError(f"{self.name} already has a version {tag}", "give your patch another version")
        if fs.exists(target):
            raise taken
        if not self._local:
            for path in sorted(files, key=_order):
                self._put(fs, f"{target}/{path}", files[path])
            return
        staging = Path(root) / TAGS / f".{tag}.{secrets.token_hex(6)}"
        try:
            for path, data in files.items():
                self._put(fs, f"{staging}/{path}", data)
            os.rename(staging, target)
            sync_folder(staging.parent)
        except FileExistsError as error:
            raise taken from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone already where it was renamed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._local:
            yield
            return
        try:
            with FileLock(Path(self.name) / _LOCK, timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise HubError(f"another process is writing to {self.name}", "try again when it is done") from error

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Whatever a file system raises, as a HubError."""
        try:
            yield
        except HubError:
            raise
        except ImportError as error:
            raise HubError(f"{self.name} cannot be opened: {error}", "install the fsspec driver it needs") from error
        except Exception as error:  # every driver has errors of its own
            text = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise HubError(
                f"{self.name}: {doing} failed: {text:.200}", "check the path, its permissions and the network"
            ) from error


def _order(path: str) -> int:
    """Readers look at the signature last: it is written last, so that a half-written version does not verify."""
    return {PATCH_FILE: 0, MANIFEST_FILE: 1, SIGNATURE_FILE: 3}.get(path, 4 if path.endswith(".sig") else 2)
