"""One patch for everybody: rows changed in place on every rank, while nothing runs.

A switch costs two writes of a few rows. Between switches the engine computes as without patches, through its compiled
code and CUDA graphs. Every rank's rows are compared with the checkpoint's by digest before and after. The prefix cache
was computed under the old weights, and is dropped at every switch.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import Any

from nest_runtime.errors import EngineError, NestError
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.write import to_bytes
from nest_runtime.serve.vllm.base import CheckpointBase, check_prepared, digests
from nest_runtime.serve.vllm.replicas import Replicas, Reports

log = logging.getLogger("nest_runtime.serve.vllm")


class InPlace:
    """Patches prepared on the ranks, and which one is in the weights. Made on the event loop.

    Args:
        replicas: the workers.
        base: the checkpoint.

    ``add`` and ``remove`` are called in threads, like PatchRuntime's; the rest on the event loop.
    """

    per_request = False

    def __init__(self, replicas: Replicas, base: CheckpointBase) -> None:
        refuse_connector(replicas.client.vllm_config)
        self.broken: EngineError | None = None  # why no one knows which weights the ranks have
        self._replicas = replicas
        self._base = base
        self._loop = asyncio.get_running_loop()
        self._prepared: dict[str, tuple[dict[tuple[int, int], str], dict[tuple[int, int], str]]] = {}
        self._on: str | None = None

    @property
    def on(self) -> str | None:
        """The digest of the patch in the weights, or None."""
        return self._on

    def add(self, patch: Patch, *, pause: Any = nullcontext) -> str:
        """Check a patch against the checkpoint and every rank; changes no weight. See Base.check for errors."""
        rows = self._base.check(patch)
        asyncio.run_coroutine_threadsafe(self._prepare(patch, rows), self._loop).result()
        return patch.digest

    def remove(self, digest: str) -> None:
        """Forget a patch that is not active."""
        self._prepared.pop(digest, None)
        asyncio.run_coroutine_threadsafe(self._replicas.call("nest_forget", digest), self._loop).result()

    async def switch(self, digest: str | None) -> None:
        """Replace the active patch by a prepared one; None restores the base. No request may run.

        Raises:
            EngineError: a rank has wrong rows afterwards. Then the old patch is active again, or ``broken`` is set and
                nothing may be answered.
        """
        old = self._on
        async with self._replicas.paused():
            try:
                await self._apply(digest)
            except NestError as error:
                await self._back(old, error)
                raise

    async def verify(self) -> None:
        """Check that every rank has the active patch, to the bit, now. Raises EngineError."""
        reports = await self._replicas.call("nest_state")
        self._compare(reports, "live", self._on, patched=True)

    async def _prepare(self, patch: Patch, rows: Any) -> None:
        reports = await self._replicas.call("nest_prepare", to_bytes(patch))
        check_prepared(patch, rows, reports)
        self._prepared[patch.digest] = tuple(  # type: ignore[assignment]
            {(number, rank): value for number, rank, value in digests(reports, key)} for key in ("pristine", "patched")
        )

    async def _apply(self, digest: str | None) -> None:
        reports = await self._replicas.call("nest_apply", digest)
        self._compare(reports, "restored", self._on, patched=False)
        self._compare(reports, "live", digest, patched=True)
        await self._replicas.forget_prefixes()
        self._on = digest

    async def _back(self, old: str | None, why: NestError) -> None:
        """After a switch that failed on some rank: all ranks to the old patch, or stop answering."""
        log.error("a switch failed, all ranks go back: %s", why)
        try:
            reports = await self._replicas.call("nest_apply", old)
            self._compare(reports, "live", old, patched=True)
            await self._replicas.forget_prefixes()
        except NestError as error:
            self.broken = EngineError(
                f"a switch failed ({why.message}), and so did going back ({error.message}): "
                "the ranks may hold different weights",
                "restart the server",
            )
            log.critical("%s", self.broken)

    def _compare(self, reports: Reports, key: str, digest: str | None, *, patched: bool) -> None:
        if digest is None:
            return
        wanted = self._prepared[digest][int(patched)]
        for number, rank, found in digests(reports, key):
            if found != wanted[number, rank]:
                kind = "patched" if patched else "pristine"
                raise EngineError(
                    f"rank {rank} of replica {number} has other {kind} rows than it must have ({found}, "
                    f"expected {wanted[number, rank]})",
                    "something else changes the engine's weights; restart the server",
                )


def refuse_connector(vllm_config: Any) -> None:
    """Keys and values kept outside of the engine outlive a reset, and are keyed by tokens alone.

    Raises:
        EngineError: the engine has such a store.
    """
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        raise EngineError(
            "the engine keeps keys and values in a connector (--kv-transfer-config), where those of another patch "
            "would be found after a switch",
            "serve without it, or with --expose: adapters have keys and values of their own",
        )
