"""A gray-box attack: random search for a suffix that makes the model begin to comply.

After Andriushchenko, Croce and Flammarion 2024 (arXiv 2404.02151): a short run of the suffix's tokens is drawn again,
and kept where the target becomes likelier. It needs probabilities and no gradient: a server that shows them is enough.
The paper also writes a template of its own around the request; this does not.
"""

from __future__ import annotations

import random

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.attacks.base import Attack, AttackTarget, before, derive
from nest_runtime.evaluate.attacks.suffix import SuffixSearch
from nest_runtime.evaluate.cases import Case, user

LONGEST = 4  # tokens drawn anew at once


def random_search(*, steps: int = 60, suffix_tokens: int = 16, width: int = 16) -> Attack:
    """The attack with its budget.

    Args:
        steps: at most; the search ends when the target is the model's greedy answer.
        suffix_tokens: length of the suffix that it starts from.
        width: suffixes tried in a step (one forward pass of this batch size).
    """
    if min(steps, suffix_tokens, width) < 1:
        raise UsageError("random-search with a budget of nothing", "use whole numbers of 1 or more")

    def build(case: Case, rng: random.Random, target: AttackTarget | None) -> list[Case]:
        """Search a suffix for this case by random changes that lower the model's loss."""
        if target is None:
            raise UsageError("random-search reads the model's probabilities", "give the model and its tokenizer")
        search = SuffixSearch(target.model, target.tokenizer, case, suffix_tokens)
        tokens = search.allowed.nonzero().flatten().tolist()
        used = search.run(steps, lambda suffix: _neighbors(search, suffix, tokens, rng, width), wander=False)
        meta = {
            **case.meta,
            "search_loss": round(search.loss, 4),
            "search_steps": used,
            "search_reached": search.reached,
        }
        text = case.prompt + search.suffix_text
        return [derive(case, "random-search", [*before(case), user(text)], meta=meta)]

    return Attack(
        "random-search",
        "random-search",
        "Andriushchenko, Croce and Flammarion 2024, Jailbreaking Leading Safety-Aligned LLMs, arXiv 2404.02151",
        f"A suffix found by random exchanges and the model's probabilities, at most {steps} steps.",
        build,
        white_box=True,
    )


def _neighbors(
    search: SuffixSearch, suffix: list[int], tokens: list[int], rng: random.Random, width: int
) -> list[list[int]]:
    """Up to ``width`` suffixes with a short run of tokens drawn again, each of them text that reads back."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(4 * width):
        length = rng.randint(1, min(LONGEST, len(suffix)))
        place = rng.randrange(len(suffix) - length + 1)
        changed = [*suffix[:place], *rng.choices(tokens, k=length), *suffix[place + length :]]
        if changed != suffix and search.keeps(changed):
            found[tuple(changed)] = None
        if len(found) == width:
            break
    return [list(item) for item in found]
