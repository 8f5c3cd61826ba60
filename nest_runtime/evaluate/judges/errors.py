"""How often the shipped judges were right on answers that people labelled; stats.corrected corrects rates by it.

benchmarks/judge/train.py measures and writes the counts: those of `local` into local.json, those of `phrases` into
phrases.json. Counts of other phrases than the shipped ones say nothing of these, and are not used.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from nest_runtime.evaluate.cases import digest_of
from nest_runtime.evaluate.judges import local
from nest_runtime.evaluate.stats import JudgeErrors
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, OVER_REFUSAL
from nest_runtime.prompts.refusals import refusal_phrases

PHRASES = "phrases"
# Of each measure, the labelled answers most like those of an evaluation.
ERRORS_FROM = {ATTACK_SUCCESS.key: "JAILJUDGE mini", OVER_REFUSAL.key: "XSTest completions"}


def measured_errors(judge: str, measure: str) -> JudgeErrors | None:
    """How often a judge was right about what a measure counts, on labelled answers that it was not made from.

    None for judges that were not measured, and for measures that are no matter of theirs (utility is a comparison).
    """
    if measure not in ERRORS_FROM or judge not in (local.NAME, PHRASES):
        return None
    outcome, source = MEASURES[measure].hit, ERRORS_FROM[measure]
    counts = (local.load_weights().about["errors"] if judge == local.NAME else phrase_errors()).get(outcome, {})
    return JudgeErrors(**counts[source], source=source) if source in counts else None


def phrases_digest() -> str:
    """``sha256:<hex>`` of the shipped refusal phrases."""
    return digest_of(list(refusal_phrases()))


@cache
def phrase_errors() -> dict[str, Any]:
    """The kept counts of refusal phrases, by outcome and source; nothing where the phrases are others by now."""
    kept = json.loads(files(__package__).joinpath("phrases.json").read_text(encoding="utf-8"))
    return kept["errors"] if kept["phrases"] == phrases_digest() else {}
