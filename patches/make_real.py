"""Makes the patches that ship for real models, from public prompts and the ones that come with the package.

    python patches/make_real.py --data ../shared/data --model M.gguf [--version v1] [--out patches]

Refused are AdvBench's goals, without those that JailbreakBench or HarmBench test with; answered as before are the
bundled everyday and borderline prompts. No jailbreak text is among them. The patch goes to
``OUT/NAME/VERSION.safetensors``, and the prompts that are not this project's stay where they are.
``benchmarks/real_models.py`` measures it and writes its card; settings were chosen on its validation part
(docs/decisions/real-models.md).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nest_runtime.model.load import load_model
from nest_runtime.patch.file import read_patch
from nest_runtime.prompts.examples import Example, load_examples
from nest_runtime.train.pipeline import train_patch
from nest_runtime.train.recipe import RECIPES, Recipe


@dataclass(frozen=True)
class Step:
    """How one version is made.

    Attributes:
        recipe: its settings.
        parent: the version it is re-tuned from.
        harmful, everyday, borderline: how many prompts of each kind.
        skipped: everyday and borderline prompts that an earlier version was trained on.
    """

    recipe: Recipe
    parent: str | None = None
    harmful: int = 280
    everyday: int = 140
    borderline: int = 420
    skipped: int = 0


ANY = {"v1": Step(RECIPES["default"])}
_OWN = RECIPES["default"].evolve(z=2.5, lr=1.5e-2, loadings_lr=1.5e-2, validate_every=8, select="loss")
QWEN = {
    "v1": Step(
        _OWN.evolve(kl_weight=1.5, steps=32, framings=2, framed_characters=400, answer_tokens=16, locate_prompts=100),
        everyday=280,
        borderline=280,
    ),
    "v2": Step(  # borderline prompts that v1 has not seen, bare
        _OWN.evolve(
            lr=6e-3, loadings_lr=6e-3, kl_weight=3.0, steps=14, framings=0, harmful_share=0.25, validate_every=7,
            select="decision",
        ),
        parent="v1",
        harmful=120,
        everyday=24,
        borderline=160,
        skipped=280,
    ),
}  # fmt: skip
STEPS = {"qwen2.5-coder-0.5b-instruct": QWEN}


def main() -> None:
    """Train one version and write it, with the report of its making where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--version", default="v1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--report", type=Path, help="write the report of the run here, as JSON")
    options = parser.parse_args()
    loaded = load_model(options.model)
    name = short_name(loaded.name)
    steps = STEPS.get(name, ANY)
    if options.version not in steps:
        parser.error(f"--version is {options.version}; for {name} there is {', '.join(steps)}")
    step, folder = steps[options.version], options.out / name
    harmful, benign = training_prompts(options.data, step)
    began, told = time.perf_counter(), [0.0]

    def progress(stage: str, done: int, total: int) -> None:
        if time.perf_counter() - told[0] > 30 or done == total:
            told[0] = time.perf_counter()
            print(f"{told[0] - began:6.0f} s  {stage} {done}/{total}", file=sys.stderr, flush=True)

    result = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful,
        benign,
        recipe=step.recipe,
        name=f"{name}-safety",
        version=options.version,
        base_hash=loaded.hash,
        base_model=loaded.name,
        parent=read_patch(folder / f"{step.parent}.safetensors") if step.parent else None,
        progress=progress,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = result.patch.save(folder / f"{options.version}.safetensors")
    print(f"{path}: {result.patch!r}; {json.dumps(result.report['seconds'])}", file=sys.stderr)
    if options.report:
        options.report.write_text(json.dumps(result.report, indent=1) + "\n", encoding="utf-8")


def short_name(name: str) -> str:
    """``qwen2.5-coder-0.5b-instruct-q4_k_m.gguf`` → ``qwen2.5-coder-0.5b-instruct``."""
    return re.sub(r"[-.](q\d\w*|f16|f32|bf16)$", "", name.removesuffix(".gguf"), flags=re.IGNORECASE)


def training_prompts(data: Path, step: Step) -> tuple[list[Example], list[Example]]:
    """Harmful prompts that no test uses, and benign ones, drawn by seed 0."""
    tested = {normal(row["text"]) for row in _json(data / "jailbreakbench/harmful_and_benign/jailbreakbench.json")}
    for part in ("val", "test"):
        with (data / f"harmbench/harmbench_behaviors_text_{part}.csv").open(encoding="utf-8", newline="") as file:
            tested |= {normal(row["Behavior"]) for row in csv.DictReader(file)}
    goals = load_examples(data / "advbench/advbench.csv")
    harmful = [example for example in goals if normal(example.prompt) not in tested]
    everyday, borderline = load_examples("everyday"), load_examples("borderline")
    order = random.Random(0)
    for examples in (harmful, everyday, borderline):
        order.shuffle(examples)
    first = step.skipped
    benign = [*everyday[first : first + step.everyday], *borderline[first : first + step.borderline]]
    return harmful[: step.harmful], benign


def normal(text: str) -> str:
    """Letters and digits, lower case, single spaces."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def _json(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
