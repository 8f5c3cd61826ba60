"""What one request asks of its logits, after what the model's generation config asks (transformers/own_rules.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from transformers import RepetitionPenaltyLogitsProcessor

from nest_runtime.serve.http.problems import schemas_closed
from nest_runtime.serve.http.schemas import ChatRequest, Sampling
from nest_runtime.serve.requests.sampling import Rule

if TYPE_CHECKING:
    from nest_runtime.serve.http.grammar import Grammars
    from nest_runtime.serve.limits import Allowed


def makers_of(body: Sampling, allowed: Allowed, grammars: Grammars | None) -> tuple[Callable[[int], Rule], ...]:
    """What makes the rules of each of a request's sequences, from the tokens of its prompt.

    Blocks where a grammar is made. Raises ApiError 400 where its form cannot be had, or is not allowed.
    """
    found: list[Callable[[int], Rule]] = []
    if body.repetition_penalty not in (None, 1.0):
        found.append(partial(_repetition, body.repetition_penalty))
    wanted = body.response_format if isinstance(body, ChatRequest) else None
    if wanted is not None:
        if wanted.json_schema is not None and not allowed.schemas:
            raise schemas_closed()
        form = None if grammars is None else grammars.maker(wanted)
        if form is not None:
            found.append(form)  # the last: nothing after it may rule out what it leaves
    return tuple(found)


def _repetition(penalty: float, prompt: int) -> Rule:
    """Of the answer's own tokens: of the prompt's too, a client could make the words of a refusal unlikely."""
    rule: Rule = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=prompt)
    return rule
