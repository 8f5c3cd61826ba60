"""Adaptive attacks on a patched model, made against that very model: base beside patch, as a table and as JSON.

    python benchmarks/adaptive.py --data ../shared/data --model M.gguf --patch v1 [--n 25] [--out FILE.json]

Goals are the standard suite's plain ones. The refusal direction is found with the prompts that come with the package.
Everything found and answered is kept in ``--work``, and the same command goes on from there. One line a minute, or an
attack, goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nest_runtime.evaluate.adaptive import (
    DIRECTION_PROMPTS,
    SEARCHES,
    SURGERY,
    Attacked,
    Range,
    attack_range,
    check_attacks,
)
from nest_runtime.evaluate.judges import make_judge
from nest_runtime.evaluate.markdown import NONE, interval, percent, table
from nest_runtime.evaluate.public import drawn
from nest_runtime.evaluate.standard import load_standard
from nest_runtime.model.load import load_model
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import load_examples
from nest_runtime.resolve import load_patch
from nest_runtime.runtime import PatchRuntime

HEAD = ("attack", "needs", "n", "base", "its 95 % interval", "patch", "its 95 % interval")
MORE = ("other, patch", "harmless refused, patch", "harmless neither, patch")


def lines(document: dict[str, Any]) -> str:
    """The table in Markdown."""
    base = {row["attack"]: row for row in document.get("base", [])}
    rows = []
    for row in document["patch"]:
        before = base.get(row["attack"])
        cells = [row["attack"], row["knows"], str(row["n"])]
        cells += [NONE, NONE] if before is None else [percent(before["asr"]), interval(before["ci95"])]
        cells += [percent(row["asr"]), interval(row["ci95"]), percent(row["other"])]
        refused = row["over_refusal"]
        cells += [NONE, NONE] if refused is None else [percent(refused["rate"]), percent(row["other_benign"])]
        rows.append(cells)
    return table([*HEAD, *MORE], rows)


class Minutes:
    """A line of progress a minute."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self.last >= 60 or done == total:
            self.last = time.monotonic()
            print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as one document."""
    specs = options.attacks.split(",")
    standard = load_standard(["plain", "jailbreakbench-benign"], data=options.data, n=options.n, seed=options.seed)
    harmful = drawn(load_examples(bundled("harmful")), DIRECTION_PROMPTS, "direction", options.seed)
    harmless = drawn(load_examples(bundled("everyday")), DIRECTION_PROMPTS, "direction", options.seed)
    loaded = load_model(options.model, dtype=options.dtype)
    patch = load_patch(options.patch, model_hash=loaded.hash)
    check_attacks(specs, patch)
    document: dict[str, Any] = {
        "model": loaded.name,
        "patch_version": patch.version,
        "digest": patch.digest,
        "judge": options.judge,
        "tokens": options.tokens,
        "seed": options.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        runtime.add(patch)
        for name, subject in (("patch", patch), ("base", None)):
            if name == "base" and not options.with_base:
                continue
            where = Range(
                loaded,
                runtime,
                subject,
                [case for case in standard.cases if case.suite == "plain"],
                [case for case in standard.cases if case.kind == "benign"],
                harmful,
                harmless,
                make_judge(options.judge),
                max_new_tokens=options.tokens,
                batch_size=options.batch,
                seed=options.seed,
                workdir=options.work,
                progress=Minutes(),
            )
            fit = [spec for spec in specs if subject is not None or not spec.startswith("prune")]
            document[name] = []
            for found in attack_range(where, fit):
                document[name].append(found.to_json())
                print(said(name, found), file=sys.stderr, flush=True)
    return document


def said(subject: str, found: Attacked) -> str:
    """One attack in a line."""
    return f"{subject}: {found.attack}: {found.success} in {found.seconds:.0f} s {found.notes}"


def main() -> None:
    """Attack, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--patch", required=True)
    parser.add_argument("--attacks", default=",".join((*SEARCHES, *SURGERY)), help="with budgets, as gcg:20")
    parser.add_argument("--n", type=int, default=25)
    parser.add_argument("--with-base", action="store_true", help="attack the base too, each attack made against it")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--judge", default="local")
    parser.add_argument("--work", type=Path, default=Path("runs/adaptive"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    document = run(options)
    print(lines(document))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
