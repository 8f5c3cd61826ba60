"""The Hub: its cache on this machine, the user's token, and whether it answers in a bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nest_runtime.doctor.finding import NOTE, OK, PROBLEM, Finding
from nest_runtime.doctor.machine import folder_finding


def cache() -> Finding:
    """The folder where the Hub's client keeps what it fetched."""
    from huggingface_hub import constants

    named = next((name for name in ("HF_HUB_CACHE", "HF_HOME") if os.environ.get(name)), "the default")
    return folder_finding("hub cache", Path(constants.HF_HUB_CACHE), named, "set HF_HOME to a folder of yours")


def token() -> Finding:
    """Whether the user has a token; it is never shown."""
    from huggingface_hub import get_token

    if get_token() is None:
        return Finding(
            "hub token", NOTE, "none: public repositories can be read, nothing published", "to publish: hf auth login"
        )
    whence = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "saved by `hf auth login`"
    return Finding("hub token", OK, f"there is one ({whence})")


def reach(timeout: float) -> Finding:
    """Whether the Hub answers, and accepts the token.

    Args:
        timeout: seconds to wait.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    from nest_runtime.hub.errors import as_nest_error, status_of
    from nest_runtime.hub.huggingface import is_offline, make_api, within

    if is_offline():
        return Finding("hub", NOTE, "not asked: HF_HUB_OFFLINE is set; the cache is used", "unset it to use the Hub")
    endpoint, known = make_api().endpoint, get_token()
    path = "/api/whoami-v2" if known else "/api/models?limit=1"
    began = time.perf_counter()

    def ask() -> str:  # one request, not the client's five: the first answer is the finding
        answer = get_session().get(endpoint + path, headers=build_hf_headers(token=known), timeout=timeout)
        hf_raise_for_status(answer)
        return f", as {answer.json()['name']}" if known else ""

    try:
        who = within(timeout, ask, f"asking {endpoint}", "see whether a proxy or firewall is in the way")
    except Exception as error:
        raised = as_nest_error(error, endpoint, "asking who you are" if known else "asking for one model")
        if status_of(error) in (401, 403):
            return Finding("hub", PROBLEM, raised.message, raised.hint)
        return Finding("hub", NOTE, raised.message, f"{raised.hint}; all that is on this machine works without it")
    return Finding("hub", OK, f"{endpoint} answered in {time.perf_counter() - began:.2f} s{who}")
