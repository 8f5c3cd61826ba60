"""Keys and values of earlier requests are reused, but only under the patch that they were computed under.

The engine's library (transformers 5.23) shares whole pages of its cache between requests that begin alike. It knows a
page by a hash over its tokens and those before it, and does not know patches. Here the tokens of a request's first
page are mixed with numbers of its patch before they are hashed. Later hashes include the first, so nothing of one
patch can match anything of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_TOKEN_BYTES = 4


class Prefixes:
    """Wraps a cache's tables of known pages; lives as long as the cache.

    Args:
        cache: the library's ``PagedAttentionCache``.
        page: tokens in one of its pages.
        patch_of: returns the patch key of a request by its id; None is the base.

    Attributes:
        reused: prompt tokens so far whose keys and values were cached.
    """

    def __init__(self, cache: Any, page: int, patch_of: Callable[[str], str | None]) -> None:
        self.reused = 0
        self._patch_of = patch_of
        self._page = page
        self._search = cache.search_prefix_match
        cache.search_prefix_match = self._found
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._marking(allocator.mark_complete_blocks)

    def _found(self, request_id: str, prompt: list[int]) -> int:
        count: int = self._search(request_id, self._marked(request_id, prompt))
        self.reused += count
        return count

    def _marking(self, register: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        def marked(request_id: str, tokens: list[int], new_blocks: int) -> None:
            register(request_id, self._marked(request_id, tokens), new_blocks)

        return marked

    def _marked(self, request_id: str, tokens: list[int]) -> list[int]:
        marks = patch_marks(self._patch_of(request_id), self._page)
        return [token ^ mark for token, mark in zip(tokens, marks, strict=False)] + tokens[self._page :]


@lru_cache(maxsize=256)
def patch_marks(patch: str | None, count: int) -> tuple[int, ...]:
    """``count`` numbers below 2³¹ that belong to a patch, from its key by SHAKE-256; zeros for the base."""
    if patch is None:
        return (0,) * count
    data = hashlib.shake_256(patch.encode()).digest(_TOKEN_BYTES * count)
    words = (data[at : at + _TOKEN_BYTES] for at in range(0, len(data), _TOKEN_BYTES))
    return tuple(int.from_bytes(word, "big") >> 1 for word in words)
