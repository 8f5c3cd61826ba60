"""Makes the patches that ship for real models, from public prompts and the ones that come with the package.

    python patches/make_real.py --data ../shared/data --model M.gguf [--version v1] [--out patches]
    python patches/make_real.py --data ../shared/data --prompts DIR

Refused are AdvBench's goals, without those that JailbreakBench or HarmBench test with, and some harmful prompts of
the package; answered as before are its everyday and borderline prompts, its imperatives, those with pasted material,
and for some models small talk. No jailbreak text is among them. The patch goes to ``OUT/NAME/VERSION.safetensors``,
and the prompts that are not this project's stay where they are.
With ``--prompts`` the default's prompts are written as ``harmful.jsonl`` and ``benign.jsonl``, and nothing is trained:
``nest-runtime compare`` gives them to other methods.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nest_runtime.compare.methods.memory import measured
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import Example, load_examples
from nest_runtime.train.forward import device_of
from nest_runtime.train.pipeline import train_patch
from nest_runtime.train.recipe import RECIPES, Recipe

GOALS = 280  # of AdvBench


@dataclass(frozen=True)
class Making:
    """How a patch is made: its recipe, and how many prompts of the package join AdvBench's goals."""

    recipe: Recipe
    harmful: int
    benign: Mapping[str, int]


DEFAULT = Making(RECIPES["default"], 80, {"everyday": 140, "borderline": 600, "imperatives": 400, "pasted": 180})
# SmolLM2 hardly refuses by itself. With the default it refuses 83 % of jailbreaks more, and half of what is harmless.
EARLIER = Making(
    RECIPES["default"].evolve(code_framings=0, steps=90, harmful_share=0.55, step_tokens=1024),
    0,
    {"everyday": 140, "borderline": 600},
)
# Where a base has no border of its own to stay at, the whole depth with ablation refuses less of what is harmless.
UNALIGNED = Making(
    RECIPES["default"].evolve(depth_from=0.0, depth_to=1.0, k_min=1, k_max=1, ablation=0.05, lr=0.24, strength=1.07),
    DEFAULT.harmful,
    {**DEFAULT.benign, "small-talk": 104},
)
MAKINGS = {"smollm2-135m-instruct": {"v1": EARLIER, "v2": UNALIGNED}}  # other models: the default, as v1


def main() -> None:
    """Train one version and write it, with the report of its making where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path, help="write the training prompts into this folder; train nothing")
    parser.add_argument("--version", default="v1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--report", type=Path, help="write the report of the run here, as JSON")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"--data is {options.data}, which is no folder; expected the public prompt sets")
    if options.prompts:
        write_prompts(options.data, options.prompts)
        return
    if not options.model:
        parser.error("give --model, or --prompts")
    loaded = load_model(options.model)
    name = short_name(loaded.name)
    makings, folder = makings_of(name), options.out / name
    if options.version not in makings:
        parser.error(f"--version is {options.version}; for {name} there is {', '.join(makings)}")
    making = makings[options.version]
    harmful, benign = training_prompts(options.data, making)
    began, used, told = time.perf_counter(), time.process_time(), [0.0]

    def progress(stage: str, done: int, total: int) -> None:
        if time.perf_counter() - told[0] > 30 or done == total:
            told[0] = time.perf_counter()
            print(f"{told[0] - began:6.0f} s  {stage} {done}/{total}", file=sys.stderr, flush=True)

    with measured(device_of(loaded.model)) as cost:
        result = train_patch(
            loaded.model,
            loaded.tokenizer,
            harmful,
            benign,
            recipe=making.recipe,
            name=f"{name}-safety",
            version=options.version,
            serial=list(makings).index(options.version) + 1,
            base_hash=loaded.hash,
            base_model=loaded.name,
            progress=progress,
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = result.patch.save(folder / f"{options.version}.safetensors")
    took = {"peak_bytes": cost.peak_bytes, "processor_seconds": round(time.process_time() - used)}
    print(f"{path}: {result.patch!r}; {json.dumps({**result.report['seconds'], **took})}", file=sys.stderr)
    if options.report:
        options.report.write_text(json.dumps({**result.report, **took}, indent=1) + "\n", encoding="utf-8")


def makings_of(name: str) -> Mapping[str, Making]:
    """How the patches for a model, by its short name, are made: by version, the first one first."""
    return MAKINGS.get(name, {"v1": DEFAULT})


def short_name(name: str) -> str:
    """``qwen2.5-coder-0.5b-instruct-q4_k_m.gguf`` → ``qwen2.5-coder-0.5b-instruct``."""
    return re.sub(r"[-.](q\d\w*|f16|f32|bf16)$", "", name.removesuffix(".gguf"), flags=re.IGNORECASE)


def training_prompts(data: Path, making: Making = DEFAULT) -> tuple[list[Example], list[Example]]:
    """Harmful prompts that no test uses, and benign ones, drawn by seed 0."""
    tested = {normal(row["text"]) for row in _json(data / "jailbreakbench/harmful_and_benign/jailbreakbench.json")}
    for part in ("val", "test"):
        with (data / f"harmbench/harmbench_behaviors_text_{part}.csv").open(encoding="utf-8", newline="") as file:
            tested |= {normal(row["Behavior"]) for row in csv.DictReader(file)}
    goals = [
        example for example in load_examples(data / "advbench/advbench.csv") if normal(example.prompt) not in tested
    ]
    order = random.Random(0)

    def drawn(examples: list[Example], count: int) -> list[Example]:
        order.shuffle(examples)
        return examples[:count]

    harmful = drawn(goals, GOALS)
    if making.harmful:
        harmful += drawn(load_examples("harmful"), making.harmful)
    return harmful, [e for name, count in making.benign.items() for e in drawn(load_examples(name), count)]


def write_prompts(data: Path, folder: Path) -> None:
    """Write the default's training prompts, a file a class."""
    found = training_prompts(data)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, examples in zip(("harmful", "benign"), found, strict=True):
        lines = [json.dumps({"messages": example.messages, **example.meta}, ensure_ascii=False) for example in examples]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / kind}.jsonl: {len(lines)} prompts")


def normal(text: str) -> str:
    """Letters and digits, lower case, single spaces."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def _json(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
