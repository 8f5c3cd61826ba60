"""What each setting of the recipe is worth on a real model: one change at a time, on the validation part.

    python benchmarks/levers.py --data ../shared/data --model M.gguf --json FILE [--levers plain,causal] [--n 50]
    python benchmarks/levers.py --from FILE

Every row is a patch of its own, trained from the prompts of ``patches/make_real.py`` by the same short recipe with one
lever's settings (``A+B``: those of both), and measured as ``benchmarks/real_models.py --part validation`` does. The
test part is not looked at. Finished rows are kept in the file, so that a second run goes on. A line a minute goes to
stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "patches")]
from make_real import DEFAULT, training_prompts  # noqa: E402  (beside this file)
from real_models import rates, validation_cases  # noqa: E402

from nest_runtime.evaluate.judges.phrases import PhraseJudge  # noqa: E402
from nest_runtime.evaluate.public import PublicData  # noqa: E402
from nest_runtime.evaluate.run import evaluate  # noqa: E402
from nest_runtime.model.load import LoadedModel, load_model  # noqa: E402
from nest_runtime.patch.patch import Patch  # noqa: E402
from nest_runtime.runtime import PatchRuntime  # noqa: E402
from nest_runtime.train.pipeline import train_patch  # noqa: E402

SHORT: dict[str, Any] = {"steps": 50, "framings": 1, "validate_every": 25}  # beside the default recipe
LEVERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "base": ("the base", {}),
    "plain": ("the default, 50 steps, one framing", {}),
    "random": ("as many random neurons", {"control": "random"}),
    "causal": ("scored by the effect on the refusal", {"score": "causal"}),
    "up": ("up_proj alone", {"projections": "up"}),
    "gate": ("gate_proj alone", {"projections": "gate"}),
    "one": ("one row a projection (rank 1)", {"k_min": 1, "k_max": 1}),
    "whole": ("whole depth, one row a projection", {"depth_from": 0.0, "depth_to": 1.0, "k_min": 1, "k_max": 1}),
    "late": ("from 0.3 of the depth to its end, one row a projection", {"depth_to": 1.0, "k_min": 1, "k_max": 1}),
    "early": ("from the first layer to 0.75, one row a projection", {"depth_from": 0.0, "k_min": 1, "k_max": 1}),
    "framings3": ("three framings", {"framings": 3}),
    "long": ("two framings of up to 1,200 characters", {"framings": 2, "framed_characters": 1200}),
    "lr": ("twice the learning rate", {"lr": 0.32}),
    "tied": ("tied rows, as in the paper", {"loadings": "tied"}),
    "z3": ("z 3, the paper's scale", {"z": 3.0}),
    "ablation": ("refusal direction taken away at one token in twenty", {"ablation": 0.05}),
    "margin": ("a margin over harmful beginnings", {"margin_weight": 1.0}),
    "mask": ("learned row masks", {"mask_weight": 1.0, "z": 1.5}),
    "recovery": ("no recovery rows", {"recovery_tokens": 0}),
    "kl": ("no divergence from the base; cross-entropy on benign answers", {"kl_weight": 0.0, "benign_weight": 1.0}),
    "framings": ("no framings, nothing in code", {"framings": 0, "code_framings": 0}),
}


def main() -> None:
    """Train and measure the rows that are not in the file yet; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="print this result; measure nothing")
    parser.add_argument("--levers", default=",".join(LEVERS), help="some of them, in this order; A+B is both at once")
    parser.add_argument("--n", type=int, default=50, help="prompts a suite")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/levers"))
    options = parser.parse_args()
    if options.source:
        print("\n".join(table(json.loads(options.source.read_text(encoding="utf-8")))))
        return
    wanted = options.levers.split(",")
    if unknown := sorted({part for name in wanted for part in name.split("+")} - set(LEVERS)):
        parser.error(f"no lever is called {', '.join(unknown)}; there are {', '.join(LEVERS)}")
    if not (options.data and options.model and options.json):
        parser.error("give --data, --model and --json, or --from")
    measure(options, wanted)


def measure(options: argparse.Namespace, wanted: list[str]) -> None:
    """The rows, each written as soon as it is finished."""
    loaded = load_model(options.model)
    document = begun(options, loaded)
    for name in wanted:
        if name in document["rows"]:
            continue
        row = one(options, loaded, name)
        document["rows"][name] = {**row, "date": datetime.now(UTC).date().isoformat()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(row['rates'])}", file=sys.stderr, flush=True)
    print("\n".join(table(document)))


def begun(options: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """The document in the file if it is of the same model and prompts, else a new one."""
    about = {
        "model": loaded.name,
        "base_hash": loaded.hash,
        "n": options.n,
        "tokens": options.tokens,
        "seed": options.seed,
        "short": SHORT,
        "judge": "phrases",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    if options.json.is_file():
        found: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8"))
        if all(found.get(key) == value for key, value in about.items() if key != "machine"):
            return found
        raise SystemExit(f"{options.json} is of another model or other settings; give another file")
    return {**about, "rows": {}}


def one(options: argparse.Namespace, loaded: LoadedModel, name: str) -> dict[str, Any]:
    """A lever's patch, and its rates on the validation part."""
    patch, report = (None, None) if name == "base" else trained(options, loaded, name)
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            validation_cases(PublicData.at(options.data), options.n),
            PhraseJudge(),
            runtime=runtime,
            patch=patch,
            base_hash=loaded.hash,
            model_name=loaded.name,
            batch_size=32,
            max_new_tokens=options.tokens,
            workdir=options.work / "answers",
            progress=Told(name),
        )
    row: dict[str, Any] = {"rates": rates(result)}
    if patch is not None and report is not None:
        kept = ("best_step", "validation", "seconds", "trainable")
        row |= {"numbers": patch.parameters, "neurons": patch.neurons, **{key: report[key] for key in kept}}
    return row


def changes(name: str) -> dict[str, Any]:
    """The settings of a lever, or of several with ``+`` between them; the last one to set a field counts."""
    return {field: value for part in name.split("+") for field, value in LEVERS[part][1].items()}


def trained(options: argparse.Namespace, loaded: LoadedModel, name: str) -> tuple[Patch, dict[str, Any]]:
    """The patch of a lever, and the report of its making."""
    harmful, benign = training_prompts(options.data, DEFAULT)
    result = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful,
        benign,
        recipe=DEFAULT.recipe.evolve(**{**SHORT, **changes(name), "seed": options.seed}),
        name=f"lever-{name}",
        version="v1",
        base_hash=loaded.hash,
        base_model=loaded.name,
        workdir=options.work / "stages",
        progress=Told(name),
    )
    return result.patch, result.report


class Told:
    """Prints a line a minute."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Called as work goes on."""
        if time.perf_counter() - self.last > 60 or done == total:
            self.last = time.perf_counter()
            print(f"{self.name}: {stage} {done}/{total}", file=sys.stderr, flush=True)


def table(document: Mapping[str, Any]) -> list[str]:
    """The rows in Markdown; rates in percent."""
    rows = {name: row for name, row in document["rows"].items() if set(name.split("+")) <= set(LEVERS)}
    suites = list(next(iter(rows.values()))["rates"])
    lines = [f"| {document['model']} | numbers | {' | '.join(suites)} |", "|---" * (2 + len(suites)) + "|"]
    for name, row in rows.items():
        cells = [f"{100 * row['rates'][suite]['rate']:.1f}" for suite in suites]
        what = "; ".join(LEVERS[part][0] for part in name.split("+"))
        lines.append(f"| {what} | {row.get('numbers', '–')} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
