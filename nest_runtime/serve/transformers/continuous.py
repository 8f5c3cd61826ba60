"""transformers' continuous batching. Its internals are touched only here, in recovery.py and in reserve.py.

What is added to it (transformers 5.23):

- Each step runs under ``PatchRuntime.using_tokens``, so that every token of the flat batch [1, tokens, d] is computed
  under the patch that its request was admitted with.
- Each request's own sampler chooses the next token of its row.
- Keys and values are shared between requests that begin alike only if their patch is the same (prefixes.py), so that
  none computed under one patch is read under another.
- A pass of one request goes without the mask that keeps requests apart, as in ``model.generate`` (alone.py).
- A patch that everybody is answered under is folded into the weights (auto_fold.py).
- Results go to one callback instead of a queue that grows with requests nobody waits for.
- The operator's jobs find room however full the cache is (reserve.py).
- A pass that raises, or gives values that are not finite, ends only the request to blame (recovery.py).

Asynchronous batching and CUDA graphs stay off: both would move work out of reach of the hooks. Nothing here knows of
HTTP, model names or asyncio.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from nest_runtime.errors import EngineError
from nest_runtime.runtime import PatchRuntime
from nest_runtime.serve.requests.jobs import Blame, Delivery, Job, dead
from nest_runtime.serve.requests.sampling import NotFinite, all_finite, choose_tokens
from nest_runtime.serve.transformers import reserve
from nest_runtime.serve.transformers.alone import leave_out_needless_masks
from nest_runtime.serve.transformers.auto_fold import AutoFold
from nest_runtime.serve.transformers.prefixes import Prefixes
from nest_runtime.serve.transformers.recovery import Recovery
from nest_runtime.serve.transformers.sizes import PAGE_TOKENS, BatchSizes


class ContinuousBatch:
    """The engine's thread and its requests. One per model; ``start`` it once, ``stop`` it once.

    Args:
        model: the model the runtime holds.
        runtime: where the patches are; jobs name them by key.
        sizes: see sizes.py.
        deliver: called from the engine's thread with what each step brought; must not block.
        blame: called from there with each job that failed a pass alone, after its end was delivered.

    Attributes:
        auto_fold: what is folded into the weights.
    """

    def __init__(
        self,
        model: Any,
        runtime: PatchRuntime,
        sizes: BatchSizes,
        deliver: Callable[[list[Delivery]], None],
        blame: Callable[[Blame], None],
    ) -> None:
        self._model = model
        self._runtime = runtime
        self._deliver, self._blame = deliver, blame
        self._jobs: dict[str, Job] = {}
        self._recovery: Recovery | None = None
        self._outputs = threading.local()  # hidden: of this thread's last pass, (1, tokens, d)
        self._tap: Any = None
        self._prefixes: Prefixes | None = None
        exact = model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
        self.auto_fold = AutoFold(runtime, wanted=exact)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=sizes.cache_tokens // PAGE_TOKENS + reserve.PAGES,
                max_batch_tokens=sizes.batch_tokens,
                max_requests_per_batch=min(sizes.running, sizes.batch_tokens),
                max_memory_percent=0.9,  # only a bound here: num_blocks sets the size
                max_blocks_per_request=0,
                allow_block_sharing=True,  # between requests under one patch: prefixes.py
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.output_router = _Router(self._jobs, deliver)
        try:
            self._manager.warmup()  # creates the batch processor; there are no graphs to capture
        except MemoryError as error:
            raise EngineError(f"the engine cannot start: {error}", "lower cache_tokens or batch_tokens") from error

    def start(self) -> None:
        """Start the thread."""
        processor = self._manager.batch_processor
        step, clear = processor._generation_step, processor.scheduler.clear_cancelled_requests
        recovery = Recovery(self._manager, self._jobs, self._deliver, self._blame)

        def patched_step(model: Any) -> None:
            """One pass of the batch, each token under its request's patch."""
            batch = processor.inputs_and_outputs.requests_in_batch
            recovery.running = tuple(future.state.request_id for future in batch)
            runs = list(self._runs())
            patches = {patch for patch, _ in runs}
            self.auto_fold.before_step(patches)
            # Whole batches under what is on for everybody need no choice of their own: passes are cheaper then.
            same = patches == {self.auto_fold.folded}
            with nullcontext() if same else self._runtime.using_tokens(runs):
                step(model)

        def forget_canceled() -> list[Any]:
            states = clear()
            for state in states:
                self._jobs.pop(state.request_id, None)
            return states

        processor._generation_step = patched_step
        processor.model_runner._sample = self._sample
        processor.scheduler.clear_cancelled_requests = forget_canceled
        self._recovery = recovery
        reserve.Reserve(processor, PAGE_TOKENS, self._is_kept)
        self._prefixes = Prefixes(processor.cache, PAGE_TOKENS, lambda job: self._jobs[job].patch)
        leave_out_needless_masks(processor.inputs_and_outputs, self._model)
        self._tap = self._model.base_model.register_forward_hook(self._keep_hidden)
        self._manager.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread; jobs still running fail."""
        if self._tap is not None:
            self._tap.remove()
        if self._manager._generation_thread is None:
            return  # never started
        self._manager.stop(block=True, timeout=timeout, hard_stop=True)

    def submit(self, job: Job) -> None:
        """Hand a job to the engine. Raises EngineError when its thread has died or is stopping."""
        if not self.alive:
            raise dead(self.fault)
        self._jobs[job.id] = job
        accepted = self._manager.add_request(
            list(job.prompt),
            request_id=job.id,
            max_new_tokens=job.max_new_tokens,
            eos_token_id=list(job.eos),
            streaming=True,
        )
        if accepted is None:
            self._jobs.pop(job.id, None)
            raise dead(self.fault)

    def cancel(self, job_id: str) -> None:
        """Stop generating for a job; nothing more is delivered for it."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.canceled = True
            self._manager.cancel_request(job_id)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context in which no step runs, for changes of the model in place; requests are kept.

        Raises:
            EngineError: the thread dies before it pauses.
        """
        with ExitStack() as stack:
            if self._manager.is_running():
                try:
                    stack.enter_context(self._manager.pause())
                except RuntimeError as error:
                    raise dead(self.fault) from error
            yield

    @contextmanager
    def narrow(self, tokens: int) -> Iterator[None]:
        """A context in which passes take at most ``tokens`` tokens.

        So prompts are read in pieces, and cached results are computed again.
        """
        processor = self._manager.batch_processor
        before = processor.max_batch_tokens
        with self.pause():
            processor.cache.evict_cached_blocks()
            processor.max_batch_tokens = min(before, tokens)
        try:
            yield
        finally:
            processor.max_batch_tokens = before

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A context in which another thread may call the model itself.

        Steps continue if the model's attention knows both kinds of call. Otherwise they wait, and the attention is
        switched.
        """
        if self._model.config._attn_implementation != "paged|eager":
            yield
            return
        with self.pause():
            self._model.set_attn_implementation("eager")
            try:
                yield
            finally:
                self._model.set_attn_implementation("paged|eager")

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        status = self._manager.background_thread_status
        return self._manager.is_running() and status.can_accept_new_requests() is None

    @property
    def fault(self) -> str | None:
        """What killed the thread, if something did."""
        own = None if self._recovery is None else self._recovery.fault
        error = own or self._manager.background_thread_status.fatal_error
        return None if error is None else f"{type(error).__name__}: {error}"

    @property
    def jobs(self) -> int:
        """Jobs the engine has not finished or forgotten."""
        return len(self._jobs)

    @property
    def failed_passes(self) -> int:
        """Passes that raised, or gave values that are not finite."""
        return self._recovery.failures if self._recovery is not None else 0

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were not computed again: their keys and values were in the cache."""
        return self._prefixes.reused if self._prefixes is not None else 0

    def keys_in_use(self) -> set[str | None]:
        """Runtime keys of the patches that some job is, or was until this step, computed under."""
        return {job.patch for job in list(self._jobs.values())}

    def _is_kept(self, job_id: str) -> bool:
        job = self._jobs.get(job_id)
        return job is not None and job.kept

    def _keep_hidden(self, module: Any, args: Any, output: Any) -> None:
        self._outputs.hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def _runs(self) -> Iterator[tuple[str | None, int]]:
        """The flat batch as runs of (patch, tokens), neighbors under one patch joined."""
        patch: str | None = None
        count = 0
        for future in self._manager.batch_processor.inputs_and_outputs.requests_in_batch:
            job = self._jobs[future.state.request_id]
            if job.canceled:  # the cancellation may have overtaken the request itself
                self._manager.cancel_request(job.id)
            if count and job.patch != patch:
                yield patch, count
                count = 0
            patch = job.patch
            count += future.query_length
        if count:
            yield patch, count

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Replaces ModelRunner._sample. ``scores`` is [1, rows, vocabulary]; rows of unfinished prompts come last."""
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        samplers = [self._jobs[future.state.request_id].sampler for future in batch if future.has_new_token]
        hidden = self._outputs.__dict__.pop("hidden", None)
        if hidden is not None and not all_finite(hidden):
            raise NotFinite("the hidden states of this pass are not finite")
        if samplers:
            output_ids[0, : len(samplers)].copy_(choose_tokens(scores[0, : len(samplers)], samplers))


class _Router(OutputRouter):
    """Turns the library's outputs into deliveries; drops what belongs to no job or a canceled one."""

    def __init__(self, jobs: dict[str, Job], deliver: Callable[[list[Delivery]], None]) -> None:
        super().__init__()
        self._jobs = jobs
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        deliveries = [delivery for output in outputs if (delivery := self._take(output))]
        if deliveries:
            self._deliver(deliveries)

    def _take(self, output: GenerationOutput) -> Delivery | None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return None
        if output.is_finished():
            self._jobs.pop(job.id, None)
        if job.canceled:
            return None
        tokens = tuple(output.generated_tokens[job.delivered :])
        odds = tuple(job.sampler.odds[job.delivered : job.delivered + len(tokens)])
        job.delivered += len(tokens)
        error = None
        if output.status == RequestStatus.FAILED:
            error = output.error or "the engine gave no reason"
        return Delivery(job.id, tokens, output.is_finished(), error, odds)
