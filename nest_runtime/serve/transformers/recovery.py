"""A pass that fails ends only the request to blame, and never the engine.

This is the second file that touches transformers' internals (5.23), beside continuous.py: it moves requests out of
and into the library's scheduler. When a pass raises, or gives values that are not finite, its tokens are dropped and
every page with them. Its requests are tried by themselves (trials.py) while the others wait, and continue from the
tokens that they had. After each request that is found to blame, one token is computed on the bare base.

If values were not finite, the base first computes the request's own next token. A patch is to blame only if the base
can do what it cannot, so that no client can take a patch off with a prompt that the model itself cannot compute. If
the base computes nothing at all, the fault is the engine's, and the engine ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from nest_runtime.errors import EngineError
from nest_runtime.serve.requests.jobs import Blame, Delivery, Job
from nest_runtime.serve.requests.sampling import NotFinite, Sampler, SamplingParams
from nest_runtime.serve.transformers.trials import Trials

CANARY = "canary"

log = logging.getLogger("nest_runtime.serve.engine")


class Recovery:
    """Wraps the turns of one manager's loop; everything in it runs on the engine's thread.

    Args:
        manager: the library's, with its batch processor made and its thread not started.
        jobs: those of the engine, by id.
        deliver: receives the ends of jobs.
        blame: receives what was to blame.

    Attributes:
        running: the jobs whose tokens the pass computes; set by the step.
        failures: passes that failed so far.
        fault: what ended the engine, if something did: known before the library records it.
    """

    def __init__(
        self,
        manager: Any,
        jobs: dict[str, Job],
        deliver: Callable[[list[Delivery]], None],
        blame: Callable[[Blame], None],
    ) -> None:
        self.running: tuple[str, ...] = ()
        self.failures = 0
        self.fault: Exception | None = None
        self._processor = manager.batch_processor
        self._jobs, self._deliver, self._blame = jobs, deliver, blame
        self._trials = Trials(lambda job: jobs[job].patch)
        self._aside: dict[str, RequestState] = {}  # who waits while others are tried
        self._accused: Blame | None = None  # whose tokens the canary is computing
        self._body = manager._generation_loop_body
        self._add = self._processor.scheduler.add_waiting_request
        manager._generation_loop_body = self._turn
        self._processor.scheduler.add_waiting_request = self._arrive

    def _turn(self, processor: Any, bootstrapping: bool) -> bool:
        """One turn of the loop: the library schedules, computes, and takes the tokens in."""
        self.running = ()
        try:
            going: bool = self._body(processor, bootstrapping)
        except Exception as error:
            self.failures += 1
            try:
                self._recover(error)
            except Exception as worse:
                self.fault = worse
                raise
            return True
        if self._trials.group:
            self._conclude()
        return going

    def _arrive(self, state: RequestState) -> None:
        """Replaces the scheduler's admission: while some requests are tried, others wait."""
        if state.request_id in self._jobs:
            self._jobs[state.request_id].arrived = True
        if self._trials.group and state.request_id not in self._trials.group:
            self._aside[state.request_id] = state
        else:
            self._add(state)

    def _recover(self, error: Exception) -> None:
        """Drop the pass; end the requests that are known to be to blame, and restart the others.

        Raises:
            EngineError: not even the base can be computed. Also raises the errors of a device that is gone.
        """
        scheduler = self._processor.scheduler
        suspects = self._trials.group or self.running or (*scheduler.active_requests, *scheduler.waiting_requests)
        if not suspects:
            raise error  # nobody to leave out: it would only come again
        if not self._trials.group:  # the first of its kind; those of the trials say nothing new
            log.warning("a pass over %d sequences failed; they are tried again", len(suspects), exc_info=error)
        states = self._evict()
        culprit = self._trials.failed(name for name in suspects if name in states)
        self._aside.update(states)
        if culprit == CANARY:
            del self._aside[CANARY], self._jobs[CANARY]
            if self._accused is None:
                raise EngineError(f"nothing can be computed any more: {error}") from error
            self._judge(base=False)
            self._send_canary()
        over = [job.id for job in list(self._jobs.values()) if job.arrived and job.id not in self._aside]
        for name in over:
            self._blame(self._end(self._jobs.pop(name), error))
        if culprit is not None and culprit != CANARY:
            state, job = self._aside.pop(culprit), self._jobs.pop(culprit)
            blame = self._end(job, error)
            if blame.finite or blame.patch is None:
                self._blame(blame)
                self._send_canary()
            else:
                self._accused = blame
                self._send_canary(state.initial_tokens, job.sampler)
        self._next()

    def _send_canary(self, tokens: Sequence[int] = (0,), sampler: Sampler | None = None) -> None:
        """Let one token be computed on the bare base before anything else.

        Args:
            tokens: what comes before it.
            sampler: whose rules are asked.
        """
        rules = () if sampler is None else sampler.rules
        self._jobs[CANARY] = Job(CANARY, tokens, 1, (), None, Sampler(SamplingParams(), 0, rules, tokens))
        self._aside[CANARY] = RequestState(CANARY, list(tokens), streaming=True, max_new_tokens=1)
        self._trials.first(CANARY)

    def _judge(self, *, base: bool) -> None:
        """Say who is to blame, now that it is known whether the base can compute what the accused could not."""
        if self._accused is not None:
            self._blame(self._accused if base else replace(self._accused, patch=None))
            self._accused = None

    def _end(self, job: Job, error: Exception) -> Blame:
        """Give a job its end; returns the blame, if nobody else is to have it."""
        reason = str(error) if isinstance(error, NotFinite) else f"{type(error).__name__}: {error}"
        if not job.canceled:
            self._deliver([Delivery(job.id, finished=True, error=reason)])
        return Blame(job.id, job.patch, not isinstance(error, NotFinite), reason)

    def _evict(self) -> dict[str, RequestState]:
        """Remove every request that the library holds, as if it came again with its tokens; the cache is empty then."""
        scheduler, cache = self._processor.scheduler, self._processor.cache
        held = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
        live = [state for state in held if state.request_id in self._jobs and state.status < RequestStatus.FINISHED]
        states = {state.request_id: state.create_equivalent_initial_request() for state in live}
        self._processor.reset()
        cache.reset()
        cache.cache_tensor.zero_()  # what a mask hides is still multiplied, by zero: no NaN may lie about
        return states

    def _conclude(self) -> None:
        """End a trial whose members have each got a token, or are gone."""
        scheduler = self._processor.scheduler
        found = {**scheduler.active_requests, **scheduler.waiting_requests}
        left = [found[name] for name in self._trials.group if name in found]
        if any(not state.generated_tokens for state in left):
            return
        if self._trials.group == (CANARY,):
            self._judge(base=True)
        for state in left:
            scheduler.finish_request(state.request_id)
            self._aside[state.request_id] = state.create_equivalent_initial_request()
        self._next()

    def _next(self) -> None:
        """Let the next group run alone, or everybody if there is none."""
        while group := self._trials.advance():
            brought = [self._bring_in(name) for name in group]
            if any(brought):
                return
        for name in list(self._aside):
            self._bring_in(name)

    def _bring_in(self, name: str) -> bool:
        state, job = self._aside.pop(name, None), self._jobs.get(name)
        if state is None or job is None:
            return False
        if job.canceled:
            del self._jobs[name]
            return False
        self._arrive(state)
        return True
