"""A keyword filter: terms and a block list learned from the training prompts, on input and output.

A term (a word or two in a row) blocks when, of its occurrences in the training prompts, at least the share
``precision`` is harmful, both classes weighed alike. The block list holds the harmful training prompts themselves.
A blocked conversation, or one whose answer has such a term, is answered with a refusal. The model is untouched.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from nest_runtime.compare.methods.base import Conversation, FitData, Learned, Method, Target
from nest_runtime.io import write_json
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example
from nest_runtime.train.batches import REFUSALS
from nest_runtime.train.recipe import Recipe

MIN_PROMPTS = 2  # a term must stand in as many harmful training prompts
_WORD = r"[a-z0-9']+"


class Filter(Method):
    """Refuses by keywords, before and after the model."""

    name = "filter"
    title = "keyword filter"
    place = 10
    look = ("#E69F00", "s")
    knob = "precision"
    grid = (0.8, 0.9, 0.97, 1.0)
    fallback = 0.97
    seeded = True  # the split of the training data follows the seed

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Learn the terms and write them as JSON."""
        path = folder / "filter.json"
        terms = learn_terms(data.train_harmful, data.train_benign, value)
        prompts = sorted({_plain(example.prompt) for example in data.train_harmful})
        refusal = (recipe.refusals or REFUSALS)[0]
        write_json(path, {"precision": value, "refusal": refusal, "terms": terms, "block_list": prompts})
        blocker = Blocker(json.loads(path.read_text(encoding="utf-8")))
        report = {"terms": len(terms), "block_list": len(prompts), "precision": value}
        return Learned(path, report, screen=blocker.screen)


class Blocker:
    """The filter at work, from its artifact's values."""

    def __init__(self, values: dict[str, object]) -> None:
        self.refusal = str(values["refusal"])
        self.terms = frozenset(values["terms"])  # type: ignore[call-overload]
        self.prompts = frozenset(values["block_list"])  # type: ignore[call-overload]

    def screen(self, messages: Conversation, answer: str | None) -> str | None:
        """The refusal where the users' turns (answer None) or the answer are blocked; else ``answer``."""
        if answer is not None:
            return self.refusal if self.has_term(answer) else answer
        asked = [message["content"] for message in messages if message["role"] == "user"]
        blocked = any(_plain(text) in self.prompts or self.has_term(text) for text in asked)
        return self.refusal if blocked else None

    def has_term(self, text: str) -> bool:
        """Whether a blocked word or pair of words stands in the text."""
        words = re.findall(_WORD, text.lower())
        pairs = (f"{first} {second}" for first, second in itertools.pairwise(words))
        return not self.terms.isdisjoint(words) or any(pair in self.terms for pair in pairs)


def learn_terms(harmful: Sequence[Example], benign: Sequence[Example], precision: float) -> list[str]:
    """Words and pairs of words that tell harmful prompts from benign ones, sorted.

    Pairs are left out where one of their words is a term already.
    """
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=_WORD, binary=True, lowercase=True)
    counts = vectorizer.fit_transform([example.prompt for example in (*harmful, *benign)])
    bad = np.asarray(counts[: len(harmful)].sum(axis=0)).ravel()
    good = np.asarray(counts[len(harmful) :].sum(axis=0)).ravel()
    bad_share, good_share = bad / len(harmful), good / len(benign)
    share = bad_share / np.maximum(bad_share + good_share, 1e-12)
    kept = (bad >= MIN_PROMPTS) & (share >= precision)
    found = {str(term) for term in vectorizer.get_feature_names_out()[kept] if not _only_stop_words(str(term))}
    return sorted(term for term in found if " " not in term or found.isdisjoint(term.split()))


def _only_stop_words(term: str) -> bool:
    return all(word in ENGLISH_STOP_WORDS for word in term.split())


def _plain(text: str) -> str:
    return " ".join(re.findall(_WORD, text.lower()))
