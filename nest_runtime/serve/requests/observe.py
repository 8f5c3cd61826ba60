"""What is counted while one request is answered: its tokens, its times, and whether it was refused."""

from __future__ import annotations

import time
from typing import Protocol

from nest_runtime.prompts.refusals import OPENING_CHARS, is_refusal
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.requests.generation import Generation


class TokenCounts(Protocol):
    """Tokens of one request: ``prompt`` and ``completion``."""

    prompt: int
    completion: int


class Watch:
    """Observes one request under one patch, from its admission to its end or its restart.

    Refusals are known by how answers begin (prompts/refusals.py): good enough to see a patch
    that refuses everything or nothing, and no evaluation.
    """

    def __init__(self, metrics: Metrics, generation: Generation) -> None:
        self._metrics = metrics
        self._generation = generation
        self._label = generation.request.pin.label
        self._openings = [""] * generation.request.choices
        self._first: float | None = None
        self._last = 0.0
        self._count = 0

    def tokens(self, count: int) -> None:
        """New tokens have come, of any choice."""
        self._last = time.perf_counter()
        self._count += count
        if self._first is None and count:
            self._first = self._last
            self._metrics.first_token.labels(self._label).observe(self._first - self._generation.started)

    def text(self, index: int, text: str, ended: bool) -> None:
        """New text of one choice, and whether it is its last."""
        if len(self._openings[index]) < OPENING_CHARS:
            self._openings[index] += text
        if ended:
            self._metrics.answers.labels(self._label).inc()
            if is_refusal(self._openings[index]):
                self._metrics.refusals.labels(self._label).inc()

    def replaced(self, outcome: str) -> None:
        """An enforced switch took the request from its patch: ``restarted`` or ``ended``."""
        self._metrics.replaced.labels(self._label, outcome).inc()

    def finish(self, usage: TokenCounts) -> None:
        """The request is over, or begins again; tokens count where they were computed."""
        self._metrics.tokens.labels("prompt", self._label).inc(usage.prompt)
        self._metrics.tokens.labels("completion", self._label).inc(usage.completion)
        steps = self._count / self._generation.request.choices - 1  # choices advance side by side
        if self._first is not None and steps > 0:
            self._metrics.per_token.labels(self._label).observe((self._last - self._first) / steps)
