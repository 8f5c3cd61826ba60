"""How far a model's positions reach with one set of rotary frequencies.

LongRoPE (Phi-3-128k, Phi-3.5, Phi-4-mini) has two sets, and transformers chooses one for a whole pass by its longest
sequence. So a short request beside a long one would be computed with the other set, and its keys kept. A server uses
one set for its whole life: the short one, with the context ended at its end, or the long one if a longer context was
asked for. Dynamic scaling changes its frequencies beyond ``max_position_embeddings``, where no server goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nest_runtime.errors import EngineError

LONGROPE = "longrope"
FALLBACK_CONTEXT = 4096  # for models that say nothing


def context_of(model: Any, asked: int | None) -> int:
    """Tokens that a prompt and its answer may have together; settles which frequencies the model uses from now on.

    Args:
        model: the model.
        asked: what the operator wants, or None for what the model's frequencies are made for.

    Raises:
        EngineError: that is more than the model has positions.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and most is not None and asked > most:
        raise EngineError(f"a context of {asked} tokens was asked for; the model has {most} positions", "ask for less")
    short = short_context(model)
    if short is not None and asked is not None and asked > short:
        use_long(model)
    elif short is not None:
        return min(short, asked or short)
    return asked or most or FALLBACK_CONTEXT


def short_context(model: Any) -> int | None:
    """Tokens up to which the short set holds; None for a model that has but one set."""
    config = model.config.get_text_config()
    found = [int(p["original_max_position_embeddings"]) for p in _parameters(config) if p.get("rope_type") == LONGROPE]
    return min(found) if found else None


def use_long(model: Any) -> None:
    """Compute everything with the long set from now on."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        layers = [name for name, value in kind.items() if value == LONGROPE] if isinstance(kind, dict) else [None]
        if not isinstance(kind, dict) and kind != LONGROPE:
            continue
        for layer in layers:
            prefix = "" if layer is None else f"{layer}_"
            parameters = module.config.rope_parameters if layer is None else module.config.rope_parameters[layer]
            beyond = parameters["original_max_position_embeddings"] + 1
            held = getattr(module, f"{prefix}inv_freq")
            more = {} if layer is None else {"layer_type": layer}
            long, _ = ROPE_INIT_FUNCTIONS[LONGROPE](module.config, held.device, seq_len=beyond, **more)
            held.copy_(long)
            setattr(module, f"{prefix}original_inv_freq", long)  # what a pass of short sequences takes
            setattr(module, f"{prefix}long_inv_freq", long)


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The rope parameters of a config, of each kind of layer where these differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, dict))
