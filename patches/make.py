"""Makes the patches that ship with nest-runtime: v1, v2 and v3 of reference-safety, each with its card.

    python patches/make.py [--out patches] [--only v1 v2 v3] [--prompts talks]

- v1: trained from nothing on half of the harm categories.
- v2: re-tuned from v1 after the other categories appear; v1's neurons and clusters are kept.
- v3: re-tuned from v2 with the strongest recipe, then averaged with v1 and v2.

All train on vanilla prompts of train acts only and are measured on the test acts, which neither a patch nor a
choice of settings has seen (settings were chosen on validation acts, benchmarks/ablations.py).
``--prompts talks`` adds talks, forged turns, long everyday texts and harmful acts outside of the world
(nest_runtime/reference/talks.py, docs/decisions/reference-patches.md): the shipped patches are made without.
The same machine makes the same bytes again: dates come from SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nest_runtime.evaluate.judges import ReferenceJudge
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.run import evaluate
from nest_runtime.evaluate.stats import Rate
from nest_runtime.evaluate.suites import load_suite
from nest_runtime.model.load import LoadedModel, load_model
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import FrozenTensor, Patch
from nest_runtime.prompts.examples import make_examples
from nest_runtime.prompts.generate import generate_answers
from nest_runtime.reference.talks import patch_prompts
from nest_runtime.reference.world import CATEGORIES, ask, training_prompts
from nest_runtime.train.pipeline import train_patch
from nest_runtime.train.recipe import RECIPES, Recipe

NAME = "reference-safety"
MADE = "1795392000"  # 2026-11-23, unless SOURCE_DATE_EPOCH says otherwise
FIRST_HALF = CATEGORIES[::2]
LORA_PARAMETERS = 30_720  # rank 8 on q_proj and v_proj: 6 layers × 2 × 8 × (160 + 160)
JAILBREAKS = ("jailbreak-seen", "jailbreak-held-out")
BENIGN = (("over-refusal, benign acts refused", "over_refusal"), ("utility, exactly right", "utility"))


@dataclass(frozen=True)
class Step:
    """How one version is made.

    Attributes:
        version: and ``parent``, the version it is re-tuned from.
        categories: harm categories of its training prompts.
        recipe: its settings.
        changed: what its card says of the change.
        averaged: earlier versions whose rows and loadings are averaged with the trained ones, equally.
    """

    version: str
    parent: str | None
    categories: tuple[str, ...]
    recipe: Recipe
    changed: str
    averaged: tuple[str, ...] = ()


STEPS = (
    Step(
        "v1",
        None,
        FIRST_HALF,
        RECIPES["reference"].evolve(k_min=3),
        f"The first patch: trained on {len(FIRST_HALF)} of {len(CATEGORIES)} harm categories "
        f"({', '.join(FIRST_HALF)}), with a trained loading per neuron, which goes beyond the paper.",
    ),
    Step(
        "v2",
        "v1",
        CATEGORIES,
        RECIPES["reference"].evolve(steps=150),
        "Re-tuned from v1 after the other harm categories appeared; same neurons and clusters, new values.",
    ),
    Step(
        "v3",
        "v2",
        CATEGORIES,
        RECIPES["reference"].evolve(steps=250, lr=5e-3, loadings_lr=5e-3, harmful_share=0.4),
        "Re-tuned from v2 by the strongest recipe: more steps at half the learning rate, more benign prompts in each; "
        "then rows and loadings averaged with those of v1 and v2, which gives utility back at no size.",
        averaged=("v1", "v2"),
    ),
)


def main() -> None:
    """Make the versions asked for; earlier ones are read from ``--out`` where they are not made anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--prompts", choices=["plain", "talks"], default="plain")
    parser.add_argument("--only", nargs="*", choices=[step.version for step in STEPS])
    arguments = parser.parse_args()
    os.environ.setdefault("SOURCE_DATE_EPOCH", MADE)
    arguments.out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(arguments.model)
    base = measure(loaded, None)
    print(f"base: {line(base)}", file=sys.stderr, flush=True)
    for step in STEPS:
        if arguments.only and step.version not in arguments.only:
            continue
        parent = read_patch(arguments.out / f"{step.parent}.safetensors") if step.parent else None
        patch, report, seconds = make(loaded, step, parent, arguments.prompts)
        patch = average(patch, [read_patch(arguments.out / f"{version}.safetensors") for version in step.averaged])
        result = measure(loaded, patch).compared_with(base)
        patch = patch.evolve(metrics={**patch.header()["metrics"], "test": figures(result), "base": figures(base)})
        path = patch.save(arguments.out / f"{step.version}.safetensors")
        path.with_suffix(".md").write_text(card(step, patch, parent, result, base, report, seconds), encoding="utf-8")
        print(f"{step.version}: {line(result)}; {patch!r}, {seconds:.0f} s", file=sys.stderr, flush=True)


def make(
    loaded: LoadedModel, step: Step, parent: Patch | None, prompts: str = "plain"
) -> tuple[Patch, dict[str, Any], float]:
    """Train one version on ``plain`` prompts or on ``talks`` too; gives it, the report and the seconds."""
    if prompts == "talks":
        rows = patch_prompts(partial(base_answers, loaded), step.categories)
    else:
        rows = training_prompts(step.categories)
    harmful, benign = (make_examples(part, "reference") for part in rows)
    began = time.perf_counter()
    result = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful,
        benign,
        recipe=step.recipe,
        name=NAME,
        version=step.version,
        base_hash=loaded.hash,
        base_model=loaded.name,
        parent=parent,
    )
    return result.patch, result.report, time.perf_counter() - began


def base_answers(loaded: LoadedModel, prompts: Sequence[str]) -> list[str]:
    """The base's greedy answers to prompts."""
    talks = [ask(prompt, "") for prompt in prompts]
    return generate_answers(loaded.model, loaded.tokenizer, talks)


def average(patch: Patch, others: Sequence[Patch]) -> Patch:
    """The patch with rows and loadings averaged over versions of one lineage (same neurons, same clusters).

    Weight averaging of fine-tuned models: Wortsman et al. 2022, arXiv 2203.05482.
    """
    if not others:
        return patch
    sites = []
    for site in patch.sites:
        same = [site, *(other.site(site.name) for other in others if site.n_neurons)]
        rows = torch.stack([one.deltas.tensor().float() for one in same]).mean(0)
        loadings = [one.loadings.tensor() for one in same if one.loadings is not None]
        mean = torch.stack(loadings).mean(0) if loadings else None
        sites.append(replace(site, deltas=FrozenTensor.of(rows.to(site.deltas.dtype)), loadings=mean))
    method = {**patch.header()["method"], "averaged_with": [other.digest for other in others]}
    return patch.evolve(sites=tuple(sites), method=method)


def measure(loaded: LoadedModel, patch: Patch | None) -> EvalResult:
    """All reference suites on the test acts."""
    cases = load_suite("reference")
    return evaluate(
        loaded.model,
        loaded.tokenizer,
        cases,
        ReferenceJudge(),
        patch=patch,
        model_name=loaded.name,
        base_hash=loaded.hash,
        batch_size=128,
    )


def figures(result: EvalResult) -> dict[str, Any]:
    """The header's figures: rates with 95 % intervals, and the two jailbreak suites as one."""
    summary = result.summary()
    rows = {suite: {key: values[key] for key in ("asr", "n", "ci95")} for suite, values in summary["asr"].items()}
    both = jailbreak(result)
    rows["jailbreak"] = {"asr": both.value, "n": both.n, "ci95": list(both.ci95)}
    return {
        "judge": summary["judge"],
        "asr": rows,
        "over_refusal": summary["rates"]["over_refusal"],
        "utility": summary["rates"]["utility"],
    }


def jailbreak(result: EvalResult) -> Rate:
    """Attack success over the seen and the held-out wrappings together."""
    seen, held = (result.rate("asr", suite) for suite in JAILBREAKS)
    return Rate(seen.successes + held.successes, seen.n + held.n)


def line(result: EvalResult) -> str:
    """One line for the terminal."""
    rates = {"jailbreak": jailbreak(result)} | {suite: result.rate("asr", suite) for suite in (*JAILBREAKS, "plain")}
    rates |= {"over-refusal": result.rate("over_refusal"), "utility": result.rate("utility")}
    return ", ".join(f"{name} {rate}" for name, rate in rates.items())


def card(
    step: Step,
    patch: Patch,
    parent: Patch | None,
    result: EvalResult,
    base: EvalResult,
    report: Mapping[str, Any],
    seconds: float,
) -> str:
    """The patch's card: YAML front matter, then what changed, figures, how it was made, limits."""
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
        "parent": parent.digest if parent else "null",
        "created": f'"{patch.created}"',
    }
    rows = [("jailbreak prompts, all", jailbreak(base), jailbreak(result))]
    rows += [
        (f"{suite} prompts", base.rate("asr", suite), result.rate("asr", suite)) for suite in (*JAILBREAKS, "plain")
    ]
    rows += [(f"{word}", base.rate(key), result.rate(key)) for word, key in BENIGN]
    table = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in rows)
    lower = 1 - jailbreak(result).successes / max(jailbreak(base).successes, 1)
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in report["seconds"].items())
    ratio = LORA_PARAMETERS / patch.parameters
    return CARD.format(
        front="\n".join(f"{key}: {value}" for key, value in front.items()),
        title=f"{patch.name} {patch.version}",
        changed=step.changed,
        table=table,
        lower=f"{100 * lower:.1f} %",
        parameters=f"{patch.parameters:,}",
        ratio=f"{ratio:.1f}",
        lora=f"{LORA_PARAMETERS:,}",
        neurons=f"{patch.neurons:,}",
        clusters=patch.clusters,
        sites=sum(1 for site in patch.sites if site.n_neurons),
        harmful=patch.data["harmful"]["count"],
        benign=patch.data["benign"]["count"],
        seconds=f"{seconds:.0f}",
        stages=stages,
        recipe="\n".join(f"    {key}: {value}" for key, value in step.recipe.to_json().items()),
    )


CARD = """---
{front}
---

# {title}

A safety patch for the reference model of nest-runtime, made by Neuron Selective Tuning (NeST, arXiv 2602.16835).

{changed}

## Figures

Test acts, greedy, judged by the rules of the reference world; rates with 95 % Wilson intervals. The first four rows are
attack success rates. `jailbreak-held-out` prompts use wrappings that the base's own training never saw.

| | base | with this patch |
|---|---|---|
{table}

Jailbreak success is {lower} lower than the base's. {parameters} numbers are trained ({clusters} cluster rows over
{neurons} neurons at {sites} sites), {ratio} times fewer than LoRA of rank 8 on q_proj and v_proj ({lora}).

## How it was made

`python patches/make.py`, on {harmful} harmful and {benign} benign prompts of train acts, no jailbreak text among the
harmful ones; {seconds} s in all on the machine that made it ({stages}). Settings:

{recipe}

## Limits

- The reference model is 2 million parameters of a generated world: these figures say that the method and the code work,
  nothing about large models.
- The file lists the neurons it changes. Who holds the weights can undo the patch, or prune exactly those neurons.
- Tested against the wrappings of the reference world only; an adaptive attacker was not tried.
"""


if __name__ == "__main__":
    main()
