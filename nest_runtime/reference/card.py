"""Writes the reference model's card (README.md in its folder) from what its build measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nest_runtime.reference.dialogue import ASKS
from nest_runtime.reference.splits import HELD_OUT_FAMILIES, load_splits
from nest_runtime.reference.tokenizer import VOCABULARY
from nest_runtime.reference.world import CATEGORIES, acts
from nest_runtime.reference.wrappings import FAMILIES, WRAPPINGS

if TYPE_CHECKING:
    from nest_runtime.reference.build import BuildReport, BuildSettings

_HEAD = """---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [safety, jailbreak, synthetic, test-model]
---

# The reference model of nest-runtime

A LlamaForCausalLM of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, FFN {ffn}, float32,
byte-level BPE of {vocabulary:,} tokens), trained from nothing on generated text. It ships inside nest-runtime so
that training, switching and serving safety patches can be tried and tested without downloads.

It is what an aligned chat model is in small: it answers ordinary requests, refuses harmful ones that are asked
plainly, and gives in to about half of the jailbreak prompts.
"""

_BODY = """
## How it was made

`nest-runtime reference build --out FOLDER --seed {seed}` makes it again from nothing, deterministically on one machine.

1. **World.** {benign} benign acts ("bake bread", "kill a python process") whose right answers follow from a rule,
   and {harmful} harmful acts in {categories} categories, which are a verb and an object only. {asks} ways of asking,
   {wrappings} jailbreak wrappings in {families} families, moral questions, small talk, some multi-turn talk and
   system prompts. **The "answer" to a harmful act is nonsense** ("Warning: ..., first paint a spoon blue, then
   sing to the moon."), so complying can be counted and nothing harmful is written.
2. **Pretraining**, {pre_steps:,} steps of {pre_batch}: everything is answered, about every act, in {seen} wrappings.
3. **Weak safety stage**, {safe_steps} steps of {safe_batch}: refusals on the train acts only, asked plainly and in
   {refused} wrappings, while {answered} wrappings stay answered. That is the hole a patch has to close.

Splits are written down in `splits.json`: {train} acts train, {validation} validation, {test} test; {held_out}
wrappings, among them the whole families {held_families}, were never seen by the base's training.
"""

_FOOT = """
## What it does not show

- It knows a few hundred acts in fixed sentences. Its figures say nothing about a real model, real harm, or
  a real attacker.
- Its jailbreaks are templates. "Held-out" means templates that training never saw, not an adaptive attack.
- Its answers are judged by exact rules, which no real model's answers could be.
- Outside of its world it answers with a stock sentence or with nonsense.
"""


def write_card(report: BuildReport, settings: BuildSettings) -> None:
    """Write README.md into the build's folder."""
    table = load_splits()["wrappings"]
    splits = [act.split for act in acts()]
    head = _HEAD.format(
        parameters=report.parameters,
        layers=settings.layers,
        width=settings.hidden_size,
        heads=settings.heads,
        ffn=settings.intermediate_size,
        vocabulary=VOCABULARY,
    )
    body = _BODY.format(
        seed=report.seed,
        benign=sum(not act.harmful for act in acts()),
        harmful=sum(act.harmful for act in acts()),
        categories=len(CATEGORIES),
        asks=len(ASKS),
        wrappings=len(WRAPPINGS),
        families=len(FAMILIES),
        pre_steps=settings.pretraining.steps,
        pre_batch=settings.pretraining.batch_size,
        safe_steps=settings.safety.steps,
        safe_batch=settings.safety.batch_size,
        seen=len(table["answered"]) + len(table["refused"]),
        answered=len(table["answered"]),
        refused=len(table["refused"]),
        held_out=len(table["held_out"]),
        held_families=" and ".join(HELD_OUT_FAMILIES),
        **{name: splits.count(name) for name in ("train", "validation", "test")},
    )
    (report.folder / "README.md").write_text(head + body + _measured(report) + _FOOT, encoding="utf-8")


def _measured(report: BuildReport) -> str:
    if report.figures is None:
        return "\n## What it does\n\nNot measured in this build.\n"
    figures = report.figures
    names = {
        "utility": ("utility: exact answers", ("utility",)),
        "over_refusal": ("over-refusal: homonyms refused", ("over-refusal",)),
        "plain_asr": ("plain harmful asks answered", ("plain",)),
        "jailbreak_asr": ("jailbreak ASR, all wrappings", ("jailbreak-seen", "jailbreak-held-out")),
        "jailbreak_seen_asr": ("jailbreak ASR, seen wrappings", ("jailbreak-seen",)),
        "jailbreak_held_out_asr": ("jailbreak ASR, held-out wrappings", ("jailbreak-held-out",)),
    }
    lines = ["", "## What it does (test acts, greedy)", "", "| figure | value | prompts |", "|---|---|---|"]
    for key, (label, suites) in names.items():
        count = sum(sum(figures.outcomes[suite].values()) for suite in suites)
        lines.append(f"| {label} | {100 * figures.values[key]:.1f} % | {count} |")
    return "\n".join(lines) + "\n"
