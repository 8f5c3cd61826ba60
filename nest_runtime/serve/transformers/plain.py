"""The engine for models that transformers cannot page: plain batches of ``model.generate``, with the same interface.

It takes as many waiting jobs as one batch holds, and answers them together. Later jobs wait until the batch has
ended. It is slower under load than continuous.py, and right for every model that ``model.generate`` is right for.
Each row has its own patch, its own sampler and its own end. Rows share no attention, so values that are not finite
stay in their row.

A batch can be interrupted between two tokens; its jobs continue later from their tokens. This is done for the
operator's jobs (``kept``), and when a pass fails: each suspect is tried alone, for one token, and is to blame if it
fails again on the same tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nest_runtime.errors import EngineError
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve.requests.jobs import Blame, Delivery, Job, dead
from nest_runtime.serve.requests.sampling import NotFinite, Sampler, SamplingParams
from nest_runtime.serve.transformers.auto_fold import AutoFold
from nest_runtime.serve.transformers.sizes import BatchSizes
from nest_runtime.serve.transformers.steering import Chooser, Ender, Look, Steering, bare_generate


class _BrokenOff(Exception):
    """A signal, not an error: the batch is interrupted for other jobs."""


class PlainBatch:
    """The engine's thread and its requests; see ContinuousBatch for the arguments.

    Attributes:
        padded: whether prompts of different lengths share a batch, padded on the left. Some models read padding.
        auto_fold: what is folded into the weights: nothing.
    """

    def __init__(
        self,
        model: Any,
        runtime: PatchRuntime,
        sizes: BatchSizes,
        deliver: Callable[[list[Delivery]], None],
        blame: Callable[[Blame], None],
    ) -> None:
        self.padded = True
        self.auto_fold = AutoFold(runtime, wanted=False)
        self.failed_passes = 0
        self.reused_tokens = 0
        self._model, self._runtime, self._running = model, runtime, sizes.running
        self._deliver, self._blame = deliver, blame
        self._jobs: dict[str, Job] = {}
        self._tokens: dict[str, list[int]] = {}  # prompt and answer so far, by job
        self._waiting: deque[str] = deque()
        self._alone: deque[str] = deque()  # whose batch has failed: each gets a token in one of its own
        self._failed_at: dict[str, int] = {}  # how many tokens a job had when its batch failed
        self._changed = threading.Condition()
        self._pauses = 0
        self._busy = False  # whether a pass may be running
        self._stopping = False
        self._fault: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="plain batches")
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread at its next token; jobs still running are forgotten."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Hand a job to the engine. Raises EngineError when its thread has died or is stopping."""
        if not self.alive:
            raise dead(self.fault)
        with self._changed:
            self._jobs[job.id], self._tokens[job.id] = job, list(job.prompt)
            self._waiting.append(job.id)
            self._changed.notify_all()

    def cancel(self, job_id: str) -> None:
        """Stop generating for a job; nothing more is delivered for it."""
        with self._changed:
            if (job := self._jobs.get(job_id)) is not None:
                job.canceled = True
                self._changed.notify_all()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context in which no step runs, for changes of the model in place; requests are kept."""
        with self._changed:
            self._pauses += 1
            self._changed.wait_for(lambda: not self._busy)
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    @contextmanager
    def narrow(self, tokens: int) -> Iterator[None]:
        """A context in which nothing is different: prompts are read whole here."""
        yield

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A context in which another thread may call the model itself; steps continue."""
        yield

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def fault(self) -> str | None:
        """What killed the thread, if something did."""
        return None if self._fault is None else f"{type(self._fault).__name__}: {self._fault}"

    @property
    def jobs(self) -> int:
        """Jobs the engine has not finished or forgotten."""
        return len(self._jobs)

    def keys_in_use(self) -> set[str | None]:
        """Runtime keys of the patches that some job is computed under."""
        return {job.patch for job in list(self._jobs.values())}

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._answer(*batch)
        except Exception as error:
            self._fault = error
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _take(self) -> tuple[list[Job], bool] | None:
        """The jobs of the next batch, once there are any, and whether it is a trial; None at a stop."""
        with self._changed:
            while True:
                self._busy = False
                self._changed.notify_all()
                self._forget_canceled()
                if self._stopping:
                    return None
                if not self._pauses and (found := self._next()):
                    self._busy = True
                    return [self._jobs[name] for name in found[0]], found[1]
                self._changed.wait()

    def _next(self) -> tuple[list[str], bool] | None:
        line = [name for name in self._waiting if self._jobs[name].kept]
        if self._alone and not line:
            return [self._alone.popleft()], True
        line = line or list(self._waiting)
        if not line:
            return None
        first = len(self._tokens[line[0]])
        names = [name for name in line if self.padded or len(self._tokens[name]) == first][: self._running]
        for name in names:
            self._waiting.remove(name)
        return names, False

    def _answer(self, batch: list[Job], trial: bool) -> None:
        """Answer a batch to its end, or for one token each where it is a trial; then say who was to blame."""
        steering = Steering(self, batch)
        guides = {"logits_processor": [Chooser(steering)], "stopping_criteria": [Ender(steering)]}
        most = 1 if trial else max(self.left(job) for job in batch)
        suspects, failure = set(), None
        try:
            self._generate([self._tokens[job.id] for job in batch], [job.patch for job in batch], most, **guides)
        except _BrokenOff:
            pass
        except Exception as error:
            if self._stopping:
                return
            self.failed_passes += 1
            failure = error
            suspects = set(error.rows if isinstance(error, NotFinite) else range(len(batch)))
        left = [row for row, over in enumerate(steering.done) if not over]
        with self._changed:
            self._waiting.extendleft(batch[row].id for row in reversed(left) if row not in suspects)
        for job in (batch[row] for row in left if row in suspects):
            count = len(self._tokens[job.id])
            if self._failed_at.get(job.id) == count and failure is not None:
                self._end(job, failure)
            else:
                self._failed_at[job.id] = count
                self._alone.append(job.id)

    def _generate(self, rows: list[list[int]], patches: list[str | None], most: int, **guides: Any) -> None:
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # (rows, width)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        device = self._model.get_input_embeddings().weight.device
        with self._runtime.using_rows(patches):
            bare_generate(self._model, ids.to(device), mask.to(device), most, **guides)

    def _end(self, job: Job, error: Exception) -> None:
        """End a job that failed by itself. Its patch is to blame where the base can do what it cannot.

        Where the base can compute nothing at all, its error is raised: the fault is the engine's.
        """
        finite, patch, tokens = not isinstance(error, NotFinite), job.patch, self._tokens[job.id]
        reason = f"{type(error).__name__}: {error}" if finite else str(error)
        if not job.canceled:
            self._deliver([Delivery(job.id, finished=True, error=reason)])
        if not finite and patch is not None:
            look = Look(Sampler(SamplingParams(), 0, job.sampler.rules, tokens))
            try:
                self._generate([tokens], [None], 1, logits_processor=[look])
            except Exception:  # of any kind: the base cannot do it either
                patch = None
        self._forget(job)
        self._blame(Blame(job.id, patch, finite, reason))
        self._generate([[0]], [None], 1)

    def let_in(self, batch: list[Job]) -> None:
        """Called between two passes: a caller that waits in ``pause`` has the model now.

        Raises:
            EngineError: the engine stops.
            _BrokenOff: jobs wait that take precedence over those of the batch.
        """
        with self._changed:
            if self._pauses or self._stopping:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or not self._pauses)
                self._busy = True
            if self._stopping:
                raise EngineError("the engine is stopping")
            if any(self._jobs[name].kept for name in self._waiting) and not any(job.kept for job in batch):
                raise _BrokenOff

    def took(self, job: Job, token: int) -> Delivery:
        """Keep a new token; returns what the client is to get for it."""
        tokens = self._tokens[job.id]
        tokens.append(token)
        finished = token in job.eos or len(tokens) - len(job.prompt) >= job.max_new_tokens
        if finished:
            self._forget(job)
        return Delivery(job.id, (token,), finished, odds=tuple(job.sampler.odds[-1:]))

    def left(self, job: Job) -> int:
        """How many tokens a job may still get."""
        return len(job.prompt) + job.max_new_tokens - len(self._tokens[job.id])

    def tell(self, deliveries: list[Delivery]) -> None:
        """Deliver a step's tokens."""
        if deliveries:
            self._deliver(deliveries)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        self._tokens.pop(job.id, None)
        self._failed_at.pop(job.id, None)

    def _forget_canceled(self) -> None:
        for queue in (self._waiting, self._alone):
            for name in [name for name in queue if self._jobs[name].canceled]:
                queue.remove(name)
        for job in [job for job in self._jobs.values() if job.canceled]:
            self._forget(job)
