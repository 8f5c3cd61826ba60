"""The engine as the API sees it: admission, requests in flight, their results on the event loop.

A request is admitted with its patch, and keeps it for every choice and every token. Everything
here runs on the event loop; the engine's own thread is behind continuous.py. Nothing here knows text.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from nest_runtime.errors import Draining, EngineError, QueueFull
from nest_runtime.model.anatomy import unwrap
from nest_runtime.prompts.generate import embedding_rows
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.requests.generation import EngineRequest, Generation
from nest_runtime.serve.requests.jobs import Blame, Delivery, Job, dead
from nest_runtime.serve.requests.sampling import Sampler, SamplingParams
from nest_runtime.serve.served_patch import BASE, NO_DIGEST, ServedPatch
from nest_runtime.serve.transformers.batch import EngineBatch
from nest_runtime.serve.transformers.continuous import ContinuousBatch
from nest_runtime.serve.transformers.own_rules import Rules, no_rules
from nest_runtime.serve.transformers.plain import PlainBatch
from nest_runtime.serve.transformers.rope import context_of
from nest_runtime.serve.transformers.selfcheck import PIECE, LogitsFollower, Truth, tolerance, truths
from nest_runtime.serve.transformers.sizes import BatchSizes, fit_sizes
from nest_runtime.serve.transformers.waiting import KEPT, Line

WATCH_SECONDS = 0.2

log = logging.getLogger("nest_runtime.serve.engine")


class TransformersEngine:
    """Admission and bookkeeping for one model on continuous batching.

    Args:
        model: the model that ``runtime`` holds.
        runtime: the patches.
        limits: batch and cache sizes.
        max_queue: sequences that may wait beyond ``limits.running``.
        ends: token ids that end an answer (generate.end_token_ids).
        rules: what the model's own generation config asks of every answer (own_rules.py).
        kind: ``transformers`` or ``generate``.
        text: ids of some text, for the comparison with ``model.generate`` at the start.

    Attributes:
        context: tokens that a prompt and its answer may have together.
        rows: token ids that the model knows.

    Raises:
        EngineError: the model or its sizes are none for this engine.
    """

    def __init__(
        self,
        model: Any,
        runtime: PatchRuntime,
        limits: Limits,
        max_queue: int,
        *,
        ends: Sequence[int] = (),
        rules: Rules = no_rules,
        kind: str = "transformers",
        text: Sequence[int] = (0,),
    ) -> None:
        positions = context_of(model, limits.context)
        self._kind = kind
        self._architecture = type(unwrap(model)).__name__
        self._truths = truths(model, text)
        self._tolerance = tolerance(model.dtype)
        self._rules = rules
        self.context = positions
        if kind == "generate":
            sizes = BatchSizes(limits.running + KEPT, limits.batch_tokens, positions)
            self._batch: EngineBatch = PlainBatch(model, runtime, sizes, self._deliver, self._blame)
        else:
            sizes = fit_sizes(model, limits.running, limits.batch_tokens, limits.cache_tokens, positions)
            self.context = min(positions, sizes.cache_tokens)
            self._batch = self._paged(model, runtime, replace(sizes, running=sizes.running + KEPT))
        self.capacity = limits.running + max_queue
        self.eos = tuple(ends)
        self.rows = embedding_rows(model)
        self.draining = False
        self._running = limits.running
        self.on_blame: Callable[[Blame], None] = lambda blame: None  # on the event loop
        self._line = Line(self._batch, limits.running)
        self._owners: dict[str, Generation] = {}
        self._unread: set[Generation] = set()  # those whose answer is not all sent: an enforced switch replaces them
        self._names = itertools.count()
        self._recent: deque[float] = deque(maxlen=32)  # seconds of the last requests
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the thread and check that it computes what ``model.generate`` does, so that ready means ready.

        Raises:
            EngineError: it does not.
        """
        self._loop = asyncio.get_running_loop()
        await Pool("start", 1).run(self._batch.start)
        self._watcher = asyncio.create_task(self._watch())
        await self._compare()
        self._truths = []

    async def _compare(self) -> None:
        """Each prompt alone, then all at once and each twice, then all in pieces; see selfcheck.py."""
        groups = [*([truth] for truth in self._truths), [*self._truths, *self._truths]]
        try:
            error = max([await self._follow(group) for group in groups])
            with self._batch.narrow(PIECE):
                error = max(error, await self._follow(self._truths))
        except EngineError as failed:
            raise self._unfit(f"it fails: {failed.message}") from failed
        if error <= self._tolerance:
            return
        if isinstance(self._batch, PlainBatch) and self._batch.padded:
            log.warning("%s reads padding: only prompts of one length share a batch", self._architecture)
            self._batch.padded = False
            await self._compare()
            return
        raise self._unfit(f"its logits are not those of model.generate ({error:.1%} off)")

    async def _follow(self, group: Sequence[Truth]) -> float:
        """Let the engine answer some prompts at once on the bare base; returns the largest error of its logits."""
        request = EngineRequest(
            tuple(truth.prompt for truth in group),
            tuple(len(truth.tokens) for truth in group),
            1,
            SamplingParams(),
            ServedPatch(None, BASE, NO_DIGEST),
        )
        followers = [LogitsFollower(truth) for truth in group]
        jobs = [self._job(request, number) for number in range(len(group))]
        for job, follower in zip(jobs, followers, strict=True):
            job.eos, job.sampler = (), Sampler(request.params, rules=[follower], prompt=job.prompt)
        generation = Generation(self, request, [job.id for job in jobs])
        self._submit(generation, jobs)
        try:
            async for _ in generation.events():
                pass
        finally:
            generation.cancel()
        return await Pool("check", 1).run(lambda: max(follower.error() for follower in followers))

    def _paged(self, model: Any, runtime: PatchRuntime, sizes: BatchSizes) -> ContinuousBatch:
        try:
            return ContinuousBatch(model, runtime, sizes, self._deliver, self._blame)
        except EngineError:
            raise
        except Exception as error:  # of any kind: the library asks nothing of a model before it begins
            raise self._unfit(f"it fails: {type(error).__name__}: {error}") from error

    def _unfit(self, why: str) -> EngineError:
        if self._kind == "generate":
            return EngineError(f"{self._architecture} cannot be served: with the generate engine {why}", "report it")
        return EngineError(
            f"{self._architecture} cannot be served by the transformers engine: {why}",
            "start with --engine generate, which serves every model that model.generate does, in plain batches",
        )

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Admit no more requests, wait for those in flight, and end the thread. A second call does no harm."""
        self.draining = True
        until = time.monotonic() + drain_seconds
        while self._owners and self.alive and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if self._watcher is not None:
            self._watcher.cancel()
        for generation in set(self._owners.values()):
            generation.fail(_draining())
        await asyncio.to_thread(self._batch.stop)

    def admit(self, request: EngineRequest) -> Generation:
        """Admit a request.

        Raises:
            QueueFull: too much waits already.
            Draining: the server is shutting down.
            EngineError: the thread is dead.
        """
        if self.draining:
            raise _draining()
        if not self._batch.alive:
            raise dead(self._batch.fault)
        if not request.kept and len(self._owners) + request.choices > self.capacity:
            raise self._full()
        jobs = [self._job(request, choice) for choice in range(request.choices)]
        generation = Generation(self, request, [job.id for job in jobs])
        try:
            self._submit(generation, jobs)
        except EngineError:
            generation.cancel()
            raise
        return generation

    def enforce(self, pin: ServedPatch) -> int:
        """Replace the patch of every request in flight that follows the active one; returns how many.

        They restart from their prompts under ``pin``. Those whose client has seen a part of the answer end. When this
        returns, no token of another patch will be read for them.
        """
        found = [generation for generation in self._unread if generation.replaceable(pin)]
        found.sort(key=lambda generation: generation.started)
        for generation in [one for one in found if one.replace(pin)]:
            jobs = [self._job(generation.request, choice) for choice in range(generation.request.choices)]
            generation.begin([job.id for job in jobs])
            try:
                self._submit(generation, jobs)
            except EngineError as error:
                generation.fail(error)
        return len(found)

    def finished(self, generation: Generation) -> None:
        """Called by a generation: its answer has been sent, or nobody wants it."""
        self._unread.discard(generation)

    def drop(self, job: str) -> None:
        """Called by a generation: stop working on a job."""
        self._line.cancel(job)

    def closed(self, job: str, generation: Generation | None) -> None:
        """Called by a generation: a job is over, and with it the generation if one is given."""
        self._owners.pop(job, None)
        self._line.closed(job)
        if generation is not None:
            self._recent.append(time.perf_counter() - generation.started)

    def pause(self) -> AbstractContextManager[None]:
        """A context in which no step runs; see ContinuousBatch.pause."""
        return self._batch.pause()

    def beside(self) -> AbstractContextManager[None]:
        """A context in which the model may be called while the engine serves; see ContinuousBatch.beside."""
        return self._batch.beside()

    def hold(self) -> AbstractContextManager[None]:
        """A context in which the engine does not fold or unfold; see AutoFold.hold."""
        return self._batch.auto_fold.hold()

    def unfold(self) -> None:
        """Take a folded patch out of the weights; only inside ``pause``."""
        self._batch.auto_fold.unfold()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._batch.alive

    @property
    def live(self) -> int:
        """Sequences running or waiting."""
        return len(self._owners)

    @property
    def waiting(self) -> int:
        """Sequences beyond what one batch takes."""
        return max(0, len(self._owners) - self._running)

    @property
    def jobs(self) -> int:
        """Sequences that the engine's thread still holds; a canceled one leaves within a step."""
        return self._batch.jobs

    @property
    def folded(self) -> bool:
        """Whether a patch is folded into the weights."""
        return self._batch.auto_fold.folded is not None

    @property
    def failed_passes(self) -> int:
        """Passes that raised, or gave values that are not finite."""
        return self._batch.failed_passes

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return self._batch.reused_tokens

    def keys_in_use(self) -> set[str | None]:
        """Runtime keys of the patches that sequences wait for, or that the engine's thread may still compute under."""
        waiting = {generation.request.pin.key for generation in list(self._owners.values())}
        return waiting | self._batch.keys_in_use()

    def in_flight(self) -> Counter[str]:
        """Sequences running or waiting, by the label of the patch that answers them."""
        return Counter(generation.request.pin.label for generation in list(self._owners.values()))  # from any thread

    def _submit(self, generation: Generation, jobs: list[Job]) -> None:
        self._unread.add(generation)
        self._owners.update((job.id, generation) for job in jobs)
        for job in jobs:
            self._line.submit(job, kept=generation.request.kept)

    def _job(self, request: EngineRequest, choice: int) -> Job:
        prompt, index = divmod(choice, request.n)
        return Job(
            id=f"job-{next(self._names)}",
            prompt=request.prompts[prompt],
            max_new_tokens=request.max_new_tokens[prompt],
            eos=self.eos,
            patch=request.pin.key,
            sampler=Sampler(
                request.params,
                index,
                [
                    *self._rules(len(request.prompts[prompt]), request.max_new_tokens[prompt]),
                    *request.rules(len(request.prompts[prompt])),
                ],
                request.prompts[prompt],
            ),
            kept=request.kept,
        )

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """On the engine's thread: hand over to the event loop."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._take, deliveries)

    def _blame(self, blame: Blame) -> None:
        """On the engine's thread: hand over to the event loop."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: self.on_blame(blame))

    def _take(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            generation = self._owners.get(delivery.job)
            if generation is not None:
                generation.take(delivery)

    async def _watch(self) -> None:
        """Fail what is in flight when the thread dies: nobody else would ever answer it."""
        while self._batch.alive:
            await asyncio.sleep(WATCH_SECONDS)
        if not self.draining:
            log.error("the engine's thread has died: %s", self._batch.fault)
        for generation in set(self._owners.values()):
            generation.fail(dead(self._batch.fault))

    def _full(self) -> QueueFull:
        mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
        after = max(1, min(60, math.ceil(mean * max(1, self.waiting) / self._running)))
        return QueueFull(
            f"{len(self._owners)} sequences are running or waiting; this server holds {self.capacity}",
            f"try again in {after} s",
            retry_after=after,
        )


def _draining() -> Draining:
    return Draining("the server is shutting down", "send the request to another server, or again later")
