"""A request that runs alone is computed as ``model.generate`` computes it: with the model's own causal attention.

The library gives every pass a mask, which keeps the requests of a flat batch apart. Under a mask, the heads that share
keys are computed in one product, otherwise one by one. The last bit of the two differs at times, and in bfloat16 that
is enough to choose another token (docs/decisions/chat-and-serve.md). A pass of one request needs no mask if it reads a
prompt from its beginning, or one more token.
"""

from __future__ import annotations

from typing import Any

FULL = {"full_attention"}  # the library's name of attention that sees all that came before


def leave_out_needless_masks(inputs: Any, model: Any) -> None:
    """Make the inputs of passes that need no mask without one.

    Args:
        inputs: the library's ``inputs_and_outputs`` of one batch.
        model: the model that they are for.
    """
    make = inputs.get_model_kwargs

    def model_kwargs(use_padding: bool = False) -> Any:
        """The library's own, without the mask where none is needed."""
        found = make(use_padding)
        alone = inputs.num_request_in_batch == 1 and not use_padding
        if alone and inputs.num_q_tokens == 1:
            found["attention_mask"] = None
        elif alone and inputs.max_kv_read == 0:
            found |= {"attention_mask": None, "is_causal": True}
        return found

    # Sliding windows need their mask; eager attention has nothing else that says what comes before what.
    if model.config._attn_implementation == "sdpa" and set(inputs.cumulative_seqlens_k) == FULL:
        inputs.get_model_kwargs = model_kwargs
