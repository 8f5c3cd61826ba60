"""Messages between the event loop and an engine's thread: jobs one way, deliveries the other.

Every kind of batch (transformers/continuous.py, transformers/plain.py) takes these jobs and gives these deliveries.
Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nest_runtime.errors import EngineError
from nest_runtime.serve.requests.sampling import Odds, Sampler


@dataclass
class Job:
    """One sequence to generate.

    Attributes:
        id: unique in this engine.
        prompt: token ids, at least one.
        max_new_tokens: at least one.
        eos: token ids that end the answer.
        patch: the runtime's key of the patch to answer under, or None for the bare base.
        sampler: its settings and dice.
        kept: whether it goes before the clients'.
    """

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    eos: Sequence[int]
    patch: str | None
    sampler: Sampler
    kept: bool = False
    delivered: int = field(default=0, init=False)
    canceled: bool = field(default=False, init=False)
    arrived: bool = field(default=False, init=False)  # the engine's thread has taken it in


@dataclass(frozen=True)
class Delivery:
    """What one step brought for one job: new tokens, with their odds if they are wanted, or its end, or an error."""

    job: str
    tokens: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None
    odds: tuple[Odds, ...] = ()


@dataclass(frozen=True)
class Blame:
    """A job that failed a pass all by itself.

    Attributes:
        job: its id.
        patch: the key of the patch to blame; None if it ran on the base, or the base gives no finite values for the
            same tokens either.
        finite: False if the pass gave values that are not finite; True if it raised something else.
        reason: what came of it.
    """

    job: str
    patch: str | None
    finite: bool
    reason: str


def dead(fault: str | None) -> EngineError:
    """The error of an engine whose thread is gone."""
    return EngineError(
        f"the engine has stopped{f': {fault}' if fault else ''}", "restart the server; its log has the traceback"
    )
