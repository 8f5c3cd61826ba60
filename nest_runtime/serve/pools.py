"""Threads for one kind of work each, so that no kind waits for another: fetching, verifying, switching, tokenizing.

The threads keep no process alive. What hangs in one, on a dead disk or a silent Hub, hangs there alone, and the
server can still stop.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

IDLE_SECONDS = 5.0  # after which a thread without work ends

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """Threads that start when there is work, and end when there is none.

    Args:
        name: of the threads.
        threads: how many calls run at once; more wait for them.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._most = threads
        self._ready = threading.Condition()
        self._jobs: deque[tuple[Future[Any], contextvars.Context, Callable[[], Any]]] = deque()
        self._threads = 0
        self._idle = 0

    async def run(self, call: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T:
        """What a call gives, or raises, made in one of the threads. Canceling it leaves the call running."""
        future: Future[T] = Future()
        with self._ready:
            self._jobs.append((future, contextvars.copy_context(), partial(call, *arguments, **more)))
            if len(self._jobs) > self._idle and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._run_jobs, name=f"nest-{self._name}", daemon=True).start()
            self._ready.notify()
        return await asyncio.wrap_future(future)

    def _run_jobs(self) -> None:
        while True:
            with self._ready:
                self._idle += 1
                found = self._ready.wait_for(lambda: bool(self._jobs), IDLE_SECONDS)
                self._idle -= 1
                if not found:
                    self._threads -= 1
                    return
                future, context, call = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = context.run(call)
            except BaseException as error:  # handed to whoever waits for it, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, context, call


def apart(name: str, call: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T:
    """What a call gives, or raises, made in a thread that ends with it.

    For whatever computes before or beside the engine: OpenMP keeps helpers for every thread that ever computed. With
    more of them than cores, GNU's puts those of the engine to sleep between any two operations, and each wakes late.

    Args:
        name: of the thread.
        call: what to call, with its arguments.
    """
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(call, *arguments, **more))
        except BaseException as error:  # handed to whoever waits for it, whatever it is
            future.set_exception(error)

    thread = threading.Thread(target=run, name=f"nest-{name}", daemon=True)
    thread.start()
    thread.join()
    return future.result()


class _Homed(Protocol):
    home: asyncio.AbstractEventLoop | None


S = TypeVar("S", bound=_Homed)


def at_home(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """A coroutine method that always runs on the event loop that its object calls ``home``, wherever it is awaited."""

    @wraps(method)
    async def there(self: S, *arguments: P.args, **more: P.kwargs) -> T:
        if self.home is None or self.home is asyncio.get_running_loop():
            return await method(self, *arguments, **more)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(method(self, *arguments, **more), self.home))

    return there
