"""What tuning minimizes, over answer tokens, without ever holding their logits all at once.

Cross-entropy on refusals to harmful prompts and on benign answers, the divergence of the patched model from the base
on benign ones, and a margin of refusals over harmful answers. The head is frozen, so the gradient with respect to its
input is found slice by slice in the forward pass, and the logits of a slice are gone before the next one's are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax, softplus

SLICE_NUMBERS = 2**24  # logits in one slice: 64 MiB in float32
TOP = 64  # tokens of the base's distribution that are kept by themselves; the rest count as one
MARGIN = 5.0  # nats by which a refusal's first token is to be likelier than its rival
LEFT = 1e-6  # the least probability that all other tokens together count as having
ONSET = 4  # tokens at an answer's beginning that Recipe.onset_weight is about

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BaseAnswer:
    """The base's next-token distribution at an answer's tokens: its likeliest tokens, and what is left.

    Attributes:
        tokens: (answer tokens, TOP) int64.
        logs: (answer tokens, TOP) float32, their log-probabilities.
    """

    tokens: torch.Tensor
    logs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> BaseAnswer:
        """From logits (answer tokens, vocabulary), any floating-point dtype."""
        logs, tokens = log_softmax(logits.float(), dim=-1).topk(min(TOP, logits.shape[-1]), dim=-1)
        return cls(tokens.cpu(), logs.cpu())

    @classmethod
    def join(cls, parts: Sequence[BaseAnswer]) -> BaseAnswer:
        """Several answers, one after another."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.logs for part in parts]))


def divergence(logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL(base ‖ patched) per token, over the base's likeliest tokens and all others as one.

    Joining the others can only make it smaller, so this is a lower bound of the whole divergence; it is 0 if both are
    equal.

    Args:
        logits: the patched model's, (n, vocabulary) float32.
        tokens: the base's likeliest tokens, (n, TOP) int64.
        logs: their log-probabilities, (n, TOP) float32.

    Returns:
        (n,) float32.
    """
    ours = log_softmax(logits, dim=-1).gather(-1, tokens)
    probs = logs.exp()
    rest, our_rest = _rest(probs), _rest(ours.exp())
    return (probs * (logs - ours)).sum(-1) + rest * (rest.log() - our_rest.log())


def _rest(probs: torch.Tensor) -> torch.Tensor:
    return (1 - probs.sum(-1)).clamp(min=LEFT)


def margin(logits: torch.Tensor, targets: torch.Tensor, rivals: torch.Tensor) -> torch.Tensor:
    """By how much each target's logit falls short of its rival's plus ``MARGIN``, softly; 0 without a rival.

    Args:
        logits: (n, vocabulary) float32.
        targets: (n,) int64.
        rivals: (n,) int64, -1 where there is none.

    Returns:
        (n,) float32.
    """
    ahead = logits.gather(-1, targets[:, None]) - logits.gather(-1, rivals.clamp(min=0)[:, None])
    return torch.where(rivals >= 0, softplus(MARGIN - ahead[:, 0]), 0.0)


class _Sliced(torch.autograd.Function):
    """The sum of a loss over rows of hidden states, and its gradient, slice by slice."""

    @staticmethod
    def forward(ctx, hidden, slices, loss):  # type: ignore[no-untyped-def]
        total, gradient = 0.0, torch.empty_like(hidden)
        for part in slices:
            with torch.enable_grad():
                piece = hidden[part].detach().requires_grad_(True)
                value = loss(piece, part)
                (gradient[part],) = torch.autograd.grad(value, piece)
            total += float(value.detach())
        ctx.save_for_backward(gradient)
        return hidden.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx, given):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * given, None, None


def slices_of(tokens: int, vocabulary: int) -> list[slice]:
    """Slices of some tokens whose logits may be held at once."""
    size = max(SLICE_NUMBERS // max(vocabulary, 1), 1)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def summed(hidden: torch.Tensor, vocabulary: int, loss: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """Σ ``loss(hidden[part], part)`` over slices of ``hidden`` (n, d): a float32 scalar, differentiable in it."""
    slices = slices_of(len(hidden), vocabulary)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _Sliced.apply(hidden, slices, loss)
    values = [loss(hidden[part], part) for part in slices]
    return torch.stack(values).sum() if values else hidden.new_zeros((), dtype=torch.float32)


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    base: BaseAnswer | None,
    base_weights: torch.Tensor | None,
) -> torch.Tensor:
    """Weighted cross-entropy plus weighted :func:`divergence` from the base, summed over tokens.

    Args:
        logits: (n, vocabulary) float32.
        targets: (n,) int64.
        weights: (n,) of the cross-entropy; 0 leaves a token out.
        base: the base's distributions at these tokens; rows with no weight may hold anything.
        base_weights: (n,) of the divergence.

    Returns:
        A scalar, float32.
    """
    if base is None or base_weights is None:
        none = torch.zeros_like(weights)
        empty = targets.new_zeros(len(targets), 0)
        return _TokenLoss.apply(logits, targets, weights, empty, none.new_zeros(len(targets), 0), none)
    return _TokenLoss.apply(logits, targets, weights, base.tokens, base.logs, base_weights)


class _TokenLoss(torch.autograd.Function):
    """The loss and its gradient in one go, from one softmax.

    A token has softmax q, cross-entropy weight w and divergence weight v. Its base gives its likeliest tokens the
    probabilities p and all others r. The gradient is (w + v (Σp − c Σq)) q, minus w at the target, plus v (c q − p) at
    the likeliest tokens. Σ is over these, and c is r over what q leaves to the others.
    """

    @staticmethod
    def forward(ctx, logits, targets, weights, tokens, logs, base_weights):  # type: ignore[no-untyped-def]
        scale = logits.logsumexp(-1, keepdim=True)
        ours = logits.gather(-1, tokens) - scale  # (n, TOP)
        probs, likely = logs.exp(), ours.exp()
        left, our_left = _rest(probs), _rest(likely)
        parted = (probs * (logs - ours)).sum(-1) + left * (left.log() - our_left.log())
        missed = (scale - logits.gather(-1, targets[:, None]))[:, 0]
        diverging = base_weights > 0
        value = (weights * missed).sum() + torch.where(diverging, base_weights * parted, 0.0).sum()
        if not ctx.needs_input_grad[0]:
            return value
        moves = 1 - likely.sum(-1) > LEFT  # where nothing is left to the others, that term does not move
        ratio = torch.where(moves, left / our_left, 0.0)
        pull = torch.where(diverging, base_weights * (probs.sum(-1) - ratio * likely.sum(-1)), 0.0)
        gradient = (logits - scale).exp_().mul_((weights + pull)[:, None])
        gradient.scatter_add_(-1, targets[:, None], -weights[:, None])
        at_likely = torch.where(diverging[:, None], base_weights[:, None] * (ratio[:, None] * likely - probs), 0.0)
        gradient.scatter_add_(-1, tokens, at_likely)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, given):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * given, None, None, None, None, None
