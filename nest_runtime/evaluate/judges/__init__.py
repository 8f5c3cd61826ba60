"""Judges: what an answer was, in one word.

A judge gives a :class:`Verdict` for a case and an answer. :func:`make_judge` makes one from the text
that the command line takes. Nothing here generates answers or counts them.
"""

from __future__ import annotations

from nest_runtime.evaluate.judges.base import OUTCOMES, Judge, Verdict, judge_answers
from nest_runtime.evaluate.judges.local import LocalJudge
from nest_runtime.evaluate.judges.make import JUDGE_FORMS, make_judge
from nest_runtime.evaluate.judges.phrases import PhraseJudge
from nest_runtime.evaluate.judges.reference import ReferenceJudge
from nest_runtime.prompts.refusals import is_refusal

__all__ = [
    "JUDGE_FORMS",
    "OUTCOMES",
    "Judge",
    "LocalJudge",
    "PhraseJudge",
    "ReferenceJudge",
    "Verdict",
    "is_refusal",
    "judge_answers",
    "make_judge",
]
