"""Reads text in which nothing is a control token, between control tokens that are given by their ids.

It uses a copy of the tokenizer whose control tokens have names that nobody can type. Everything else that the
tokenizer does (normalize, split, merge, add a space at the beginning) applies to the text as a whole, as usual.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from nest_runtime.errors import DataError

_HINT = "use the model's own tokenizer.json; serve --allow-special-tokens does without"


class Reader:
    """Reads pieces of text and control tokens as one text.

    Where there is no fast tokenizer to copy, the pieces are read one by one.

    Args:
        tokenizer: the tokenizer.
        backend: its fast tokenizer, or None.
        ids: of each text that is a control token to it.
    """

    def __init__(self, tokenizer: Any, backend: Any, ids: Mapping[str, int]) -> None:
        self._tokenizer, self._backend, self._ids = tokenizer, backend, ids
        secret = f"{secrets.randbelow(10**30):030}"
        self._names = {index: f"<{secret}:{index}>" for index in ids.values()}
        self._copy: Any = None
        self._making = threading.Lock()

    def prepare(self) -> None:
        """Make the copy, which takes a second for a large vocabulary; it is made when first needed otherwise.

        Raises:
            DataError: the tokenizer cannot be copied so.
        """
        with self._making:
            if self._copy is None and self._backend is not None:
                self._copy = self._make()

    def read(self, pieces: Sequence[str | int], *, special: bool) -> list[int]:
        """Token ids of text and control tokens.

        Args:
            pieces: texts, and ids of control tokens.
            special: put the tokenizer's own special tokens around it.

        Raises:
            DataError: see :meth:`prepare`.
        """
        if self._backend is None:
            return self._one_by_one(pieces, special)
        self.prepare()
        text = "".join(piece if isinstance(piece, str) else self._names[piece] for piece in pieces)
        return list(self._copy.encode(text, add_special_tokens=special).ids)

    def _make(self) -> Any:
        from tokenizers import Tokenizer

        renamed = {text: self._names[index] for text, index in self._ids.items()}
        try:
            copy = Tokenizer.from_str(json.dumps(_renamed(json.loads(self._backend.to_str()), renamed)))
        except Exception as error:  # tokenizers raises nothing narrower
            raise DataError(f"the tokenizer cannot be copied to read control tokens as text: {error}", _HINT) from error
        copy.no_truncation()
        copy.no_padding()
        for text, index in self._ids.items():
            if copy.token_to_id(renamed[text]) != index:
                raise DataError(f"the tokenizer's control token {text!r} is more than the id {index}", _HINT)
        return copy

    def _one_by_one(self, pieces: Sequence[str | int], special: bool) -> list[int]:
        found: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                found.append(piece)
            elif piece:
                found += self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(self._tokenizer.build_inputs_with_special_tokens(found)) if special else found


def _renamed(spec: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json whose control tokens have other names: their old ones are ordinary text wherever they stand."""
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): index for text, index in vocabulary.items()}
    else:  # Unigram: texts with their scores
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    return spec
