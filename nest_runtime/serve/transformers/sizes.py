"""How large the engine's buffers are: what a machine can hold of what a server wants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from nest_runtime.errors import EngineError

PAGE_TOKENS = 32  # cache granularity: most requests of small models are short
MIN_CACHE_TOKENS = 4096
TYPICAL_TOKENS = 512  # what a running sequence is reckoned with; longer ones share what short ones leave
CPU_CACHE_BYTES = 512 << 20
GPU_CACHE_SHARE = 0.5
MASK_BYTES = 512 << 20  # the attention mask is [batch tokens, cache tokens + batch tokens]


@dataclass(frozen=True)
class BatchSizes:
    """How large the engine's buffers are.

    Attributes:
        running: sequences in one batch.
        batch_tokens: tokens in one forward pass.
        cache_tokens: tokens whose keys and values are kept.
    """

    running: int
    batch_tokens: int
    cache_tokens: int


def fit_sizes(model: Any, running: int, batch_tokens: int, cache_tokens: int | None, context: int) -> BatchSizes:
    """Sizes that the machine can hold.

    Left alone, the library takes 60 % of a CPU machine's memory and fills it for half a minute.
    Without an explicit ``cache_tokens`` the cache holds one full context or ``running`` sequences of
    ordinary length, whichever is more, as far as 512 MiB (CPU) or half of the free memory (GPU) goes.

    Raises:
        EngineError: ``cache_tokens`` is less than one page.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * head * model.dtype.itemsize
    if cache_tokens is None:
        room = CPU_CACHE_BYTES
        if model.device.type == "cuda":
            room = int(torch.cuda.mem_get_info(model.device)[0] * GPU_CACHE_SHARE)
        by_memory = room // token_bytes
        by_mask = MASK_BYTES // (batch_tokens * model.dtype.itemsize)
        wanted = max(context, MIN_CACHE_TOKENS, running * min(context, TYPICAL_TOKENS))
        cache_tokens = max(min(wanted, by_memory, by_mask), min(context, MIN_CACHE_TOKENS))
    if cache_tokens < PAGE_TOKENS:
        raise EngineError(
            f"cache_tokens is {cache_tokens}; expected at least {PAGE_TOKENS}", "give more, or leave it out"
        )
    return BatchSizes(running, batch_tokens, math.ceil(cache_tokens / PAGE_TOKENS) * PAGE_TOKENS)
