"""One repository on the Hub, through huggingface_hub alone.

Adds what the client lacks: retries where it has none, a limit on every wait (it has no timeout on most requests and
obeys any Retry-After), and a check of every file's content (cache.py). Tokens, proxies, HF_ENDPOINT, HF_HUB_OFFLINE,
the cache and Xet are the client's own. fetch.py decides what the files mean.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nest_runtime import __version__
from nest_runtime.errors import DigestMismatch, HubError
from nest_runtime.hub.cache import checked, known_missing
from nest_runtime.hub.errors import (
    as_nest_error,
    causes,
    first_line,
    is_conflict,
    is_transient,
    only_reads,
    request_path,
    retry_after,
    status_of,
)
from nest_runtime.hub.repository import Refs, size_limit, too_large
from nest_runtime.hub.wait import Patience, within

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from tenacity import RetryCallState

__all__ = ["DEFAULT_TIMEOUT", "HubRemote", "is_offline", "make_api", "within"]

DEFAULT_TIMEOUT = 120.0  # seconds for one step
ATTEMPTS = 4
MAIN = "main"

_SENT = "it may have arrived all the same: the same command again finds out; --timeout allows more time"
_SHA = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubSession:
    """The user of the connections, and a listener for each step, if not this process's own; see ``hub_session``."""

    token: str | None = None
    on_step: Callable[[str], None] = lambda step: None


_ALONE = HubSession()
_session: ContextVar[HubSession] = ContextVar("nest_runtime_hub_session", default=_ALONE)


class HubRemote:
    """A model repository on the Hub.

    Args:
        repo_id: ``org/name``.
        timeout: seconds that one step may take, retries included.
        api: another client; by default one for ``HF_ENDPOINT`` with the user's own token.
    """

    def __init__(self, repo_id: str, *, timeout: float = DEFAULT_TIMEOUT, api: HfApi | None = None) -> None:
        self.name = repo_id
        self.timeout = timeout
        self._api = api or make_api()
        self._patience = Patience()
        self._on_step = _session.get().on_step

    def refs(self) -> Refs:
        """The commit of main, and of every tag; one request. Raises HubError."""

        def ask() -> Refs:
            found = self._api.list_repo_refs(self.name)
            heads = {branch.name: branch.target_commit for branch in found.branches}
            return Refs(heads.get(MAIN, MAIN), {tag.name: tag.target_commit for tag in found.tags})

        return self._call("asking for its versions", ask)

    def read(self, path: str, revision: str, limit: int | None = None) -> bytes | None:
        """A file at a commit, from the cache where it is there; its content is checked either way.

        Raises:
            HubError: it cannot be had, or is larger than it may be.
            DigestMismatch: the bytes are not those that the Hub names; they are removed from the cache.
        """
        from huggingface_hub import errors as hub

        where, limit = f"{self.name}: {path}", size_limit(path) if limit is None else limit

        def fetch() -> Path | None:
            """Download the file; None if the repository has none."""
            bar = _bounded(where, limit, time.monotonic() + self.timeout)
            try:
                return Path(self._api.hf_hub_download(self.name, path, revision=revision, tqdm_class=bar))
            except hub.RemoteEntryNotFoundError:
                return None
            except hub.LocalEntryNotFoundError:
                if is_offline() and known_missing(self.name, path, revision):
                    return None
                raise

        found = self._call(f"reading {path}", fetch, _read_again)
        return None if found is None else checked(found, where, limit)

    def publish(self, files: Mapping[str, bytes], message: str, *, parent: str, tag: str | None = None) -> str:
        """One commit on top of ``parent``, and one tag; returns the commit's sha. Without files ``parent`` is tagged.

        An answer that got lost is looked for in the repository before anything is tried again.

        Raises:
            HubError: nothing was published, or (as the message then says) a commit without its tag.
        """
        sha = self._commit(files, message, parent) if files else parent
        if tag is not None:
            self._tag(tag, sha)
        return sha

    def create(self, *, private: bool) -> None:
        """Make the repository, if there is none. Raises HubError."""
        self._call(
            "creating it", lambda: self._api.create_repo(self.name, private=private, exist_ok=True, repo_type="model")
        )

    def url(self, revision: str) -> str:
        """The page of a revision."""
        return f"{self._api.endpoint}/{self.name}/tree/{revision}"

    def _commit(self, files: Mapping[str, bytes], message: str, parent: str) -> str:
        def once() -> str:
            """Commit; where another came first or the line broke, look whether it has landed."""
            from huggingface_hub import CommitOperationAdd

            operations = [CommitOperationAdd(path, data) for path, data in files.items()]
            expected = parent if _SHA.fullmatch(parent) else None
            try:
                with _no_bars():
                    commit = self._api.create_commit(
                        self.name, operations, commit_message=message, parent_commit=expected, num_threads=1
                    )
                return str(commit.oid)
            except Exception as error:
                if not is_conflict(error) and not is_transient(error):
                    raise
                landed = self._landed(files, parent)
                if landed is None:
                    raise
                return landed

        return self._call("committing", once, lambda error: is_transient(error) and _not_retried_yet(error))

    def _landed(self, files: Mapping[str, bytes], parent: str) -> str | None:
        """The head, where it holds exactly what we meant to commit: our answer got lost on its way back."""
        with contextlib.suppress(HubError, DigestMismatch):  # the caller raises the first error, which says more
            head = self.refs().head
            if head != parent and all(self.read(path, head) == data for path, data in files.items()):
                return head
        return None

    def _tag(self, tag: str, sha: str) -> None:
        def once() -> None:
            """Make the tag; one that is there for this very commit will do."""
            try:
                self._api.create_tag(self.name, tag=tag, revision=sha)
            except Exception as error:
                if not is_conflict(error) and not is_transient(error):
                    raise
                now = self.refs().tags.get(tag)
                if now == sha:
                    return
                if now is not None:
                    raise HubError(
                        f"{self.name} already has a tag {tag}, at {now[:12]}; the commit {sha[:12]} stays without one",
                        "somebody else published this version: look at it, and give yours another version",
                    ) from error
                raise

        self._call(f"tagging {sha[:12]} as {tag} (the commit is there; push again to tag it)", once)

    def _call(self, doing: str, call: Callable[[], _T], again: Callable[[BaseException], bool] = is_transient) -> _T:
        """Do one step, and again after errors that ``again`` lets pass, within the time allowed. Raises NestError."""
        from tenacity import Retrying, retry_if_exception, stop_after_attempt

        self._on_step(doing)
        until, last = time.monotonic() + self.timeout, ""

        def passes(error: BaseException) -> bool:
            nonlocal last
            last = f"; the last try: {first_line(list(causes(error))[-1])}"
            return again(error) and _wait_of(error, 0.0) < until - time.monotonic()

        retrying = Retrying(
            retry=retry_if_exception(passes),
            stop=stop_after_attempt(ATTEMPTS),
            wait=_wait,
            reraise=True,
        )
        hint = "" if only_reads(doing) else _SENT
        try:
            return self._patience.call(
                self.timeout, lambda: retrying(call), f"{self.name}: {doing}", hint, last=lambda: last
            )
        except Exception as error:
            raised = as_nest_error(error, self.name, doing)
            if raised is error:
                raise
            raise raised from error


def make_api() -> HfApi:
    """A client for ``HF_ENDPOINT``, which the client itself reads only when it is imported."""
    from huggingface_hub import HfApi

    return HfApi(
        endpoint=os.environ.get("HF_ENDPOINT") or None,
        token=_session.get().token,
        library_name="nest-runtime",
        library_version=__version__,
    )


@contextlib.contextmanager
def hub_session(token: str | None = None, on_step: Callable[[str], None] = lambda step: None) -> Iterator[None]:
    """Connections made in this context use a token of their own, and say what they are doing.

    Args:
        token: instead of the one of this process's user; None leaves that.
        on_step: called with each step's name, before it.
    """
    reset = _session.set(HubSession(token or None, on_step))
    try:
        yield
    finally:
        _session.reset(reset)


def is_offline() -> bool:
    """Whether the client was told not to ask the Hub (``HF_HUB_OFFLINE``)."""
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def _not_retried_yet(error: BaseException) -> bool:
    """Whether an error comes from one of the two requests of a commit that the client does not repeat itself."""
    path = request_path(error)
    return "/commit/" in path or path.endswith("/validate-yaml")


def _read_again(error: BaseException) -> bool:
    """Whether reading a file failed in a way that the client does not repeat itself: not by a limit, nor by Xet."""
    if not is_transient(error) or "/xet-" in request_path(error):
        return False
    return all(status_of(cause) not in (408, 429) for cause in causes(error))


def _wait_of(error: BaseException, otherwise: float) -> float:
    asked = retry_after(error)
    return otherwise if asked is None else asked


def _wait(state: RetryCallState) -> float:
    """What the Hub asks for, else 0.5, 1, 2 seconds."""
    error = state.outcome.exception() if state.outcome else None
    doubled = 0.5 * 2.0 ** (state.attempt_number - 1)
    return doubled if error is None else _wait_of(error, doubled)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the client's upload bars, which cannot be replaced, off stderr."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _bounded(where: str, limit: int, until: float) -> Any:
    """A progress bar that shows nothing, for libraries do not print, and ends a download that is too large or too slow.

    The client asks for a file's size before it fetches it, and tells it to its bar only.
    """
    from huggingface_hub.utils import tqdm

    class Bounded(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.seen = kwargs.get("initial") or 0
            self._check(kwargs.get("total") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += n or 0
            self._check(self.seen)
            return super().update(n)

        def _check(self, size: float) -> None:
            if size > limit:
                raise too_large(where, limit)
            if time.monotonic() > until:  # nobody waits for it any more
                raise HubError(f"{where} came too slowly", "try again later")

    return Bounded
