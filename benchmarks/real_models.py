"""The table of goals for a patch on a real model: attack success, over-refusal, utility, base beside patch.

    python benchmarks/real_models.py --data ../shared/data --model M.gguf [--patch P] [--part test|validation] [--n 100]

Suites are drawn by seed from public prompt sets that are not part of this project (``--data`` names their folder).
Settings are chosen on ``--part validation`` (HarmBench's validation behaviors, plain, in this project's held-out
framings and behind wild prompts that the test does not use; the bundled validation prompts) and reported on ``--part
test``. Answers are greedy and kept in ``--work``, so that a second run goes on, and the base is asked once.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nest_runtime.evaluate.attacks import ATTACKS, apply_attacks
from nest_runtime.evaluate.cases import Case, user
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.judges.phrases import PhraseJudge
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.run import evaluate, patched
from nest_runtime.evaluate.stats import wilson
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import encode, load_examples
from nest_runtime.prompts.framings import HELD_OUT_FRAMINGS
from nest_runtime.prompts.generate import ModelAnswer, answer_conversations
from nest_runtime.resolve import load_patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.forward import Readout, hidden_states

WILD_CHARACTERS = 1200
WILD_FOR_VALIDATION = 100
# Built-in attacks that take one answer each (no search, no turns of the model's own) and no long demonstrations.
NOT_SINGLE = ("direct", "many-shot", "crescendo", "best-of-n", "prefill", "gcg")


@dataclass(frozen=True)
class Data:
    """The folder of public prompt sets."""

    folder: Path

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file."""
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def questions(self, name: str) -> list[str]:
        """The questions of one of DeRTa's test sets."""
        text = (self.folder / "derta" / name).read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        return [str(row["question"]) for row in found]

    def jbb(self, kind: str) -> list[str]:
        """JailbreakBench's texts, ``harmful`` or ``benign`` (which the file calls safe)."""
        path = self.folder / "jailbreakbench" / "harmful_and_benign" / "jailbreakbench.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        return [str(row["text"]) for row in found if (row["label"] == "harmful") == (kind == "harmful")]

    def harmbench(self, part: str) -> list[str]:
        """HarmBench's behaviors without context of their own."""
        rows = self.rows(f"harmbench/harmbench_behaviors_text_{part}.csv")
        return [row["Behavior"] for row in rows if row["FunctionalCategory"] == "standard"]

    def wild(self, part: str) -> list[str]:
        """Prompts found in the wild, short enough; the first hundred of a seeded order are for validation."""
        found = [row["prompt"] for row in self.rows("in_the_wild/jailbreak_prompts.csv")]
        short = sorted({text for text in found if 100 <= len(text) <= WILD_CHARACTERS})
        random.Random("wild").shuffle(short)
        return short[:WILD_FOR_VALIDATION] if part == "validation" else short[WILD_FOR_VALIDATION:]

    def jsonl(self, name: str, key: str) -> list[str]:
        """One field of a JSONL file's rows."""
        lines = (self.folder / name).read_text(encoding="utf-8").split("\n")
        return [str(json.loads(line)[key]) for line in lines if line.strip()]


def harmful(suite: str, prompts: Sequence[tuple[str, str]], family: str) -> list[Case]:
    """Cases of (what is typed, what is wanted)."""
    return [
        Case(f"{suite}/{number}", (user(text),), "harmful", suite, family=family, behavior=goal)
        for number, (text, goal) in enumerate(prompts)
    ]


def benign(suite: str, prompts: Sequence[str]) -> list[Case]:
    """Cases that a good model answers."""
    return [Case(f"{suite}/{number}", (user(text),), "benign", suite) for number, text in enumerate(prompts)]


def drawn(items: Sequence[Any], n: int, purpose: str) -> list[Any]:
    """At most n of the items, by a seed that the purpose makes."""
    found = list(items)
    random.Random(purpose).shuffle(found)
    return found[:n]


def behind(wild: Sequence[str], goals: Sequence[str], n: int) -> list[tuple[str, str]]:
    """Goals, each behind a wild prompt of its own while there are enough."""
    return [(f"{wild[i % len(wild)]}\n\n{goals[i % len(goals)]}", goals[i % len(goals)]) for i in range(n)]


def validation_cases(data: Data, n: int) -> list[Case]:
    """What settings are chosen by."""
    goals = drawn(data.harmbench("val"), n, "val")
    framed = [
        (HELD_OUT_FRAMINGS[i % len(HELD_OUT_FRAMINGS)].render(goal)[-1]["content"], goal)
        for i, goal in enumerate(goals)
    ]
    return [
        *harmful("plain", [(goal, goal) for goal in goals], "direct"),
        *harmful("held-out framings", framed, "framing"),
        *harmful("wild, validation", behind(data.wild("validation"), goals, n), "wild"),
        *benign("bundled validation", drawn([e.prompt for e in load_examples(bundled("validation"))], n, "benign")),
    ]


def test_cases(data: Data, n: int) -> list[Case]:
    """What is reported."""
    jbb = drawn(data.jbb("harmful"), 100, "jbb")
    plain = drawn([*jbb, *data.harmbench("test")], n, "plain")
    goals = drawn(plain, n, "goals")
    direct = harmful("built-in", [(goal, goal) for goal in goals], "direct")
    single = [attack for name, attack in ATTACKS.items() if name not in NOT_SINGLE]
    attacked = [made for i, case in enumerate(direct) for made in apply_attacks([case], [single[i % len(single)]])[1:]]
    safe = [row["prompt"] for row in data.rows("xstest/xstest_prompts.csv") if row["label"] == "safe"]
    sets = {"jailbreakchat": "framing", "selfcipher": "encoding", "codeattack": "code"}
    return [
        *harmful("plain", [(goal, goal) for goal in plain], "direct"),
        *harmful("wild", behind(data.wild("test"), goals, n), "wild"),
        *[
            case
            for name, family in sets.items()
            for case in harmful(name, [(q, q) for q in drawn(data.questions(f"safety_{name}.json"), n, name)], family)
        ],
        *attacked,
        *benign("XSTest, safe", drawn(safe, n, "xstest")),
        *benign("JailbreakBench, benign", drawn(data.jbb("benign"), n, "jbb benign")),
        *benign("CoCoNot, contrast", drawn(data.jsonl("coconot/coconot_contrast_eval.jsonl", "prompt"), n, "coconot")),
    ]


def utility(loaded: Any, data: Data, n: int) -> dict[str, float]:
    """MMLU by the likeliest letter and GSM8K by nats per token of the solution, under the patch that is on."""
    readout = Readout(loaded.model)

    def logs(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            states = hidden_states(loaded.model, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
            return readout.head(states).log_softmax(-1)  # (answer tokens, vocabulary)

    right, mmlu = 0, drawn(json_rows(data.folder / "derta/helpfulness_mmlu_500.json"), n, "mmlu")
    letters = [loaded.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    for row in mmlu:
        prompt = encode(loaded.tokenizer, [user(f"{row['question']}\nAnswer with the letter alone.")])
        right += "ABCD"[int(logs(prompt, letters[:1])[0, letters].argmax())] == str(row["answer"]).strip()[:1]
    total, count = 0.0, 0
    for row in drawn(json_rows(data.folder / "gsm8k/test_first200.jsonl"), n, "gsm8k"):
        answer = loaded.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        found = logs(encode(loaded.tokenizer, [user(row["question"])]), answer)
        total -= float(found[range(len(answer)), answer].sum())
        count += len(answer)
    return {"mmlu": right / len(mmlu), "mmlu_n": len(mmlu), "gsm8k_nats": total / count}


def ordinary(loaded: Any, data: Data, n: int, tokens: int, batch: int) -> list[ModelAnswer]:
    """Answers to Alpaca instructions, under the patch that is on."""
    asked = [[user(text)] for text in drawn(data.jsonl("alpaca/alpaca_2000.jsonl", "prompt"), n, "alpaca")]
    return answer_conversations(loaded.model, loaded.tokenizer, asked, max_new_tokens=tokens, batch_size=batch)


def divergence(
    loaded: Any, runtime: PatchRuntime, patch: Patch, data: Data, n: int, answers: Sequence[ModelAnswer]
) -> float:
    """KL(base ‖ patched), nats a token, on the base's own answers to Alpaca instructions."""
    readout, total, count = Readout(loaded.model), 0.0, 0
    asked = drawn(data.jsonl("alpaca/alpaca_2000.jsonl", "prompt"), n, "alpaca")
    for text, answer in zip(asked, answers, strict=True):
        prompt, own = encode(loaded.tokenizer, [user(text)]), loaded.tokenizer(answer.text, add_special_tokens=False)
        ids = torch.tensor([[*prompt, *own["input_ids"]]])
        found = []
        for on in (None, patch.digest):
            with runtime.using(on), torch.no_grad():
                states = hidden_states(loaded.model, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
                found.append(readout.head(states).log_softmax(-1))
        total += float((found[0].exp() * (found[0] - found[1])).sum())
        count += len(own["input_ids"])
    return total / max(count, 1)


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, or of JSON lines."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


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

`python patches/make_real.py`: {harmful} AdvBench goals, without those that JailbreakBench and HarmBench test with,
against {benign} benign prompts that come with the package, both in everyday framings too. No jailbreak text was trained
on. Settings:

{recipe}

## Limits

- Made on this very file. Another quantization, or the original checkpoint, is another base: `nest-runtime retarget`.
- The file lists the neurons that it changes. Who holds the weights can undo the patch, or prune exactly those neurons.
- Attacks that were searched for against this patch were not tried.
"""


def _interval(found: dict[str, float]) -> str:
    return f"{100 * found['rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as one document."""
    began, data = time.perf_counter(), Data(options.data)
    loaded = load_model(options.model, dtype=options.dtype)
    cases = (test_cases if options.part == "test" else validation_cases)(data, options.n)
    if options.suites:
        cases = [case for case in cases if any(part in case.suite for part in options.suites.split(","))]
    patch = load_patch(options.patch, model_hash=loaded.hash) if options.patch else None
    subjects = ([] if options.no_base else [("base", None)]) + ([("patch", patch)] if patch else [])
    judge: Judge = PhraseJudge() if options.judge == "phrases" else local_judge()
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
        base_answers: list[ModelAnswer] = []
        for name, subject in subjects:
            result = evaluate(
                loaded.model,
                loaded.tokenizer,
                cases,
                judge,
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
            if options.utility:
                with patched(loaded.model, runtime, subject, base_hash=loaded.hash):
                    figures = utility(loaded, data, options.utility)
                    answers = ordinary(loaded, data, options.utility, options.answer_tokens, options.batch)
                figures["answer_tokens"] = sum(len(loaded.tokenizer(a.text)["input_ids"]) for a in answers) / len(
                    answers
                )
                base_answers = base_answers or answers
                document[name]["utility"] = figures
        if patch is not None and options.utility and not options.no_base:
            with patched(loaded.model, runtime, patch, base_hash=loaded.hash):
                kl = divergence(loaded, runtime, patch, data, options.utility, base_answers)
            document["patch"]["utility"]["kl"] = kl
            document["base"]["utility"]["kl"] = 0.0
    document["seconds"] = round(time.perf_counter() - began)
    return document


def local_judge() -> Judge:
    """The judge that comes with the package."""
    from nest_runtime.evaluate.judges.local import LocalJudge

    return LocalJudge()


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
    parser.add_argument("--suites", help="only suites whose name has this in it")
    parser.add_argument("--no-base", action="store_true")
    parser.add_argument("--utility", type=int, default=0, metavar="N", help="also measure utility on N questions a set")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/real-models"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--card", type=Path, help="write the patch's card here")
    options = parser.parse_args()
    document = run(options)
    print("\n".join(lines(document)))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.card:
        options.card.write_text(card(load_patch(options.patch), document), encoding="utf-8")


if __name__ == "__main__":
    main()
