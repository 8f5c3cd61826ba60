"""The engine as the table of patches sees it: whoever computes on the same model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from nest_runtime.serve.served_patch import Served

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch


class Holder(Protocol):
    """Whoever holds the loaded patches: PatchRuntime, or an engine of its own kind."""

    def add(self, patch: Patch, *, pause: Callable[[], AbstractContextManager[Any]] = ...) -> str:
        """Check a patch and take it in, switching nothing on."""

    def remove(self, version: str) -> None:
        """Forget a patch, by its digest."""


class Steps(Protocol):
    """What the table asks of the engine."""

    def pause(self) -> AbstractContextManager[Any]:
        """A context in which no step runs."""

    def hold(self) -> AbstractContextManager[Any]:
        """A context in which steps run, and the engine leaves the runtime alone."""

    def unfold(self) -> None:
        """Take a patch that is folded into the weights out of them; only inside ``pause``."""

    def enforce(self, pin: Served) -> int:
        """Replace the patch of requests in flight that follow the active one; gives how many."""


class NoSteps:
    """The engine before it runs: there is nothing to wait for."""

    def pause(self) -> AbstractContextManager[Any]:
        return nullcontext()

    hold = pause

    def unfold(self) -> None:
        pass

    def enforce(self, pin: Served) -> int:
        return 0
