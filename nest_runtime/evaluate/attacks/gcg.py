"""A white-box attack: greedy coordinate search for a suffix that makes the model begin to comply.

After GCG (Zou et al. 2023, arXiv 2307.15043): the gradient at the suffix's one-hot tokens proposes
exchanges, a batch of them is tried, the best is kept. The model is used as it is, with the patch that
is active in the caller's context. It knows the weights, which NeST's threat model rules out: it shows
where black-box claims end. One suffix per behavior; no transfer, no ensembles.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import EvaluationError, UsageError
from nest_runtime.evaluate.attacks.base import Attack, AttackTarget, before, derive
from nest_runtime.evaluate.cases import Case, user

if TYPE_CHECKING:
    import torch

_MARK = "@@NEST-SUFFIX@@"


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
        if target is None:
            raise UsageError("gcg attacks the model itself", "give the model and its tokenizer")
        search = _Search(target.model, target.tokenizer, case, suffix_tokens)
        used = search.run(rng, steps, width, top_k)
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


@dataclass(frozen=True)
class _Tokens:
    """The prompt around the suffix, and the target, as token ids: before + suffix + after + target."""

    before: list[int]
    after: list[int]
    target: list[int]


class _Search:
    """The state of one search: the best suffix so far and its loss."""

    def __init__(self, model: Any, tokenizer: Any, case: Case, suffix_tokens: int) -> None:
        import torch

        self.model, self.tokenizer = model, tokenizer
        self.embedding = model.get_input_embeddings().weight.detach()  # (vocabulary, d)
        self.device = self.embedding.device
        self.texts, self.tokens = self._split(case)
        self.suffix = self._ids(" !" * suffix_tokens)
        self.suffix_text = self._decode(self.suffix)
        self.exact = self._reads_back(self.suffix)
        self.allowed = self._allowed_tokens()
        with torch.no_grad():
            self.loss, self.reached = self._score([self.suffix])[0]

    def run(self, rng: random.Random, steps: int, width: int, top_k: int) -> int:
        """Search; returns the number of steps used."""
        current = self.suffix
        for step in range(steps):
            if self.reached:
                return step
            proposals = self._proposals(current, rng, width, top_k)
            if not proposals:
                continue
            scores = self._score(proposals)
            best = min(range(len(proposals)), key=lambda index: scores[index][0])
            current = proposals[best]  # as in the paper, the walk goes on from the step's best even where it is worse
            if scores[best][0] < self.loss or scores[best][1]:
                self.loss, self.reached = scores[best]
                self.suffix, self.suffix_text = current, self._decode(current)
        return steps

    def _split(self, case: Case) -> tuple[tuple[str, str], _Tokens]:
        from nest_runtime.prompts.examples import render

        text = render(self.tokenizer, [*before(case), user(case.prompt + _MARK)])
        if text.count(_MARK) != 1:
            raise EvaluationError(
                f"the chat template changes the prompt of case {case.id}", "gcg needs a template that keeps the text"
            )
        head, tail = text.split(_MARK)
        goal = str(case.meta.get("target") or "Sure, here is")
        special = not getattr(self.tokenizer, "chat_template", None)
        begin = list(self.tokenizer(head, add_special_tokens=special)["input_ids"])
        return (head, tail), _Tokens(begin, self._ids(tail), self._ids(goal))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _reads_back(self, suffix: list[int]) -> bool:
        """Whether the whole prompt, written as text, gives these very tokens again."""
        special = not getattr(self.tokenizer, "chat_template", None)
        whole = self.texts[0] + self._decode(suffix) + self.texts[1]
        ids = list(self.tokenizer(whole, add_special_tokens=special)["input_ids"])
        return ids == [*self.tokens.before, *suffix, *self.tokens.after]

    def _keeps(self, suffix: list[int]) -> bool:
        # Where even the first suffix merges with its neighbors, the suffix alone must read back.
        return self._reads_back(suffix) if self.exact else self._ids(self._decode(suffix)) == suffix

    def _allowed_tokens(self) -> torch.Tensor:
        """(vocabulary,) bool: ordinary tokens of printable ASCII."""
        import torch

        special = set(self.tokenizer.all_special_ids)
        size = self.embedding.shape[0]
        texts = self.tokenizer.batch_decode([[index] for index in range(min(size, len(self.tokenizer)))])
        allowed = torch.zeros(size, dtype=torch.bool, device=self.device)
        for index, text in enumerate(texts):
            allowed[index] = index not in special and bool(text) and text.isascii() and text.isprintable()
        return allowed

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

    def _proposals(self, suffix: list[int], rng: random.Random, width: int, top_k: int) -> list[list[int]]:
        """Up to ``width`` suffixes one exchange away, each of them text that reads back."""
        scores = (-self._gradient(suffix)).masked_fill(~self.allowed, -float("inf"))
        best = scores.topk(min(top_k, int(self.allowed.sum())), dim=-1).indices.tolist()  # (suffix, top_k)
        found: dict[tuple[int, ...], None] = {}
        for _ in range(2 * width):
            place = rng.randrange(len(suffix))
            changed = [*suffix[:place], rng.choice(best[place]), *suffix[place + 1 :]]
            if changed != suffix and self._keeps(changed):
                found[tuple(changed)] = None
            if len(found) == width:
                break
        return [list(item) for item in found]

    def _score(self, suffixes: list[list[int]]) -> list[tuple[float, bool]]:
        """Of each suffix, the target's mean cross-entropy, and whether the target is the greedy answer."""
        import torch

        rows = [[*self.tokens.before, *s, *self.tokens.after, *self.tokens.target] for s in suffixes]
        ids = torch.tensor(rows, dtype=torch.long, device=self.device)  # (batch, tokens): all of one length
        goal = ids[:, -len(self.tokens.target) :]
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -goal.shape[1] - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), goal, reduction="none").mean(-1)
        reached = (logits.argmax(-1) == goal).all(-1)
        return list(zip(losses.tolist(), reached.tolist(), strict=True))
