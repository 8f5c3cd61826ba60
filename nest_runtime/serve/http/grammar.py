"""Answers that keep to a form: ``response_format`` as a rule on logits, by llguidance (the extra ``json``).

A rule belongs to one sequence, and a batch may mix sequences with and without rules. With a schema, a client puts
words into the model's mouth, as with a prefilled answer. So it is the operator's choice (``--allow-json-schema``).
``json_object``, which asks for some JSON object, contains nobody's words.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nest_runtime.serve.http.formats import ResponseFormat
from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.requests.sampling import Rule

MAX_SCHEMA = 64 * 1024  # characters
PARAM = "response_format"
# Room to breathe, and no end of it: a small model can write blanks until its answer is full.
_DEFAULTS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{1,32}"}

log = logging.getLogger("nest_runtime.serve.engine")


class Grammars:
    """Makes rules for one model's vocabulary.

    Args:
        tokenizer: the model's.
        rows: token ids that the model knows.
        ends: token ids that end an answer.
    """

    def __init__(self, tokenizer: Any, rows: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._rows, self._ends = tokenizer, rows, tuple(ends)
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def maker(self, wanted: ResponseFormat) -> Callable[[int], Rule] | None:
        """What makes the rule of one sequence, from the tokens of its prompt; None for plain text. Blocking.

        Raises:
            ApiError: 400; there is no llguidance here, the tokenizer is not one of its kind, or the schema says what it
                cannot hold an answer to.
        """
        if wanted.type == "text":
            return None
        if importlib.util.find_spec("llguidance") is None:
            raise _refused("this server lacks the package llguidance (pip install llguidance)", "unsupported_parameter")
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_ or {}
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise _refused(f"the schema has {len(text)} characters; at most {MAX_SCHEMA} are taken")
        from llguidance import LLMatcher

        vocabulary = self._known()
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_DEFAULTS)
            fault = LLMatcher.validate_grammar(grammar, vocabulary)
        except ValueError as error:
            fault = str(error)
        if fault:
            raise _refused(f"the schema cannot be used: {' '.join(fault.split())}")
        return lambda prompt: Form(LLMatcher(vocabulary, grammar), prompt, self._ends)

    def _known(self) -> Any:
        """The vocabulary as llguidance reads it; made once, at the first use."""
        import llguidance.hf

        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = llguidance.hf.from_tokenizer(
                        self._tokenizer,
                        n_vocab=max(self._rows, len(self._tokenizer)),
                        eos_token=list(self._ends) or None,
                    )
                except ValueError as error:
                    raise _refused(f"not with this model's tokenizer: {error}", "unsupported_parameter") from error
            return self._vocabulary


class Form:
    """Keeps one sequence to a grammar: a logits processor that remembers its position.

    There is always a token left to choose. If the grammar and the rules before it agree on none, the grammar's own
    tokens are equally likely; at the grammar's end, an end token remains.

    Args:
        matcher: llguidance's, at its beginning.
        prompt: tokens before the answer.
        ends: token ids that end an answer.
    """

    def __init__(self, matcher: Any, prompt: int, ends: Sequence[int]) -> None:
        self._matcher, self._read, self._ends = matcher, prompt, list(ends)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] with what the grammar forbids at minus infinity."""
        new = ids[0, self._read :].tolist()
        self._read += len(new)
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        allowed = self._allowed(scores.shape[-1]).to(scores.device)
        held = scores.masked_fill(~allowed, -torch.inf)
        if not bool((held > -torch.inf).any()):
            held = torch.zeros_like(scores).masked_fill(~allowed, -torch.inf)
        return held

    def _allowed(self, vocabulary: int) -> torch.Tensor:
        """Which tokens may come next, [vocabulary]."""
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        if not self._matcher.is_stopped():
            bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            each = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # (bytes, 8), the lowest bit first
            known = each.flatten()[:vocabulary].bool()
            allowed[: len(known)] = known
        if self._matcher.is_error():
            log.warning("an answer is ended: its grammar fails: %s", self._matcher.get_error())
            allowed[:] = False
        if not bool(allowed.any()):
            allowed[self._ends] = True
        return allowed


def _refused(why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{PARAM}: {why}", code=code, param=PARAM)
