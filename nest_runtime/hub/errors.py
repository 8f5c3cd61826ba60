"""The Hub client's many exceptions as our few, each with what was requested and what to do.

Also says which of them may pass by themselves, and how long the Hub asks to wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nest_runtime.errors import HubError, NestError, RepoMissing

NETWORK_HINT = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then try again"
XET_HINT = f"{NETWORK_HINT}; HF_HUB_DISABLE_XET=1 does without Xet"
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
_XET_WORDS = ("xet", "cas client", "file reconstruction")  # hf_xet raises built-in exceptions, known by their text


def as_nest_error(error: Exception, repo: str, doing: str) -> NestError:
    """The error to raise for one that the client raised.

    Args:
        error: what came out of huggingface_hub or what lies below it.
        repo: ``org/name``.
        doing: what was being done, as in "reading patch.safetensors".
    """
    from huggingface_hub import errors as hub

    if isinstance(error, NestError):
        return error
    for cause in causes(error):
        if isinstance(cause, hub.GatedRepoError):
            return HubError(f"{repo} is gated", "ask for access on its page, then `hf auth login`")
        if isinstance(cause, hub.RepositoryNotFoundError):
            return RepoMissing(
                f"the Hub has no repository {repo} that you may read",
                "check the name; for a private one run `hf auth login`",
            )
        if isinstance(cause, hub.RevisionNotFoundError):
            return HubError(f"{repo} has no such revision ({doing})", "see its versions on the Hub")
        if isinstance(cause, hub.OfflineModeIsEnabled):
            return _offline(repo)
        status = status_of(cause) or _xet_status(cause)
        if status is not None:
            return _of_status(status, cause, repo, doing)
    if isinstance(error, hub.LocalEntryNotFoundError):
        if error.__cause__ is None:
            return _offline(repo)
        error = next(reversed(list(causes(error))), error)  # type: ignore[assignment]
    if isinstance(error, KeyError | TypeError | ValueError) and not isinstance(error, OSError):
        return HubError(f"{repo}: the Hub's answer while {doing} cannot be read: {first_line(error)}", NETWORK_HINT)
    hint = XET_HINT if any(word in str(error).lower() for word in _XET_WORDS) else NETWORK_HINT
    return HubError(f"{repo} could not be reached while {doing}: {first_line(error)}", hint)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment, and the client has not tried it often enough itself."""
    import httpx2
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # five HEAD requests have failed by then
        return False
    passing = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    for cause in causes(error):
        if (status := status_of(cause)) is not None:
            return status in _TRANSIENT
        if isinstance(cause, passing):
            return True
    return False


def is_conflict(error: BaseException) -> bool:
    """Whether somebody else changed the repository meanwhile (409, 412)."""
    return any(status_of(cause) in (409, 412) for cause in causes(error))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, where it does."""
    for cause in causes(error):
        value = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
        if value.strip().isdigit():
            return float(value)
    return None


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _xet_status(error: BaseException) -> int | None:
    """The HTTP status that hf_xet met. It has tried again by itself, so ``is_transient`` does not ask."""
    found = _XET_STATUS.search(str(error))
    return int(found[1]) if found else None


def only_reads(doing: str) -> bool:
    """Whether a step, as named for messages, changes nothing in the repository."""
    return doing.startswith(("reading", "asking"))


def request_path(error: BaseException) -> str:
    """The path of the request that failed, or nothing."""
    for cause in causes(error):
        try:
            return str(cause.request.url.path)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # it has none, or none was set
            continue
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.200}" if lines else type(error).__name__


def _of_status(status: int, error: BaseException, repo: str, doing: str) -> HubError:
    server = getattr(getattr(error, "response", None), "headers", {}).get("X-Error-Message") or ""
    said = f" ({server:.160})" if server else ""
    if status == 401:
        return HubError(
            f"the Hub does not accept your token for {repo} while {doing}: 401{said}",
            "run `hf auth login`, or set HF_TOKEN to a valid token",
        )
    if status == 403:
        allow = "read" if only_reads(doing) else "write"
        return HubError(
            f"your token may not do this with {repo} while {doing}: 403{said}",
            f"use a token with {allow} permission, or ask the repository's owner",
        )
    if status == 404:
        return HubError(f"{repo}: not found while {doing}: 404{said}", "check the name and HF_ENDPOINT")
    if status in (409, 412):
        hint = "look at what is there now, then push again"
        if only_reads(doing):
            hint = "try again"
        elif doing.startswith("committing"):
            hint = f"nothing of yours was published; {hint}"
        return HubError(f"somebody else changed {repo} while {doing}: {status}{said}", hint)
    if status == 429:
        wait = retry_after(error)
        when = f"; it asks to wait {wait:.0f} s" if wait else ""
        return HubError(f"the Hub limits your requests to {repo} while {doing}: 429{when}", "wait, then try again")
    if status >= 500:
        return HubError(f"the Hub is out of order for {repo} while {doing}: {status}{said}", "try again later")
    return HubError(f"the Hub refused {repo} while {doing}: {status}{said} {first_line(error)}", NETWORK_HINT)


def _offline(repo: str) -> HubError:
    return HubError(
        f"{repo} is not in the cache as asked for, and the Hub cannot be asked",
        "check the network, HF_HUB_OFFLINE and HF_ENDPOINT",
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__, seen + 1
