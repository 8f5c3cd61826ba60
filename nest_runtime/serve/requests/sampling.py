"""Choosing the next token, row by row: every sequence of a batch has its own settings and its own random numbers.

A sequence draws one uniform number per token from its own generator. So its answer depends on its seed and on its own
logits, and on nothing else in the batch. Pure functions over logits and one small class for the random numbers;
nothing here knows the engine.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

GREEDY_BELOW = 1e-5  # a temperature under this divides logits beyond what numbers hold, and means the likeliest token
Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A logits processor: token ids [1, tokens] and logits [1, vocabulary] → logits."""


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled.

    Attributes:
        temperature: 0 is greedy, and so is whatever is under ``GREEDY_BELOW``.
        top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
        top_k: keep this many likeliest tokens, or None for all.
        min_p: keep tokens of at least this share of the likeliest one's probability.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens already generated
            (once, and once per occurrence), as OpenAI documents them.
        seed: makes the answer reproducible, or None for a fresh one.
        logprobs: how many of the likeliest tokens to tell at each place, with their log probabilities and the chosen
            token's; None tells nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether tokens already generated lower the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Odds:
    """How likely a chosen token was, and what was likeliest in its place: the model's own log probabilities."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """The dice and the memory of one sequence.

    Args:
        params: the request's settings.
        index: which choice of the request this is; every choice has dice of its own, and choice 0
            is the same whether or not others were asked for.
        rules: logits processors to go through first.
        prompt: the sequence so far, for the rules.

    Attributes:
        odds: of each token that was chosen, if they are wanted.
    """

    def __init__(
        self, params: SamplingParams, index: int = 0, rules: Sequence[Rule] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.params = params
        self.rules = tuple(rules)
        self._tokens = list(prompt) if rules else []
        self.counts: Counter[int] = Counter()
        self.odds: list[Odds] = []
        self._dice = None if params.greedy else random.Random(_dice_seed(params.seed, index))

    def draw(self) -> float:
        """The next uniform number in [0, 1); a greedy sequence has no dice."""
        assert self._dice is not None
        return self._dice.random()

    def ruled(self, logits: torch.Tensor) -> torch.Tensor:
        """One row of logits [vocabulary] float32 after the rules."""
        ids, scores = torch.tensor([self._tokens], device=logits.device), logits[None]
        for rule in self.rules:
            scores = rule(ids, scores)
        return scores[0]

    def observe(self, token: int) -> None:
        """Remember a chosen token, for the penalties and the rules."""
        if self.rules:
            self._tokens.append(token)
        if self.params.penalized:
            self.counts[token] += 1


class NotFinite(Exception):
    """A pass gave NaN or infinity.

    Args:
        message: where.
        rows: of the logits, where they show it; empty if it was seen elsewhere.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


def all_finite(values: torch.Tensor) -> bool:
    """Whether all numbers of a tensor, of any shape and float dtype, are finite; one sum, unless that is not."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def choose_tokens(logits: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """The next token of each row, greedy or sampled as its sampler says.

    Args:
        logits: [rows, vocabulary] float32.
        samplers: one per row; each sampled one draws exactly one number.

    Returns:
        [rows] int64, on the logits' device.

    Raises:
        NotFinite: rows hold NaN or no finite maximum; no sampler has drawn then. Logits of -inf are tokens that a model
            rules out.
    """
    own, logits = logits, _penalize(logits, samplers)
    best, tokens = logits.max(dim=-1)  # (rows,); NaN is larger than anything
    if not all_finite(best):
        rows = tuple((~best.isfinite()).nonzero().flatten().tolist())
        raise NotFinite(f"the logits of {len(rows)} of {len(best)} sequences are not finite", rows)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _sample(logits[index], [samplers[row] for row in drawn])
    with_logprobs = [row for row, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if with_logprobs:
        _add_odds(own, tokens, with_logprobs, samplers)
    if any(sampler.params.penalized or sampler.rules for sampler in samplers):
        for sampler, token in zip(samplers, tokens.tolist(), strict=True):
            sampler.observe(token)
    return tokens


def _add_odds(logits: torch.Tensor, tokens: torch.Tensor, rows: list[int], samplers: list[Sampler]) -> None:
    """Record the log probabilities of the chosen tokens [rows] in some rows of logits [rows, vocabulary].

    Those of the likeliest tokens there are recorded too.
    """
    odds = torch.log_softmax(logits[rows].double(), dim=-1)  # (rows, vocabulary)
    chosen = odds.gather(-1, tokens[rows][:, None]).squeeze(-1).tolist()  # (rows,)
    most = min(max(samplers[row].params.logprobs or 0 for row in rows), odds.shape[-1])
    values, names = (found.tolist() for found in odds.topk(most, dim=-1))  # (rows, most)
    for place, row in enumerate(rows):
        wanted = samplers[row].params.logprobs or 0
        top = tuple(zip(names[place][:wanted], values[place][:wanted], strict=True))
        samplers[row].odds.append(Odds(chosen[place], top))


def _sample(logits: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """Inverse-transform sampling of logits [rows, vocabulary]; returns [rows] int64.

    It goes over the vocabulary's own order, so that near-ties cannot swap places.
    """
    columns = [(s.params.temperature, s.params.top_p, s.draw()) for s in samplers]
    settings = torch.tensor(columns, dtype=torch.float64, device=logits.device)  # (rows, 3)
    temperature, top_p, uniform = settings[:, 0:1], settings[:, 1:2], settings[:, 2:3]
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)  # (rows, vocabulary)
    if any(s.params.top_p < 1 or s.params.top_k or s.params.min_p for s in samplers):
        min_p = torch.tensor([[s.params.min_p] for s in samplers], dtype=torch.float64, device=logits.device)
        probabilities = _truncate(probabilities, top_p, [s.params.top_k for s in samplers], min_p)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(-1)  # (rows,)
    # Rounding can put the target at the very end: fall back on the last token that has any probability.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).long().argmax(dim=-1)
    return torch.minimum(chosen, last)


def _truncate(
    probabilities: torch.Tensor, top_p: torch.Tensor, top_ks: list[int | None], min_p: torch.Tensor
) -> torch.Tensor:
    """Probabilities [rows, vocabulary] with zeros outside top-k, the nucleus and min-p.

    The likeliest token always stays.
    """
    vocabulary = probabilities.shape[-1]
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)  # (rows, vocabulary)
    keep_k = torch.tensor([k or vocabulary for k in top_ks], device=probabilities.device)[:, None]
    ranks = torch.arange(vocabulary, device=probabilities.device)[None, :]
    ordered = ordered.masked_fill(ranks >= keep_k, 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of everything likelier
    outside = ((before >= top_p) & (top_p < 1)) | (ordered < min_p * ordered[:, :1])
    outside[:, 0] = False
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))


def _penalize(logits: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    ruled = [(row, s) for row, s in enumerate(samplers) if s.rules]
    penalized = [(row, s) for row, s in enumerate(samplers) if s.params.penalized and s.counts]
    if not penalized and not ruled:
        return logits
    logits = logits.clone()
    for row, sampler in ruled:
        logits[row] = sampler.ruled(logits[row])
    for row, sampler in penalized:
        tokens = torch.tensor(list(sampler.counts), device=logits.device)
        counts = torch.tensor(list(sampler.counts.values()), dtype=logits.dtype, device=logits.device)
        logits[row, tokens] -= sampler.params.presence_penalty + sampler.params.frequency_penalty * counts
    return logits


def _dice_seed(seed: int | None, index: int) -> int:
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big")
