"""A white-box attack: greedy coordinate search for a suffix that makes the model begin to comply.

After GCG (Zou et al. 2023, arXiv 2307.15043): the gradient at the suffix's one-hot tokens proposes
exchanges, a batch of them is tried, the best is kept. The model is used as it is, with the patch that
is active in the caller's context. It knows the weights, which NeST's threat model rules out: it shows
where black-box claims end. One suffix per behavior; no transfer, no ensembles.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.attacks.base import Attack, AttackTarget, before, derive
from nest_runtime.evaluate.attacks.suffix import SuffixSearch
from nest_runtime.evaluate.cases import Case, user

if TYPE_CHECKING:
    import torch


def gcg(*, steps: int = 50, suffix_tokens: int = 16, width: int = 64, top_k: int = 64) -> Attack:
    """The attack with its budget.

    Args:
        steps: exchanges made at most; the search ends when the target is the model's greedy answer.
        suffix_tokens: length of the suffix that it starts from.
        width: exchanges tried in a step (one forward pass of this batch size).
        top_k: tokens considered for each place.
    """
    if min(steps, suffix_tokens, width, top_k) < 1:
        raise UsageError("gcg with a budget of nothing", "use whole numbers of 1 or more")

    def build(case: Case, rng: random.Random, target: AttackTarget | None) -> list[Case]:
        """Search a suffix for this case by gradients of the model's loss."""
        if target is None:
            raise UsageError("gcg attacks the model itself", "give the model and its tokenizer")
        search = _Search(target.model, target.tokenizer, case, suffix_tokens)
        used = search.run(steps, lambda suffix: search.proposals(suffix, rng, width, top_k), wander=True)
        text = case.prompt + search.suffix_text
        meta = {**case.meta, "gcg_loss": round(search.loss, 4), "gcg_steps": used, "gcg_reached": search.reached}
        return [derive(case, "gcg", [*before(case), user(text)], meta=meta)]

    return Attack(
        "gcg",
        "white-box",
        "Zou et al. 2023, Universal and Transferable Adversarial Attacks on Aligned Language Models, arXiv 2307.15043",
        f"A suffix found with the model's gradients, at most {steps} steps.",
        build,
        white_box=True,
    )


class _Search(SuffixSearch):
    """The search, with the gradient proposing."""

    def _gradient(self, suffix: list[int]) -> torch.Tensor:
        """(suffix, vocabulary): the loss's gradient at the one-hot suffix."""
        import torch

        weight = self.embedding
        parts = [self.tokens.before, suffix, self.tokens.after, self.tokens.target]
        ids = [torch.tensor(part, dtype=torch.long, device=self.device) for part in parts]
        with torch.enable_grad():
            one_hot = torch.nn.functional.one_hot(ids[1], weight.shape[0]).to(weight.dtype).requires_grad_()
            rows = [weight[ids[0]], one_hot @ weight, weight[ids[2]], weight[ids[3]]]
            logits = self.model(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits  # (1, tokens, vocabulary)
            goal = logits[0, -len(self.tokens.target) - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(goal, ids[3])
            (gradient,) = torch.autograd.grad(loss, [one_hot])
        return gradient

    def proposals(self, suffix: list[int], rng: random.Random, width: int, top_k: int) -> list[list[int]]:
        """Up to ``width`` suffixes one exchange away, each of them text that reads back."""
        scores = (-self._gradient(suffix)).masked_fill(~self.allowed, -float("inf"))
        best = scores.topk(min(top_k, int(self.allowed.sum())), dim=-1).indices.tolist()  # (suffix, top_k)
        found: dict[tuple[int, ...], None] = {}
        for _ in range(2 * width):
            place = rng.randrange(len(suffix))
            changed = [*suffix[:place], rng.choice(best[place]), *suffix[place + 1 :]]
            if changed != suffix and self.keeps(changed):
                found[tuple(changed)] = None
            if len(found) == width:
                break
        return [list(item) for item in found]
