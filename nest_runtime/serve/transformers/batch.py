"""What the engine asks of a batch: the thread that computes (continuous.py, plain.py)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from nest_runtime.serve.requests.jobs import Job
from nest_runtime.serve.transformers.auto_fold import AutoFold


class EngineBatch(Protocol):
    """A thread that works on jobs, and delivers their tokens.

    Attributes:
        auto_fold: what it folds into the weights while everybody is under one patch.
        failed_passes, reused_tokens: counters, see serve/engine.py.
    """

    auto_fold: AutoFold

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""

    @property
    def fault(self) -> str | None:
        """What the thread died of."""

    @property
    def jobs(self) -> int:
        """Sequences that the thread still holds."""

    @property
    def failed_passes(self) -> int:
        """Passes that failed."""

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were not computed again."""

    def start(self) -> None:
        """Start the thread."""

    def stop(self, timeout: float = 10.0) -> None:
        """End it."""

    def submit(self, job: Job) -> None:
        """Work on a job."""

    def cancel(self, job_id: str) -> None:
        """Stop working on a job."""

    def pause(self) -> AbstractContextManager[None]:
        """A context in which no step runs."""

    def narrow(self, tokens: int) -> AbstractContextManager[None]:
        """A context in which a pass takes no more than ``tokens`` tokens, where prompts are read in pieces at all."""

    def beside(self) -> AbstractContextManager[None]:
        """A context in which the model may be called from another thread."""

    def keys_in_use(self) -> set[str | None]:
        """Runtime keys of the patches that it may still compute under."""
