"""Measure somebody else's patch before you use it: what it refuses, what it refuses too much, what it breaks.

    python examples/evaluate_a_patch.py [MODEL] [PATCH] [LIMIT] [BEHAVIORS.csv ...]

PATCH is a file, a name in the store, or hf://org/repo@v3. With a model of your own, give a file of behaviors.
"""

from __future__ import annotations

import argparse
import sys

import nest_runtime as nest


def main(model: str, patch: str, limit: int, behaviors: list[str]) -> None:
    """Base and patch on the same prompts, with intervals."""
    loaded = nest.load_model(model)
    chosen = nest.load_patch(patch, model_hash=loaded.hash)
    print(
        f"{chosen.name}@{chosen.version}: {chosen.neurons} neurons, {chosen.parameters:,} numbers, {chosen.digest[:19]}"
    )
    result = nest.evaluate(loaded, chosen, behaviors=behaviors, limit=limit, with_base=True)
    print(result.markdown())
    low, high = result.rate("asr").ci95
    print(f"attack success, all suites: between {100 * low:.1f} and {100 * high:.1f} % (95 %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("patch", nargs="?", default="v3")
    parser.add_argument("limit", nargs="?", type=int, default=40, help="prompts of each suite")
    parser.add_argument("behaviors", nargs="*", metavar="BEHAVIORS.csv")
    try:
        main(**vars(parser.parse_args()))
    except nest.NestError as error:  # it says what was found, and what to do
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
