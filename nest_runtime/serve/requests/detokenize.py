"""From tokens to text, piece by piece: a stream shows exactly the same text as the whole answer.

Two things are held back until they are certain: characters whose bytes are not complete yet, and text that may be the
beginning of a stop string. Special tokens are never shown, and stop strings match them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nest_runtime.prompts.generate import special_tokens

REPLACEMENT = "�"


class Detokenizer:
    """Text of a growing list of tokens.

    Only a short window is decoded for each token. It starts a little before the new tokens, because
    a tokenizer may write a token differently after another one (leading spaces, byte tokens).

    Args:
        tokenizer: a transformers tokenizer; special tokens give no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _decoder(tokenizer)
        self._tokens: list[int] = []
        self._start = 0  # where the window begins
        self._read = 0  # tokens whose text has been given out

    def add(self, tokens: Sequence[int]) -> str:
        """Take tokens in; returns the text that is certain by now."""
        pieces = []
        for token in tokens:
            self._tokens.append(token)
            pieces.append(self._advance(final=False))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest, when no token will follow; incomplete bytes become U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        known = self._decode(self._tokens[self._start : self._read])
        window = self._decode(self._tokens[self._start :])
        if len(window) <= len(known) or (window.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return window[len(known) :]


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids → text without special tokens; by the Rust tokenizer itself, which is quicker, where it is the same."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if isinstance(tokenizer, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopScanner:
    """Cuts text at the first stop string, and holds back what may become one.

    Args:
        stops: non-empty strings; none of them is part of the answer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[str] = []  # of each character of that, itself, or nothing where it is not to be shown
        self.stopped = False

    def add(self, text: str, *, hidden: bool = False) -> str:
        """Take text in; returns what is certainly part of the answer. Sets ``stopped`` at a stop string.

        Args:
            text: what comes next.
            hidden: it is matched, and never given out.
        """
        if self.stopped:
            return ""
        self._held += text
        self._shown.extend([""] * len(text) if hidden else text)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._partial())

    def finish(self) -> str:
        """What was held back, when no text will follow."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text = "".join(self._shown[:count])
        self._held, self._shown = self._held[count:], self._shown[count:]
        return text

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


class AnswerText:
    """The text of one choice: detokenized, and cut at stop strings.

    Attributes:
        length: characters so far, those that are held back included.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._specials = special_tokens(tokenizer) if stops else {}
        self.length = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._scanner.stopped

    def add(self, token: int) -> str:
        """Take one token in; returns the text to show now."""
        found = self._detokenizer.add([token])
        self.length += len(found)
        text = self._scanner.add(found)
        if token in self._specials:
            text += self._scanner.add(self._specials[token], hidden=True)
        return text

    def finish(self) -> str:
        """The text held back so far, when no token will follow."""
        return self._scanner.add(self._detokenizer.finish()) + self._scanner.finish()
