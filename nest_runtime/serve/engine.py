"""Engines as the rest of the server sees them: what the routes, the table of patches and the metrics ask of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from nest_runtime.serve.served_patch import ServedPatch

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.serve.requests.generation import ChoiceTokens, EngineRequest, Generation


class PatchHolder(Protocol):
    """The holder of the loaded patches: PatchRuntime, or an engine's own."""

    def add(self, patch: Patch, *, pause: Callable[[], AbstractContextManager[Any]] = ...) -> str:
        """Check a patch and add it, without activating it."""

    def remove(self, version: str) -> None:
        """Remove a patch, by its digest."""


class EngineControl(Protocol):
    """What the table asks of the engine."""

    def pause(self) -> AbstractContextManager[Any]:
        """A context in which no step runs."""

    def hold(self) -> AbstractContextManager[Any]:
        """A context in which steps run, and the engine does not fold or unfold."""

    def unfold(self) -> None:
        """Take a folded patch out of the weights; only inside ``pause``."""

    def enforce(self, pin: ServedPatch) -> int:
        """Replace the patch of requests in flight that follow the active one; returns how many."""


class Reply(Protocol):
    """The answer to one admitted piece of work."""

    def events(self) -> AsyncIterator[ChoiceTokens]:
        """New tokens, choice by choice, until every choice has ended. Raises EngineError."""

    def cancel(self) -> None:
        """Stop what still runs; safe at any time, any number of times."""


class Engine(EngineControl, Protocol):
    """What the server asks of every engine: transformers' (paged or plain batches), and vLLM's."""

    @property
    def alive(self) -> bool:
        """Whether it answers."""

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down."""

    @property
    def live(self) -> int:
        """Sequences running or waiting."""

    @property
    def waiting(self) -> int:
        """Sequences beyond what runs at once."""

    @property
    def capacity(self) -> int:
        """Sequences that may run or wait; more are refused."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    @property
    def folded(self) -> bool:
        """Whether a patch is folded into the weights."""

    @property
    def failed_passes(self) -> int:
        """Passes that raised, or gave values that are not finite."""

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were not computed again."""

    def admit(self, request: EngineRequest) -> Reply:
        """Admit work.

        Raises:
            QueueFull: too much waits already.
            Draining: the server is shutting down.
            EngineError: the engine is dead.
        """

    def in_flight(self) -> Counter[str]:
        """Sequences running or waiting, by the label of the patch that answers them."""

    def keys_in_use(self) -> set[str | None]:
        """Keys of the patches that sequences are answered under, or wait for."""

    async def start(self) -> None:
        """Start the engine, and check that it computes correctly. Raises EngineError if it does not."""

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more work, wait for what is in flight, and end."""


class TokenEngine(Engine, Protocol):
    """An engine behind our own OpenAI routes, which hand it token ids and read token ids (http/answering.py)."""

    @property
    def rows(self) -> int:
        """Token ids that the model knows."""

    def admit(self, request: EngineRequest) -> Generation:
        """Admit work, as every engine does; its request can also be replaced, and its choices ended one by one."""


class NoEngine:
    """The engine before it runs: there is nothing to wait for."""

    def pause(self) -> AbstractContextManager[Any]:
        """A context that does nothing: no step runs anyway."""
        return nullcontext()

    hold = pause

    def unfold(self) -> None:
        """Do nothing: nothing is folded."""
        pass

    def enforce(self, pin: ServedPatch) -> int:
        """Replace nothing: no request is in flight. Returns 0."""
        return 0
