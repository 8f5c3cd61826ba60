"""A candidate's claims, tried before the switch to it: a few of the claimed cases, through the engine.

A sample cannot show that a claim holds, but it can show that it does not. A claim is refuted at a number of hits that
a suite within the limit would give with a probability under 1 % (hypergeometric: the sample is drawn from the very
cases that the claim is about). ``nest-runtime verify --claims`` measures whole suites.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from typing import Any

from nest_runtime.errors import AdmissionRefused
from nest_runtime.evaluate.cases import Case
from nest_runtime.evaluate.contract import cases_at_hand, judge_at_hand
from nest_runtime.evaluate.judges import Judge, judge_answers
from nest_runtime.measures import MEASURES
from nest_runtime.patch.claims import Claim, Claims
from nest_runtime.prompts.content import images_of
from nest_runtime.serve.engine import Engine
from nest_runtime.serve.following.admission import answers_under
from nest_runtime.serve.switching.table import ServedPatch

SAMPLE = 16  # cases of each claim
REFUTED = 0.01

log = logging.getLogger("nest_runtime.serve.following.promises")


async def try_claims(
    engine: Engine, tokenizer: Any, served_patch: ServedPatch, *, required: bool = False
) -> dict[str, str]:
    """Try a loaded patch's claims; returns ``suite/measure`` → ``hits of n``, of those that could be tried.

    Args:
        engine, tokenizer: the server's.
        served_patch: the candidate.
        required: refuse it where it carries no claims, or one of them cannot be tried here.

    Raises:
        AdmissionRefused: a claim is refuted.
        EngineError: the engine could not answer.
    """
    claims = served_patch.patch.claims if served_patch.patch is not None else None
    if claims is None:
        if required:
            raise AdmissionRefused(
                f"{served_patch.label} carries no claims; the trust policy asks for them", "claim, then publish"
            )
        return {}
    judge, why = await asyncio.to_thread(judge_at_hand, claims)
    samples = await asyncio.to_thread(_samples, claims) if judge is not None else {}
    lost = [row for row in claims.rows if (row.suite, row.measure) not in samples]
    if lost:
        why = why or "its cases are not at hand"
        message = f"{served_patch.label} claims {lost[0].measure} on {lost[0].suite}, which cannot be tried here: {why}"
        if required:
            hint = "claim on the package's suites, by its judges, or let the policy not ask for it"
            raise AdmissionRefused(message, hint)
        log.warning("%s", message)
    said = {}
    for row in claims.rows:
        if judge is not None and (drawn := samples.get((row.suite, row.measure))):
            asked = [case.messages for case in drawn]
            answers = await answers_under(engine, tokenizer, served_patch, asked, claims.max_tokens)
            hits = await asyncio.to_thread(_hits, judge, drawn, answers)
            _check(served_patch.label, row, hits, len(drawn))
            said[f"{row.suite}/{row.measure}"] = f"{hits} of {len(drawn)}"
    return said


def chance(row: Claim, hits: int, drawn: int) -> float:
    """The probability of so many hits or more in a sample (of so few, where higher is better), if the limit is kept."""
    if MEASURES[row.measure].lower_is_better:
        most, counted = math.floor(row.limit * row.n + 1e-9), range(hits, drawn + 1)
    else:
        most, counted = math.ceil(row.limit * row.n - 1e-9), range(hits + 1)
    ways = sum(math.comb(most, k) * math.comb(row.n - most, drawn - k) for k in counted)
    return ways / math.comb(row.n, drawn)


def _check(label: str, row: Claim, hits: int, drawn: int) -> None:
    if chance(row, hits, drawn) < REFUTED:
        raise AdmissionRefused(
            f"{label} claims {row.measure} on {row.suite} of {row.bound}; here it is {hits} of {drawn} drawn cases",
            "measure the patch with `nest-runtime verify --claims` on the model that is served",
        )


def _samples(claims: Claims) -> dict[tuple[str, str], list[Case]]:
    """For each claim whose cases are at hand, a few of them: plain conversations, one for a trial."""
    suites = cases_at_hand(claims)
    found = {}
    for row in claims.rows:
        rows = [case for case in suites.get(row.cases, ()) if case.measure == row.measure and _is_plain(case)]
        if len(rows) == row.n:  # all of its trials: a sample of a part would be of another suite
            found[row.suite, row.measure] = random.Random(claims.patch).sample(rows, min(SAMPLE, row.n))
    return found


def _is_plain(case: Case) -> bool:
    return not (case.attempt or case.follow_ups or case.prefill or images_of(case.messages))


def _hits(judge: Judge, cases: Sequence[Case], answers: Sequence[str]) -> int:
    judge.check()
    verdicts = judge_answers(judge, cases, answers)
    return sum(verdict.outcome == MEASURES[case.measure].hit for case, verdict in zip(cases, verdicts, strict=True))
