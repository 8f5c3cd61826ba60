"""Room in the cache for the operator: a full cache keeps the probes of an admission test waiting for nobody.

This is the third file that touches transformers' internals (5.23). Places among the running sequences are useless
without room for keys and values: while the cache is short, the library admits nobody new until somebody has ended. So
some pages are reserved, given to the operator's jobs (``kept``) if there are no others, and taken back when the last
of these has ended. Such jobs come first in every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState

PAGES = 16  # that are held; as many are added to the cache


class Reserve:
    """Wraps a scheduler and its cache; lives as long as they do, on the engine's thread.

    Args:
        processor: the library's batch processor.
        page: tokens in one page of its cache.
        kept: whether a request, by its id, is the operator's.
    """

    def __init__(self, processor: Any, page: int, kept: Callable[[str], bool]) -> None:
        self._scheduler, self._cache = processor.scheduler, processor.cache
        self._page, self._kept = page, kept
        self._held: list[str] = []
        self._fits, self._clear = self._cache.can_store_request_tokens, self._cache.reset
        self._schedule, self._waiting = self._scheduler.schedule_batch, self._scheduler._get_waiting_candidates
        self._process = self._scheduler._process_candidates
        self._cache.can_store_request_tokens, self._cache.reset = self._store, self._reset
        self._scheduler.schedule_batch, self._scheduler._get_waiting_candidates = self._turn, self._candidates
        self._scheduler._process_candidates = self._kept_first

    def _turn(self, *budgets: Any) -> Any:
        """Schedule one pass: kept requests are let in, whoever else is not."""
        scheduler = self._scheduler
        waiting = any(map(self._kept, scheduler.waiting_requests))
        if not waiting and not any(map(self._kept, scheduler.active_requests)):
            self._take()
        closed, self._only_kept = scheduler.block_new_requests, waiting and scheduler.block_new_requests
        scheduler.block_new_requests = closed and not waiting
        try:
            return self._schedule(*budgets)
        finally:
            scheduler.block_new_requests = closed

    def _candidates(self) -> list[Any]:
        found: list[Any] = self._waiting()
        return [state for state in found if self._kept(state.request_id)] if self._only_kept else found

    def _kept_first(self, candidates: list[Any], *more: Any) -> Any:
        return self._process(sorted(candidates, key=lambda state: not self._kept(state.request_id)), *more)

    def _store(self, state: Any, count: int, dry_run: bool = False) -> bool:
        fits = bool(self._fits(state, count, dry_run))
        while not fits and not dry_run and self._held and self._kept(state.request_id):
            self._cache.free_blocks(self._held.pop(), no_cache=True)
            self._cache.pool.try_to_free_sectors()
            fits = bool(self._fits(state, count))
        return fits

    def _take(self) -> None:
        while len(self._held) < PAGES:
            nobody = RequestState(f"held-{len(self._held)}", [0])
            if not self._fits(nobody, self._page):
                return
            self._held.append(nobody.request_id)

    def _reset(self) -> None:
        self._clear()
        self._held.clear()
