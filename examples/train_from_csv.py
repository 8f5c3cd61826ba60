"""Train a patch from two CSV files with a column `prompt`, and keep it as a file.

    python examples/train_from_csv.py [MODEL] [HARMFUL.csv] [BENIGN.csv] [OUT.safetensors]

The files beside this script are of the reference model's world, and the recipe is a quick one for it. For a model of
your own leave the recipe out, and give a few hundred prompts of each kind.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nest_runtime as nest
from nest_runtime.prompts.examples import load_examples
from nest_runtime.train.recipe import RECIPES

HERE = Path(__file__).parent
QUICK = RECIPES["reference"].evolve(steps=60, batch_size=16, validate_every=60)


def main(model: str, harmful: str, benign: str, out: str) -> None:
    """Locate, cluster, tune, save."""
    loaded = nest.load_model(model)
    result = nest.train_patch(
        loaded.model,
        loaded.tokenizer,
        load_examples(harmful),
        load_examples(benign),
        recipe=QUICK if model == "reference" else None,
        name="my-safety",
        version="v1",
        base_hash=loaded.hash,
        base_model=loaded.name,
    )
    patch = result.patch
    patch.save(out)
    print(f"{out}: {patch.neurons} neurons, {patch.parameters:,} trained numbers, {patch.digest[:19]}")
    print(f"next: nest-runtime serve --model {model} --patch {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("harmful", nargs="?", default=str(HERE / "harmful.csv"))
    parser.add_argument("benign", nargs="?", default=str(HERE / "benign.csv"))
    parser.add_argument("out", nargs="?", default="my.safetensors")
    try:
        main(**vars(parser.parse_args()))
    except nest.NestError as error:  # it says what was found, and what to do
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
