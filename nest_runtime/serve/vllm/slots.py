"""Adapter slots: how many patches may be loaded at once, and what must hold on every rank for them to be right.

vLLM keeps adapters in ``max_loras`` slots. On CPUs, requests without an adapter that share a batch with requests that
have one are given the last slot's (seen with 0.32.0), even an adapter unloaded since. So one more slot is asked for
than is ever used: slots are filled from the first on, and the last stays empty. Needs no vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nest_runtime.errors import EngineError, StoreError

DEFAULT_PATCHES = 7  # besides the spare slot: 8 slots
SPARE = 1
BASE_NAME = "nest-base"  # the engine's name for the model itself; no client uses it
PLUGIN = "nest_runtime"  # our name among vLLM's plugins


class Slots:
    """Which patch has which adapter id. Ids are never used twice: another content is another adapter.

    Args:
        max_loras: slots of the engine; one of them is kept empty.

    Raises:
        EngineError: that leaves none.
    """

    def __init__(self, max_loras: int) -> None:
        self.capacity = max_loras - SPARE
        if self.capacity < 1:
            raise EngineError(
                f"the engine has {max_loras} adapter slots; one is kept empty, so at least 2 are needed",
                "give --max-loras 2 or more, one more than patches are to be loaded",
            )
        self._ids: dict[str, int] = {}
        self._next = itertools.count(1)

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, digest: str) -> int:
        """The adapter id of a patch, a new one at first. Raises StoreError if all slots are taken."""
        if digest not in self._ids:
            if len(self._ids) >= self.capacity:
                raise StoreError(
                    f"{len(self._ids)} patches are loaded, as many as the engine has slots for",
                    "remove one first, or start with more --max-loras",
                )
            self._ids[digest] = next(self._next)
        return self._ids[digest]

    def id_of(self, digest: str) -> int | None:
        """The adapter id of a patch that is loaded."""
        return self._ids.get(digest)

    def release(self, digest: str) -> None:
        """Free a patch's slot."""
        self._ids.pop(digest, None)

    def check(self, reports: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Every rank of every replica holds every loaded adapter, no other, and none in the last slot.

        Args:
            reports: replica → rank → ``slots``, the id in each slot, 0 for none.

        Raises:
            EngineError: one does not; the message says which.
        """
        wanted = set(self._ids.values())
        for number, ranks in enumerate(reports):
            for report in ranks:
                slots = report["slots"]
                where = f"rank {report['rank']} of replica {number}"
                if slots[-1]:
                    raise EngineError(
                        f"{where} has adapter {slots[-1]} in its last slot, which must stay empty: "
                        "requests for the base would be answered by it",
                        "restart the server; load adapters through the admin API only",
                    )
                held = {adapter for adapter in slots if adapter}
                if held != wanted:
                    raise EngineError(
                        f"{where} holds adapters {sorted(held)}; expected {sorted(wanted)}",
                        "restart the server; load adapters through the admin API only",
                    )


def adapter_name(digest: str) -> str:
    """What an adapter is called in the engine: by content, since vLLM keys its cache of prefixes by the name.

    New content under an old name would read keys and values of the old content.
    """
    return f"nest-{digest.removeprefix('sha256:')}"
