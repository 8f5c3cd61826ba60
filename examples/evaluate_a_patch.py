"""Measure somebody else's patch before you use it: what it refuses, what it refuses too much, what it breaks.

    python examples/evaluate_a_patch.py [MODEL] [PATCH] [LIMIT] [BEHAVIORS.csv]

PATCH is a file, a name in the store, or hf://org/repo@v3. With a model of your own, give a file of behaviors.
"""

from __future__ import annotations

import sys

import nest_runtime as nest


def main(model: str = "reference", patch: str = "v3", limit: str = "40", *behaviors: str) -> None:
    """Base and patch on the same prompts, with intervals."""
    loaded = nest.load_model(model)
    chosen = nest.load_patch(patch, model_hash=loaded.hash)
    print(
        f"{chosen.name}@{chosen.version}: {chosen.neurons} neurons, {chosen.parameters:,} numbers, {chosen.digest[:19]}"
    )
    result = nest.evaluate(loaded, chosen, behaviors=behaviors, limit=int(limit), with_base=True)
    print(result.markdown())
    low, high = result.rate("asr").ci95
    print(f"attack success, all suites: between {100 * low:.1f} and {100 * high:.1f} % (95 %)")


if __name__ == "__main__":
    main(*sys.argv[1:])
