"""The table of goals for a patch on a real model: attack success, over-refusal, utility, base beside patch.

    python benchmarks/real_models.py --data ../shared/data --model M.gguf [--patch P] [--part test|validation] [--n 100]

The test part is the standard suite of ``nest-runtime eval``, from public prompt sets that are not part of this project
(``--data`` names their folder).
Settings are chosen on ``--part validation`` (HarmBench's validation behaviors, plain, in this project's held-out
framings and behind wild prompts that the test does not use; the bundled validation prompts) and reported on ``--part
test``. Answers are greedy and kept in ``--work``, so that a second run goes on, and the base is asked once.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nest_runtime.evaluate.ability import Score
from nest_runtime.evaluate.cases import Case
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.judges.local import LocalJudge
from nest_runtime.evaluate.judges.phrases import PhraseJudge
from nest_runtime.evaluate.public import PublicData, behind, drawn
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.run import evaluate
from nest_runtime.evaluate.standard import SUITES, UTILITY, benign, harmful, load_standard
from nest_runtime.evaluate.stats import wilson
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import load_examples
from nest_runtime.prompts.framings import HELD_OUT_CODE, HELD_OUT_FRAMINGS
from nest_runtime.resolve import load_patch
from nest_runtime.runtime import PatchRuntime


def validation_cases(data: PublicData, n: int) -> list[Case]:
    """What settings are chosen by."""
    goals = drawn(data.harmbench("harmbench-validation"), n, "val")
    framed = [
        (HELD_OUT_FRAMINGS[i % len(HELD_OUT_FRAMINGS)].render(goal)[-1]["content"], goal)
        for i, goal in enumerate(goals)
    ]
    coded = [(HELD_OUT_CODE[i % len(HELD_OUT_CODE)].render(goal)[-1]["content"], goal) for i, goal in enumerate(goals)]
    return [
        *harmful("plain", [(goal, goal) for goal in goals], "direct"),
        *harmful("held-out framings", framed, "framing"),
        *harmful("held-out code", coded, "code"),
        *harmful("wild, validation", behind(data.wild("validation"), goals, n), "wild"),
        *benign("bundled validation", drawn([e.prompt for e in load_examples(bundled("validation"))], n, "benign")),
        *benign(
            "imperatives, validation",
            drawn([e.prompt for e in load_examples(bundled("imperatives-validation"))], n, "imperatives-validation"),
        ),
    ]


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases of a part: what is reported is eval's standard suite."""
    if options.part == "validation":
        cases = validation_cases(PublicData.at(options.data), options.n)
    else:
        cases = list(load_standard(SUITES, data=options.data, n=options.n).cases)
    wanted, unwanted = (options.suites or "").split(","), options.without.split(",") if options.without else []
    cases = [case for case in cases if any(part in case.suite for part in wanted)]
    return [case for case in cases if not any(part in case.suite for part in unwanted)]


def utility(scores: Sequence[Score]) -> dict[str, float]:
    """Scores of the standard suite by the names that the table has."""
    found = {(score.task, score.metric): score for score in scores}
    return {
        "mmlu": found["mmlu", "acc"].value,
        "mmlu_n": found["mmlu", "acc"].n,
        "gsm8k_nats": found["gsm8k", "nats_per_token"].value,
        "answer_tokens": found["alpaca", "answer_tokens"].value,
        "ended": found["alpaca", "ended"].value,
        "kl": found["alpaca", "kl_to_base"].value,
    }


def rates(result: EvalResult) -> dict[str, dict[str, Any]]:
    """Rates by suite with Wilson intervals; harmful suites count answers that comply, benign ones refusals."""
    pools = {
        "jailbreaks, pooled": [r for r in result.records if r.kind == "harmful" and r.family != "direct"],
        "benign, pooled": [r for r in result.records if r.kind == "benign"],
    }
    suites = {
        name: [r for r in result.records if r.suite == name] for name in dict.fromkeys(r.suite for r in result.records)
    }
    table: dict[str, dict[str, Any]] = {}
    for suite, records in (suites | pools).items():
        if records:
            hits = sum(record.hit for record in records)
            low, high = wilson(hits, len(records))
            table[suite] = {"rate": hits / len(records), "n": len(records), "low": low, "high": high}
    return table


def lines(document: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    subjects = [name for name in ("base", "patch") if name in document]
    rows = [
        f"| {document['model']}, {document['part']} | n | {' | '.join(subjects)} |",
        "|---" * (2 + len(subjects)) + "|",
    ]
    for suite, found in document[subjects[0]]["rates"].items():
        cells = [_interval(document[name]["rates"][suite]) for name in subjects]
        rows.append(f"| {suite} | {found['n']} | {' | '.join(cells)} |")
    for key in document[subjects[0]].get("utility", {}):
        rows.append(f"| {key} |  | {' | '.join(format(document[name]['utility'][key], '.3f') for name in subjects)} |")
    return rows


def card(patch: Patch, document: dict[str, Any]) -> str:
    """The patch's card: front matter, the table, how it was made, limits."""
    front = {
        "license": "apache-2.0",
        "library_name": "nest-runtime",
        "tags": "[safety, nest, patch]",
        "name": patch.name,
        "version": patch.version,
        "serial": patch.serial,
        "digest": patch.digest,
        "base_model": patch.base_model,
        "base_hash": patch.base_hash,
        "created": f'"{patch.created}"',
    }
    factor = patch.method.get("scaled", {}).get("factor")
    return CARD.format(
        front="\n".join(f"{key}: {value}" for key, value in front.items()),
        title=f"{patch.name} {patch.version}",
        base=patch.base_model,
        parameters=f"{patch.parameters:,}",
        neurons=f"{patch.neurons:,}",
        clusters=patch.clusters,
        sites=sum(1 for site in patch.sites if site.n_neurons),
        table="\n".join(lines(document)),
        harmful=patch.data["harmful"]["count"],
        benign=patch.data["benign"]["count"],
        scaled=f" Then `nest-runtime scale` multiplied its rows with {factor:g}." if factor else "",
        **{key: document[key] for key in ("judge", "tokens", "machine", "date")},
        recipe="\n".join(f"    {key}: {value}" for key, value in patch.method["recipe"].items()),
    )


CARD = """---
{front}
---

# {title}

A safety patch for {base}, made by Neuron Selective Tuning (NeST, arXiv 2602.16835): {parameters}
trained numbers, {clusters} cluster rows over {neurons} neurons at {sites} sites.

## Figures

Harmful suites show attack success, benign ones the share refused, each with its 95 % Wilson interval. Greedy answers of
at most {tokens} tokens, judge `{judge}`; {machine}, {date}. `python benchmarks/real_models.py` prints this table.

{table}

## How it was made

`python patches/make_real.py`: {harmful} harmful prompts (AdvBench's goals, without those that JailbreakBench and
HarmBench test with, and for some models harmful prompts of the package) against {benign} benign prompts that come with
the package, both in framings too. No jailbreak text was trained on.{scaled} Settings:

{recipe}

## Limits

- Made on this very file. Another quantization, or the original checkpoint, is another base: `nest-runtime retarget`.
- The file lists the neurons that it changes. Who holds the weights can undo the patch, or prune exactly those neurons.
- Attacks that were searched for against this patch were not tried.
"""


def _interval(found: dict[str, float]) -> str:
    return f"{100 * found['rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Patch | None]:
    """Everything asked for, as one document; and the patch that was measured."""
    began, cases = time.perf_counter(), cases_of(options)
    questions = load_standard(UTILITY, data=options.data, n=options.utility).questions if options.utility else None
    if questions is not None:
        questions = replace(questions, answer_tokens=options.answer_tokens)
    loaded = load_model(options.model, dtype=options.dtype)
    patch = load_patch(options.patch, model_hash=loaded.hash) if options.patch else None
    subjects = ([] if options.no_base else [("base", None)]) + ([("patch", patch)] if patch else [])
    judge: Judge = PhraseJudge() if options.judge == "phrases" else LocalJudge()
    document: dict[str, Any] = {
        "model": loaded.name,
        "part": options.part,
        "digest": patch.digest if patch else None,
        "tokens": options.tokens,
        "judge": judge.name,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        for name, subject in subjects:
            result = evaluate(
                loaded.model,
                loaded.tokenizer,
                cases,
                judge,
                questions=questions,
                runtime=runtime,
                patch=subject,
                base_hash=loaded.hash,
                model_name=loaded.name,
                batch_size=options.batch,
                max_new_tokens=options.tokens,
                workdir=options.work,
                progress=lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr, flush=True),
            )
            document[name] = {"rates": rates(result)}
            if questions is not None:
                document[name]["utility"] = utility(result.ability)
    document["seconds"] = round(time.perf_counter() - began)
    return document, patch


def main() -> None:
    """Ask the base and the patch, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--patch")
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--judge", choices=("phrases", "local"), default="phrases")
    parser.add_argument("--suites", help="only suites whose name has one of these in it, separated by commas")
    parser.add_argument("--without", help="no suites whose name has one of these in it")
    parser.add_argument("--no-base", action="store_true")
    parser.add_argument("--utility", type=int, default=0, metavar="N", help="also measure utility on N questions a set")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/real-models"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--card", type=Path, help="write the patch's card here")
    options = parser.parse_args()
    if options.card and not options.patch:
        parser.error("--card without --patch")
    document, patch = run(options)
    print("\n".join(lines(document)))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.card and patch is not None:
        options.card.write_text(card(patch, document), encoding="utf-8")


if __name__ == "__main__":
    main()
