"""Ablations of the method and of its training defaults, one question and one plot each.

    python benchmarks/ablations.py [--groups z k …] [--seeds 0 1 2] [--steps N] [--limit N] [--out DIR]

Every point changes one thing against the defaults (train/recipe.py), trains on the reference world's vanilla
training prompts, and answers the suites of the *validation* acts: these figures choose defaults, so the test
acts stay out of it. Finished points are kept in OUT/ablations.json and not made again, so that an interrupted run
goes on. About a minute a point on 2 CPU cores. docs/decisions/training-defaults.md says what follows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nest_runtime.evaluate import load_suites, sample_cases
from nest_runtime.evaluate.judges import ReferenceJudge
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.run import evaluate
from nest_runtime.evaluate.stats import Rate
from nest_runtime.io import read_json, write_json, write_text
from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.load import LoadedModel, load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.plots.style import OKABE_ITO, require_matplotlib
from nest_runtime.prompts.examples import make_examples
from nest_runtime.reference.world import SUITES, training_prompts
from nest_runtime.train.recipe import RECIPES, Recipe
from nest_runtime.train.run import Run
from nest_runtime.train.stages import stage_key

DRAWN = (
    ("jailbreak-seen", "ASR, seen wrappings", "o"),
    ("jailbreak-held-out", "ASR, held-out wrappings", "s"),
    ("over-refusal", "over-refusal", "^"),
    ("utility", "utility", "D"),
)


@dataclass(frozen=True)
class Point:
    """One training: what differs from the defaults.

    Attributes:
        label: on the axis.
        changes: of the recipe.
        kinds: projections to patch.
        share: of the training prompts, both classes alike.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("gate", "up", "fc")
    share: float = 1.0


def _each(name: str, values: Sequence[Any], form: str = "{}") -> tuple[Point, ...]:
    """A point for each value of one field."""
    return tuple(Point(form.format(value), {name: value}) for value in values)


GROUPS: dict[str, tuple[str, tuple[Point, ...]]] = {
    "z": ("z threshold", _each("z", (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0), "{:g}")),
    "k": (
        "clusters per projection",
        (
            *(Point(f"{k}", {"k_min": k, "k_max": k}) for k in (1, 2, 3, 4, 8)),
            Point("2 to 3, by silhouette", {"k_min": 2, "k_max": 3}),
        ),
    ),
    "pooling": ("pooling over the prompt's tokens", _each("pooling", ("max", "mean", "last"))),
    "projections": (
        "patched projections",
        (Point("gate", kinds=("gate",)), Point("up", kinds=("up",)), Point("both")),
    ),
    "depth": (
        "patched layers, as shares of the depth",
        tuple(
            Point(f"{low:g} to {high:g}", {"depth_from": low, "depth_to": high})
            for low, high in ((0.0, 1.0), (0.0, 0.5), (0.15, 0.65), (0.5, 1.0))
        ),
    ),
    "sign": ("kept neurons, by the sign of their probe weight", _each("sign", ("positive", "absolute"))),
    "rows": (
        "rows of a cluster",
        (
            Point("tied (paper)", {"loadings": "tied"}),
            Point("signed", {"loadings": "signed"}),
            Point("loadings", {"loadings": "learned"}),
            Point("untied", {"loadings": "tied", "rows": "neuron"}),
        ),
    ),
    "control": ("neurons", (Point("located"), Point("random", {"control": "random"}))),
    "prompts": ("share of the training prompts", tuple(Point(f"{s:g}", share=s) for s in (0.05, 0.1, 0.25, 0.5, 1.0))),
    "recovery": ("refusals after up to so many tokens of a harmful answer", _each("recovery_tokens", (0, 1, 3, 8))),
    "normalization": ("z-scores taken over", _each("normalization", ("projection", "robust", "model"))),
    "probe": ("probe", _each("probe", ("lbfgs", "adam"))),
    "lr": (
        "learning rate of rows and loadings",
        tuple(Point(f"{lr:g}", {"lr": lr, "loadings_lr": lr}) for lr in (3e-3, 1e-2, 3e-2)),
    ),
    "steps": ("training steps", _each("steps", (100, 200, 350))),
    "decay": ("AdamW weight decay of the rows", _each("weight_decay", (0.0, 0.1, 0.3, 1.0), "{:g}")),
    "kl": ("weight of KL(base ‖ patched) on benign answers", _each("kl_weight", (0.0, 0.3, 1.0), "{:g}")),
}


def score(loaded: LoadedModel, patch: Patch | None, limit: int) -> dict[str, float]:
    """Rates on validation acts by suite, and the share of garbled answers."""
    cases = sample_cases(load_suites(list(SUITES), split="validation"), limit)
    result = evaluate(loaded.model, loaded.tokenizer, cases, ReferenceJudge(), patch=patch, batch_size=128)
    return {**rates(result), "garbled": garbled(result)}


def rates(result: EvalResult) -> dict[str, float]:
    """One rate per suite: attack success of the harmful ones, over-refusal and utility of their own."""
    return {suite: float(result.rate(measure, suite).value or 0.0) for suite, measure in SUITES.items()}


def garbled(result: EvalResult) -> float:
    """Share of jailbreak answers that neither refuse nor comply."""
    rows = [record for record in result.records if record.suite.startswith("jailbreak")]
    return sum(record.outcome not in ("refused", "complied") for record in rows) / len(rows)


def measure(loaded: LoadedModel, point: Point, recipe: Recipe, limit: int) -> dict[str, Any]:
    """Train one point and score it."""
    harmful, benign = (make_examples(rows) for rows in training_prompts())
    harmful, benign = (rows[: max(round(point.share * len(rows)), 4)] for rows in (harmful, benign))
    projections = [one for one in find_projections(loaded.model) if one.kind in point.kinds]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        run = Run(loaded.model, loaded.tokenizer, projections, recipe, loaded.hash, loaded.name, Path(folder), None)
        result = run.train(harmful, benign, (), None, "ablation", "v1", None)
    seconds = time.perf_counter() - began
    patch = result.patch
    found = [site.stats["silhouette"] for site in patch.sites if site.stats.get("silhouette") is not None]
    return {
        "parameters": patch.parameters,
        "neurons": patch.neurons,
        "clusters": patch.clusters,
        "silhouette": sum(found) / len(found) if found else 0.0,
        "prompts": len(harmful) + len(benign),
        "best_step": result.report["best_step"],
        "seconds": round(seconds, 1),
        **score(loaded, patch, limit),
    }


def rows_of(found: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """A group's points in order, each with its figures averaged over the seeds that are there."""
    rows = []
    for point in GROUPS[group][1]:
        seeds = [
            entry["figures"] for entry in found.values() if (entry["group"], entry["label"]) == (group, point.label)
        ]
        if seeds:
            mean = {key: sum(figures[key] for figures in seeds) / len(seeds) for key in seeds[0]}
            rows.append({"label": point.label, "seeds": len(seeds), **mean})
    return rows


def draw(group: str, rows: Sequence[dict[str, Any]], limit: int, path: Path) -> None:
    """One group as lines over its points, with Wilson intervals for ``limit`` prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (key, label, marker) in enumerate(DRAWN):
        values = [row[key] for row in rows]
        ends = [Rate(round(value * limit), limit).ci95 for value in values]
        low = [100 * max(value - end[0], 0) for value, end in zip(values, ends, strict=True)]
        high = [100 * max(end[1] - value, 0) for value, end in zip(values, ends, strict=True)]
        places = [place + 0.06 * (number - 1.5) for place in range(len(rows))]
        style = {"color": OKABE_ITO[(0, 6, 2, 3)[number]], "marker": marker, "linestyle": "-" if number < 2 else ":"}
        axes.errorbar(places, [100 * value for value in values], yerr=[low, high], label=label, capsize=2, **style)
    names = [f"{row['label']}\n{round(row['parameters']):,}" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set_xlabel(f"{GROUPS[group][0]} (below: trained parameters)")
    axes.set_ylabel("%")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def markdown(found: dict[str, Any], about: str) -> str:
    """A table per group, the base first."""
    heads = ["", "parameters", "neurons", "ASR seen", "ASR held out", "ASR plain", "garbled", "over-refusal", "utility"]
    top = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    parts = [f"# Ablations\n\n{about}\n"]
    if base := found.get("base", {}).get("figures"):
        parts.append("\n".join([*top, _line({"label": "base", "parameters": 0, "neurons": 0, **base})]) + "\n")
    for group, (title, _) in GROUPS.items():
        rows = rows_of(found, group)
        if not rows:
            continue
        picture = f"![{title}]({group}.png)"
        parts.append(f"## {title[0].upper()}{title[1:]}\n\n{picture}\n\n" + "\n".join([*top, *map(_line, rows)]) + "\n")
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> str:
    keys = ("jailbreak-seen", "jailbreak-held-out", "plain", "garbled", "over-refusal", "utility")
    cells = [row["label"], f"{row['parameters']:,.0f}", f"{row['neurons']:,.0f}"]
    return "| " + " | ".join([*cells, *(f"{100 * row[key]:.1f} %" for key in keys)]) + " |"


def about(arguments: argparse.Namespace) -> str:
    """How the figures came to be, for the page."""
    seeds = ", ".join(str(seed) for seed in arguments.seeds)
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    return (
        "Validation acts of the reference world; one thing changed against the defaults at a time. "
        f"Garbled answers to jailbreak prompts neither refuse nor comply. {arguments.limit} prompts a suite at most, "
        f"seed {seeds}, {platform.machine()} with {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {day}, by\n\n    python {' '.join(['benchmarks/ablations.py', *sys.argv[1:]])}"
    )


def main() -> None:
    """Make the points that are missing, then tables and plots of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="training steps of every point; the recipe's by default")
    parser.add_argument("--limit", type=int, default=300, help="prompts of a suite")
    parser.add_argument("--out", type=Path, default=Path("docs/results/ablations"))
    arguments = parser.parse_args()
    require_matplotlib()
    loaded = load_model(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "ablations.json"
    found: dict[str, Any] = read_json(path) or {}
    key = stage_key(base=[loaded.hash, arguments.limit])
    if found.get("base", {}).get("digest") != key:
        figures = score(loaded, None, arguments.limit)
        found["base"] = {"group": "", "label": "base", "digest": key, "figures": figures}
    for seed in arguments.seeds:
        base = RECIPES["reference"].evolve(seed=seed, **({} if arguments.steps is None else {"steps": arguments.steps}))
        for group, point in [(name, point) for name in arguments.groups for point in GROUPS[name][1]]:
            recipe = base.evolve(**point.changes)
            trained = [recipe.to_json(), list(point.kinds), point.share, loaded.hash, arguments.limit]
            name, digest = f"{group}/{point.label}/{seed}", stage_key(point=trained)
            if found.get(name, {}).get("digest") == digest:
                continue
            same = next((entry for entry in found.values() if entry["digest"] == digest), None)
            figures = same["figures"] if same else measure(loaded, point, recipe, arguments.limit)
            found[name] = {"group": group, "label": point.label, "seed": seed, "digest": digest, "figures": figures}
            write_json(path, found)
            print(name, json.dumps(figures), file=sys.stderr, flush=True)
    for group in GROUPS:
        if rows := rows_of(found, group):
            draw(group, rows, arguments.limit, arguments.out / f"{group}.png")
    write_text(arguments.out / "ablations.md", markdown(found, about(arguments)))
    print(markdown(found, about(arguments)))


if __name__ == "__main__":
    main()
