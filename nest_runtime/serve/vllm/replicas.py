"""All ranks of all replicas behind one API server: ask each of them, and collect each answer.

With data parallelism, ``collective_rpc`` runs on every replica and returns the results of the first. Here each
replica's results come back, and a missing one is an error. Of vLLM 0.32 this uses ``AsyncLLM.collective_rpc``,
``pause_generation``, ``resume_generation``, ``reset_prefix_cache`` and the client's ``call_utility_all_async``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nest_runtime import errors
from nest_runtime.errors import EngineError, NestError

SECONDS = 120.0  # for one call on all ranks
Reports = list[list[dict[str, Any]]]

log = logging.getLogger("nest_runtime.serve.vllm")


class Replicas:
    """The workers of one engine client.

    Args:
        client: vLLM's ``AsyncLLM``.

    Raises:
        EngineError: some replicas are behind other API servers, or several API servers share these: a switch made
            here would not reach, or not be known to, all of them.
    """

    def __init__(self, client: Any) -> None:
        parallel = client.vllm_config.parallel_config
        self.client = client
        self._ranks = int(parallel.world_size)
        self._replicas = len(getattr(client.engine_core, "core_engines", ()) or (None,))
        if self._replicas != parallel.data_parallel_size:
            raise EngineError(
                f"this API server reaches {self._replicas} of {parallel.data_parallel_size} replicas",
                "let one API server balance all of them (no --data-parallel-external-lb or -hybrid-lb), or "
                "deploy replicas apart: docs/deploy",
            )
        if parallel._api_process_count != 1:
            raise EngineError(
                f"{parallel._api_process_count} API servers share the engine; a switch is known to one",
                "start with --api-server-count 1",
            )

    @property
    def alive(self) -> bool:
        """Whether the engine can answer."""
        return not self.client.errored

    async def call(self, method: str, *arguments: Any) -> Reports:
        """Run a method of the worker extension on every rank of every replica; replica → rank → its report.

        Raises:
            EngineError: a rank did not answer in time, or the engine is dead.
            NestError: whatever a rank reports, named as it is there.
        """
        try:
            async with asyncio.timeout(SECONDS):
                results = await self._everywhere(method, arguments)
        except TimeoutError:
            raise EngineError(f"{method} did not end on all ranks in {SECONDS:g} s", "see the engine's log") from None
        except NestError:
            raise
        except Exception as error:
            raise EngineError(f"{method} failed in the engine: {error}", "see the engine's log") from error
        self._check(method, results)
        return results

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """A context in which no step runs on any replica: what runs ends first, what comes waits."""
        await self.client.pause_generation(mode="wait", clear_cache=False)
        try:
            yield
        finally:
            await self.client.resume_generation()

    async def forget_prefixes(self) -> None:
        """Drop every cached key and value on every replica: they were computed under other weights.

        Raises:
            EngineError: a replica holds on to some.
        """
        if not await self.client.reset_prefix_cache(reset_running_requests=False, reset_connector=True):
            raise EngineError("a replica did not reset its prefix cache", "requests still run; try again")

    async def _everywhere(self, method: str, arguments: tuple[Any, ...]) -> Reports:
        if self._replicas == 1:
            return [await self.client.collective_rpc(method, timeout=SECONDS, args=arguments)]
        core = self.client.engine_core
        return list(await core.call_utility_all_async("collective_rpc", method, SECONDS, arguments, {}))

    def _check(self, method: str, results: Reports) -> None:
        counts = [len(ranks) for ranks in results]
        if counts != [self._ranks] * self._replicas:
            raise EngineError(
                f"{method}: {counts} ranks answered; expected {self._ranks} on each of {self._replicas} replicas",
                "see the engine's log",
            )
        for number, ranks in enumerate(results):
            for report in ranks:
                if "error" in report:
                    kind = getattr(errors, report["error"], EngineError)
                    kind = kind if isinstance(kind, type) and issubclass(kind, NestError) else EngineError
                    where = f"rank {report['rank']} of replica {number}"
                    raise kind(f"{where}: {report['message']}", report["hint"])
