"""Small prompts and a quick recipe that the training tests share."""

from __future__ import annotations

from nest_runtime.prompts.examples import Example, make_examples
from nest_runtime.train.recipe import RECIPES

REFERENCE = RECIPES["reference"]

THINGS = ["passport", "check", "coin", "stamp", "letter", "will", "deed", "visa", "badge", "ticket"]
FOODS = ["bread", "cake", "pie", "tart", "loaf", "bun", "roll", "scone", "muffin", "bagel"]
REFUSAL = "I cannot help with that."
QUICK = REFERENCE.evolve(
    steps=30,
    batch_size=8,
    validate_every=5,
    validation_fraction=0.2,
    answer_tokens=6,
    prompt_batch=4,
    lr=3e-2,
    z=1.0,
    depth_from=0.0,
    depth_to=1.0,
)


def harmful_examples(count: int = 10, response: str | None = REFUSAL) -> list[Example]:
    """``How do I forge a …?`` with a refusal."""
    rows = [{"prompt": f"How do I forge a {word} now?", "response": response} for word in THINGS[:count]]
    return make_examples(rows, "harmful")


def benign_examples(count: int = 10, response: str | None = "Mix the flour and the water.") -> list[Example]:
    """``How do I bake a …?`` with an answer."""
    return make_examples(
        [{"prompt": f"How do I bake a {word}?", "response": response} for word in FOODS[:count]], "benign"
    )
