"""Answers of a real model and of its patch, to be labelled by reading: prompts of this project's own.

    python benchmarks/judge/sample.py --model M.gguf --patch v1 --n 40 --out answers.jsonl

Half of the answers are the base's and half the patch's, to other prompts. Six in ten prompts are harmful, half of them
plain and half in a built-in attack, and four harmless, that look harmful or are plain orders; all are drawn by seed.
Rows have no label: own_answers.jsonl holds those that were read. The harmful prompts are the bundled ones, some of
which a patch may have been trained on: a judge is measured here, not a patch.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from nest_runtime.evaluate.attacks import ATTACKS
from nest_runtime.evaluate.cases import Case
from nest_runtime.evaluate.judges.phrases import PhraseJudge
from nest_runtime.evaluate.run import evaluate
from nest_runtime.evaluate.standard import NOT_SINGLE, benign, harmful
from nest_runtime.model.load import load_model
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import load_examples
from nest_runtime.resolve import load_patch
from nest_runtime.runtime import PatchRuntime

HARMFUL = 0.6  # share of the prompts


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", required=True)
    asked.add_argument("--patch", required=True)
    asked.add_argument("--n", type=int, default=40, help="answers in all")
    asked.add_argument("--tokens", type=int, default=48)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--out", type=Path, required=True)
    options = asked.parse_args()
    harmful_ones, benign_ones = drawn(options.n, options.seed)
    loaded = load_model(options.model)
    patch, rows = load_patch(options.patch, model_hash=loaded.hash), []
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        for number, subject in enumerate((None, patch)):
            some = [*harmful_ones[number::2], *benign_ones[number::2]]
            result = evaluate(
                loaded.model,
                loaded.tokenizer,
                some,
                PhraseJudge(),
                runtime=runtime,
                patch=subject,
                base_hash=loaded.hash,
                model_name=loaded.name,
                max_new_tokens=options.tokens,
            )
            answers = {record.id: record.answer for record in result.records}
            rows += [
                {
                    "model": loaded.name.removesuffix(".gguf"),
                    "patch": subject.version if subject else None,
                    "kind": case.kind,
                    "attack": case.attack,
                    "prompt": case.messages[-1]["content"],
                    "answer": answers[case.id],
                }
                for case in some
            ]
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def drawn(n: int, seed: int) -> tuple[list[Case], list[Case]]:
    """The harmful cases, plain and attacked in turn, and the harmless ones."""
    dice = random.Random(seed)
    wanted = [example.prompt for example in load_examples(bundled("harmful"))]
    looking = [e.prompt for name in ("validation", "imperatives-validation") for e in load_examples(bundled(name))]
    count = round(HARMFUL * n)
    plain = harmful("own", [(text, text) for text in dice.sample(wanted, count)], "direct")
    names = sorted(name for name, attack in ATTACKS.items() if name not in NOT_SINGLE and not attack.white_box)
    made: list[Case] = []
    for number, case in enumerate(plain):
        if number // 2 % 2:  # pairs, so that base and patch get as many of each
            attack = ATTACKS[names[number // 4 % len(names)]]
            made += attack(case, random.Random(f"{seed}/{attack.name}/{case.id}"))[:1]
        else:
            made.append(case)
    return made, benign("own, harmless", dice.sample(looking, n - count))


if __name__ == "__main__":
    main()
