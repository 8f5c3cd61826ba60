"""Which jobs the engine's thread has, and which wait: first come, first served, with places reserved for the operator.

The thread works on its jobs in order, and cannot give any of them precedence. So clients' sequences wait here, and
the thread has as many as run at once. The operator's, the probes of an admission test, bypass them to reserved places.
Everything here runs on the event loop.
"""

from __future__ import annotations

import logging

from nest_runtime.errors import EngineError
from nest_runtime.serve.requests.jobs import Job
from nest_runtime.serve.transformers.batch import EngineBatch

KEPT = 4  # sequences that run beside the clients', for the operator

log = logging.getLogger("nest_runtime.serve.engine")


class Line:
    """The queue in front of one engine's thread.

    Args:
        batch: the thread.
        running: clients' sequences that it has at once.
    """

    def __init__(self, batch: EngineBatch, running: int) -> None:
        self._batch = batch
        self._running = running
        self._waiting: dict[str, Job] = {}  # in the order of their coming
        self._inside: set[str] = set()  # clients' jobs that the thread has

    def submit(self, job: Job, *, kept: bool) -> None:
        """Hand a job over when there is room; at once if it is ``kept``. Raises EngineError for a dead thread."""
        if kept:
            self._batch.submit(job)
        elif len(self._inside) < self._running:
            self._batch.submit(job)
            self._inside.add(job.id)
        else:
            self._waiting[job.id] = job

    def cancel(self, job_id: str) -> None:
        """Stop working on a job, or remove it from the queue."""
        if self._waiting.pop(job_id, None) is None:
            self._batch.cancel(job_id)

    def closed(self, job_id: str) -> None:
        """A job is over; the next one has its place."""
        self._waiting.pop(job_id, None)
        self._inside.discard(job_id)
        while self._waiting and len(self._inside) < self._running:
            job = next(iter(self._waiting.values()))
            try:
                self._batch.submit(job)
            except EngineError as error:  # the thread is dead: whatever waits is failed by who watches it
                log.debug("%s goes on waiting: %s", job.id, error)
                return
            del self._waiting[job.id]
            self._inside.add(job.id)
