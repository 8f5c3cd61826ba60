"""Log probabilities for clients: one entry for each token of an answer, beside its text.

They are the model's own, before temperature, penalties and rules. The end token has none, nor do tokens that a stop
string cut away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from nest_runtime.prompts.generate import special_tokens
from nest_runtime.serve.requests.detokenize import REPLACEMENT
from nest_runtime.serve.requests.sampling import Odds

LEAST = -9999.0  # what OpenAI writes for a token that could not come


@dataclass(frozen=True)
class TokenOdds:
    """One token of an answer.

    Attributes:
        token: its text.
        data: its bytes; None if they are not known. A token may be a part of a character.
        logprob: of the token.
        top: the likeliest tokens at its place, with theirs.
    """

    token: str
    data: bytes | None
    logprob: float
    top: tuple[TokenOdds, ...] = ()

    def for_chat(self) -> dict[str, Any]:
        """The entry of a chat completion."""
        return {**self._named(), "top_logprobs": [found._named() for found in self.top]}

    def _named(self) -> dict[str, Any]:
        return {"token": self.token, "logprob": self.logprob, "bytes": None if self.data is None else list(self.data)}


def for_completions(entries: Sequence[TokenOdds]) -> dict[str, Any]:
    """The object of a plain completion."""
    offsets, length = [], 0
    for entry in entries:
        offsets.append(length)
        length += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{found.token: found.logprob for found in entry.top} for entry in entries],
        "text_offset": offsets,
    }


@dataclass
class OddsOfChoice:
    """The entries of one choice, given out with its text: none for text that is held back."""

    tokenizer: Any
    _waiting: list[tuple[int, TokenOdds]] = field(default_factory=list, init=False)  # where its text begins
    _shown: int = field(default=0, init=False)
    _specials: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self._specials = special_tokens(self.tokenizer)

    def add(self, token: int, odds: Odds, start: int) -> None:
        """Take those of a token in, whose text begins at a character of the answer's."""
        top = tuple(self._entry(other, value) for other, value in odds.top)
        self._waiting.append((start, self._entry(token, odds.logprob, top)))

    def give(self, shown: int, *, ended: bool, cut: bool) -> tuple[TokenOdds, ...]:
        """The entries that go with the next text.

        Args:
            shown: its characters.
            ended: there is no more.
            cut: a stop string has ended it.
        """
        self._shown += shown
        whole = ended and not cut
        found = tuple(entry for start, entry in self._waiting if whole or start < self._shown)
        self._waiting = self._waiting[len(found) :]
        return found

    def _entry(self, token: int, logprob: float, top: tuple[TokenOdds, ...] = ()) -> TokenOdds:
        text = self._text(token)
        data = _part_of_character(self.tokenizer, token) if REPLACEMENT in text else text.encode()
        return TokenOdds(text, data, logprob if math.isfinite(logprob) else LEAST, top)

    def _text(self, token: int) -> str:
        """A token's text, with the space that it begins with: some tokenizers leave that away at the beginning."""
        if token in self._specials:
            return self._specials[token]
        alone = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if REPLACEMENT in alone:
            return str(alone)  # twice, it might be a character
        return str(self.tokenizer.decode([token, token], clean_up_tokenization_spaces=False)[len(alone) :])


def _part_of_character(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token that is no whole text, as byte-level tokenizers spell them, or those that fall back."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(found[1])
    known = {character: value for value, character in bytes_to_unicode().items()}
    return bytes(known[character] for character in name) if set(name) <= set(known) else None
