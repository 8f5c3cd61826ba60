"""One greedy answer to one conversation, piece by piece: what the terminal and the page in the browser show.

Whatever patch is active in the caller's context answers; nothing here switches patches. Many conversations at once
are answered by generate.py, those of a server by serve/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextStreamer

from nest_runtime.errors import UsageError
from nest_runtime.prompts.decoding import last_logits
from nest_runtime.prompts.examples import encode
from nest_runtime.prompts.generate import end_token_ids, greedy_config

OnText = Callable[[str], None]


@dataclass(frozen=True)
class ChatAnswer:
    """An answer: its text, how many tokens it took, and whether the limit cut it short."""

    text: str
    tokens: int
    cut: bool


def answer_chat(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    on_text: OnText | None = None,
    stopped: Callable[[], bool] = lambda: False,
    too_long: str = "ask something shorter, or begin a new conversation",
) -> ChatAnswer:
    """The model's greedy answer.

    Args:
        model: a causal LM; used as it is (device, dtype, active patch).
        tokenizer: its tokenizer.
        messages: the conversation, ending with the user's turn.
        max_tokens: the longest answer; less where the model has no room for it.
        on_text: called with pieces of the answer as they come.
        stopped: asked after every token whether to leave off.
        too_long: what to do about a conversation that is too long, for the error's hint.

    Raises:
        UsageError: the conversation leaves no room for an answer.
    """
    prompt = encode(tokenizer, messages)
    limit = min(max_tokens, _room(model, len(prompt), too_long))
    config = greedy_config(model, tokenizer, limit)
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)  # (1, tokens)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=None if on_text is None else _Pieces(tokenizer, on_text),
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: stopped()]),
            **last_logits(model),
        )
    made = output[0, len(prompt) :].tolist()
    text = str(tokenizer.decode(made, skip_special_tokens=True)).strip()
    return ChatAnswer(text, len(made), len(made) >= limit and made[-1] not in end_token_ids(model, tokenizer))


def _room(model: Any, tokens: int, too_long: str) -> int:
    """How many tokens an answer may have behind a prompt of so many."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return 1 << 30
    if tokens >= limit:
        raise UsageError(
            f"the conversation has {tokens:,} tokens; the model reads at most {limit:,} with its answer", too_long
        )
    return limit - tokens


class _Pieces(TextStreamer):
    """Gives text away as it is complete."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of the answer."""
        if text:
            self._on_text(text)
