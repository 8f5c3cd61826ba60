"""Finds the request that failed a pass, by trying its requests in ever smaller groups.

A pass holds tokens of many requests. When it raises, or gives values that are not finite, none of them can be trusted
or blamed: one request's NaN reaches the others through attention. So all restart from their tokens, first by patch,
then in halves. A group whose members each get a token is cleared; a group of one that fails is to blame. A request
that was alone in the failed pass is tried once more like the others: the failure may have been the machine's, or left
behind by an earlier request. Only names here: recovery.py moves the requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable


class Trials:
    """One engine's search for who failed.

    Args:
        patch_of: gives the patch key of a request by its id.

    Attributes:
        group: the requests that run now, and nobody beside them; empty while there is nothing to find out.
    """

    def __init__(self, patch_of: Callable[[str], str | None]) -> None:
        self.group: tuple[str, ...] = ()
        self._patch_of = patch_of
        self._next: deque[tuple[str, ...]] = deque()

    def failed(self, suspects: Iterable[str]) -> str | None:
        """A pass of these requests failed; returns the one to blame, if there is only one. ``advance`` is next."""
        group, tried, self.group = tuple(suspects), bool(self.group), ()
        if len(group) == 1:
            if tried:
                return group[0]
            self._next.appendleft(group)
            return None
        by_patch: dict[str | None, list[str]] = {}
        for name in group:
            by_patch.setdefault(self._patch_of(name), []).append(name)
        half = len(group) // 2
        parts = list(map(tuple, by_patch.values())) if len(by_patch) > 1 else [group[:half], group[half:]]
        self._next.extendleft(reversed([part for part in parts if part]))
        return None

    def advance(self) -> tuple[str, ...]:
        """Go to the next group and return it; empty when all have been tried."""
        self.group = self._next.popleft() if self._next else ()
        return self.group

    def first(self, name: str) -> None:
        """Try this one before any other."""
        self._next.appendleft((name,))
