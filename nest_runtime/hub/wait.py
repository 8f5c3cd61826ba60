"""Waiting for the Hub with a limit: its client has no timeout on most requests, and none on slow bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from nest_runtime.errors import HubError

_T = TypeVar("_T")


class Patience:
    """Makes calls in a thread, one after the other, and gives them up in time.

    A call that was given up continues in its thread, which does not keep the process alive. What it fetches ends up
    whole in the cache; what it sends may still arrive. The next call waits for it, so there is never more than one,
    however long the Hub hangs. Calls within a call are part of it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def call(
        self, seconds: float, call: Callable[[], _T], what: str, hint: str = "", last: Callable[[], str] = str
    ) -> _T:
        """The result of a call.

        Args:
            seconds: how long it may take.
            call: the call; what it raises is raised here.
            what: the repository and what is being done, for the message.
            hint: what to do where it takes longer.
            last: what is known of why it does.

        Raises:
            HubError: it takes longer, or an earlier one still has no end after that time.
        """
        if self._thread is threading.current_thread():
            return call()
        results: list[_T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:  # handed to the caller's thread, whatever it is
                errors.append(error)

        hint = hint or "the Hub is slow or asks to wait; try again later, or allow more time with --timeout"
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(seconds)
            if self._thread.is_alive():
                raise HubError(f"{what} cannot begin: an earlier request has had no answer for long", hint)
        self._thread = threading.Thread(target=run, daemon=True, name="nest-hub")
        self._thread.start()
        self._thread.join(seconds)
        if errors:
            raise errors[0]
        if not results:
            raise HubError(f"{what} took longer than {seconds:.0f} s{last()}", hint)
        return results[0]


def within(seconds: float, call: Callable[[], _T], what: str, hint: str = "") -> _T:
    """The result of a single call; see :class:`Patience`."""
    return Patience().call(seconds, call, what, hint)
