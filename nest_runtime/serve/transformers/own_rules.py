"""What a model's own generation config asks of its logits, as transformers' processors: one list for each sequence.

Sampling itself (temperature, top-k, top-p, min-p) is in serve/requests/sampling.py. Settings that cannot be honored are
named, so that the server can report them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

Rules = Callable[[int, int], list[LogitsProcessor]]
"""From the tokens of a prompt and the new ones it may get to the processors of that sequence."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0.0),
    "stop_strings": (None,),
    "watermarking_config": (None,),
}


def not_honoured(config: Any) -> list[str]:
    """The fields of a generation config that ask for something that serving does not do."""
    return [name for name, neutral in _NEUTRAL.items() if getattr(config, name, None) not in neutral]


def own_rules(config: Any, ends: Sequence[int], device: torch.device) -> Rules:
    """What a generation config asks of every answer, in the order in which ``model.generate`` does it.

    Args:
        config: the model's, or None.
        ends: token ids that end an answer; those that a minimal length holds back.
        device: where logits are.
    """
    eos = torch.tensor(list(ends), device=device)

    def get(name: str, neutral: Any = None) -> Any:
        value = getattr(config, name, None)
        return None if value == neutral else value

    def rules(prompt: int, new: int) -> list[LogitsProcessor]:
        """The rules of one answer, of ``new`` tokens behind a prompt of ``prompt``."""
        found: list[LogitsProcessor] = []
        if (bias := get("sequence_bias")) is not None:
            found.append(SequenceBiasLogitsProcessor(bias))
        if (penalty := get("repetition_penalty", 1.0)) is not None:
            found.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        if (size := get("no_repeat_ngram_size", 0)) is not None:
            found.append(NoRepeatNGramLogitsProcessor(size))
        if (words := get("bad_words_ids")) is not None:
            found.append(NoBadWordsLogitsProcessor(words, eos if ends else None))
        if ends and (length := get("min_length", 0)) is not None:
            found.append(MinLengthLogitsProcessor(length, eos, device=str(device)))
        if ends and (least := get("min_new_tokens", 0)) is not None:
            found.append(MinNewTokensLengthLogitsProcessor(prompt, least, eos, device=str(device)))
        if (token := get("forced_bos_token_id")) is not None:
            found.append(ForcedBOSTokenLogitsProcessor(token))
        if (token := get("forced_eos_token_id")) is not None:
            found.append(ForcedEOSTokenLogitsProcessor(prompt + new, token, device=str(device)))
        if ends and (decay := get("exponential_decay_length_penalty")) is not None:
            found.append(ExponentialDecayLengthPenalty(decay, eos, prompt))
        if (tokens := get("suppress_tokens")) is not None:
            found.append(SuppressTokensLogitsProcessor(tokens, device=str(device)))
        if (tokens := get("begin_suppress_tokens")) is not None:
            found.append(SuppressTokensAtBeginLogitsProcessor(tokens, prompt, device=str(device)))
        return found

    return rules


def no_rules(prompt: int, new: int) -> list[LogitsProcessor]:
    """Nothing is asked."""
    return []
