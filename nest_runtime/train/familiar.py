"""Whether given answers look foreign to a model: how much they cost it compared with its own.

A patch tuned on benign answers in another voice takes over that voice. A few rows are enough to tell. Nothing is
trained here; the model's weights are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nest_runtime.prompts.content import images_of
from nest_runtime.prompts.examples import Example, encode
from nest_runtime.prompts.generate import generate_answers, pad_token_id
from nest_runtime.train.forward import Readout, device_of, pad_rows

ROWS = 8  # looked at, spread over the file
TOKENS = 32  # of each answer
FOREIGN = 3.5  # nats per token that make a look at the model's own answers worth its while
APART = 2.0  # nats per token above its own


def foreign_note(model: Any, tokenizer: Any, examples: Sequence[Example], name: str) -> str | None:
    """A warning if the given responses look foreign to the model, else None.

    Args:
        model: the bare base in eval mode.
        tokenizer: its tokenizer.
        examples: benign prompts; those without a response, and those with images, are ignored.
        name: the model's, for the sentence.
    """
    given = [item for item in examples if item.response and item.response.strip() and not images_of(item.messages)]
    chosen = given[:: max(len(given) // ROWS, 1)][:ROWS]
    if not chosen:
        return None
    cost = answer_loss(model, tokenizer, chosen, [item.response or "" for item in chosen])
    if cost < FOREIGN:
        return None
    own = generate_answers(model, tokenizer, [item.messages for item in chosen], max_new_tokens=TOKENS)
    said = [(item, text) for item, text in zip(chosen, own, strict=True) if text]
    if not said:
        return None
    usual = answer_loss(model, tokenizer, [item for item, _ in said], [text for _, text in said])
    if cost < usual + APART:
        return None
    return (
        f"the benign responses look foreign to {name}: {cost:.1f} nats a token over {len(chosen)} of them, its own "
        f"answers {usual:.1f}; the patch will learn their voice. Leave `response` out to keep the model's own answers"
    )


def answer_loss(model: Any, tokenizer: Any, examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Mean loss in nats per token of the first ``TOKENS`` tokens of each answer."""
    prompts = [encode(tokenizer, example.messages) for example in examples]
    texts = [tokenizer(answer, add_special_tokens=False)["input_ids"][:TOKENS] for answer in answers]
    ids, mask = pad_rows(
        [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)],
        pad_token_id(model, tokenizer),
        device_of(model),
    )
    where = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)  # (rows, width): the next token is an answer's
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        where[row, len(prompt) - 1 : len(prompt) - 1 + len(text)] = True
    targets = torch.tensor([token for text in texts for token in text], device=ids.device)
    with torch.no_grad():
        return float(cross_entropy(Readout(model).logits(ids, mask, where), targets))
