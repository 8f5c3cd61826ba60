"""Greedy decoding of one padded batch: a beginning that all prompts share is computed once, and ended rows leave.

It stands in for the inner loop of ``model.generate``, which prepares everything as ever: its processors choose the
tokens and its criteria end the rows. Only models whose whole memory of a prompt is keys and values of plain attention
are decoded so; for all others ``generate`` goes its own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST_SHARED = 8  # tokens; a shorter beginning is not worth a pass of its own
LEAVING = 8  # rows leave when one in so many has ended: taking them out copies all keys and values
_NEEDED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "logits_to_keep"}


def _inner(model: Any) -> Any:
    """The model itself, out of what torch.compile and PEFT put around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def last_logits(model: Any) -> dict[str, torch.Tensor]:
    """The argument that asks a model, or its ``generate``, for the logits of the last position alone; {} if none does.

    It is an int64 tensor of shape (1,).
    ``generate`` asks for the last one by number, and the model slices. On such a slice of a longer pass torch's linear
    is slower than on the same rows by index: in bfloat16 on a CPU 70 ms instead of 41 for Qwen2.5-0.5B's head and 8
    rows, and 5.8 s where the weights are frozen (it then multiplies row by row).
    """
    if "logits_to_keep" not in inspect.signature(_inner(model).forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=model.get_input_embeddings().weight.device)}


def plain_attention(model: Any) -> bool:
    """Whether a model takes positions and a cache, and keeps nothing of a prompt but keys and values of every token."""
    inner = _inner(model)
    config: Any = inner.config
    if config.is_encoder_decoder or not set(inspect.signature(inner.forward).parameters) >= _NEEDED:
        return False
    try:
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    except (AttributeError, TypeError, ValueError):  # a configuration that the library makes no such cache for
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, each keeping one of its own; 0 where that is too few to matter."""
    least, most = min(map(list, rows)), max(map(list, rows))
    length = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    length = min(length, min(len(row) for row in rows) - 1)
    return length if len(rows) > 1 and length >= LEAST_SHARED else 0


class Decoding:
    """The inner loop for batches whose first ``shared`` columns are the same in all rows (``custom_generate``)."""

    def __init__(self, shared: int = 0) -> None:
        self.shared = shared

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Tokens (rows, width + new) as ``generate`` gives them; ended rows are filled with the padding token."""
        if set(model_kwargs) - _KNOWN:
            own = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            return model._sample(input_ids, generation_config=generation_config, **own, **model_kwargs)
        ids, device = input_ids, input_ids.device
        mask = model_kwargs.get("attention_mask")
        if mask is None:  # nothing is padded
            mask = torch.ones_like(ids)
        cache, logits = self._read(model, ids, mask)
        places = torch.arange(len(ids), device=device)  # of the rows that are still in the batch
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        new: list[torch.Tensor] = []
        while True:
            tokens = logits_processor(ids, logits).argmax(dim=-1)
            column = ids.new_full((len(input_ids),), int(generation_config.pad_token_id or 0))
            new.append(column.index_copy(0, places, torch.where(ended, column[0], tokens)))
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            ended = ended | stopping_criteria(ids, None)
            count = int(ended.sum())
            if count == len(ended):
                return torch.cat([input_ids, torch.stack(new, dim=-1)], dim=-1)
            if count * LEAVING >= len(ended):
                stay = (~ended).nonzero()[:, 0]
                ids, mask, places, ended = ids[stay], mask[stay], places[stay], ended[stay]
                cache.batch_select_indices(stay)
            logits = _forward(model, ids[:, -1:], mask, cache)

    def _read(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
        """The cached keys and values of the prompts (rows, width), and the logits (rows, vocabulary) after them."""
        config: Any = _inner(model).config
        cache = DynamicCache(config=config.get_text_config(decoder=True))
        if self.shared:
            _forward(model, ids[:1, : self.shared], mask[:1, : self.shared], cache)
            cache.batch_repeat_interleave(len(ids))
        return cache, _forward(model, ids[:, self.shared :], mask, cache)


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits float32 (rows, vocabulary) behind some more tokens of every row; padding is where ``mask`` is 0."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **last_logits(model),
    )
    return output.logits[:, -1].to(torch.float32, copy=True)


def shares_well(model: Any, row: Sequence[int]) -> bool:
    """Whether a prompt read in two parts, with padding between them, ends in the logits of the prompt read at once."""
    device = model.get_input_embeddings().weight.device
    cut, hole = len(row) // 2, 3
    whole = torch.tensor([list(row)], device=device)
    parts = torch.tensor([[*row[:cut], *[row[0]] * hole, *row[cut:]]], device=device)
    mask = torch.ones_like(parts)
    mask[:, cut : cut + hole] = 0
    with torch.no_grad():
        config: Any = _inner(model).config
        plain = _forward(
            model, whole, torch.ones_like(whole), DynamicCache(config=config.get_text_config(decoder=True))
        )
        _, ours = Decoding(cut)._read(model, parts, mask)
    limit = 1e-3 if model.dtype == torch.float32 else 0.05
    return float((ours - plain).norm()) <= limit * float(plain.norm())
