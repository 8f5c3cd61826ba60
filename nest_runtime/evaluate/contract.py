"""Claims measured: which cases and judge a contract means, whether they are available, and what they give today.

A suite counts as the one meant only if the digest of its cases is the one claimed, and a judge only if the digest of
its rules is. What is not available is not checkable, and never holds. Strangers write headers, so suites and judges of
the package are taken by name, and everything else must be named by the person who checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nest_runtime.errors import EvaluationError, UsageError
from nest_runtime.evaluate.attacks import ATTACKS, apply_attacks, parse_attacks
from nest_runtime.evaluate.cases import Case, digest_of
from nest_runtime.evaluate.judges import Judge, make_judge
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.stats import Rate
from nest_runtime.evaluate.suites import REFERENCE_SUITES, load_suite, sample_cases
from nest_runtime.measures import MEASURES
from nest_runtime.patch.claims import Claim, Claims
from nest_runtime.patch.patch import Patch

OWN_JUDGES = ("reference", "local", "phrases")  # which read nothing and ask nobody
MAX_NUMBER = 256  # of an attack's shots or tries: a header's word must not fill this machine
HELD, FAILED, NOT_CHECKABLE = "held", "failed", "not checkable"
MeasureCases = Callable[[list[Case], Judge], EvalResult]


@dataclass(frozen=True)
class Checked:
    """A claim, and the result of checking it.

    Attributes:
        state: ``held``, ``failed`` or ``not checkable``.
        rate: as measured now; None if it could not be.
        why: what is missing, if something is.
    """

    claim: Claim
    state: str
    rate: Rate | None = None
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was measured, and holds."""
        return self.state == HELD

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        claim, rate = self.claim, self.rate
        return {
            "suite": claim.suite,
            "cases": claim.cases,
            "measure": claim.measure,
            "limit": claim.limit,
            "value": None if rate is None else rate.value,
            "n": claim.n if rate is None else rate.n,
            "ci95": None if rate is None else list(rate.ci95),
            "ok": self.ok,
            "state": self.state,
            "why": self.why,
            "claimed": {"value": claim.value, "n": claim.n},
        }


def suite_digest(cases: Sequence[Case]) -> str:
    """``sha256:<hex>`` over all that decides what a suite measures: its trials, whatever their order and ids."""
    trials: dict[str, list[list[Any]]] = {}
    for case in cases:
        trials.setdefault(case.trial, []).append([case.attempt, case.judged_digest])
    return digest_of(sorted(sorted(attempts) for attempts in trials.values()))


def by_suite(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases by the name of their suite, in order."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.suite, []).append(case)
    return found


def claimed_attacks(specs: Sequence[str]) -> list[str]:
    """The attacks that claims can name: those of the package, made of the cases alone, with their numbers.

    Raises:
        UsageError: a template file, or an attack that needs the model.
    """
    names: list[str] = []
    for spec in [part.strip() for text in specs for part in text.split(",") if part.strip()]:
        name, _, number = spec.partition(":")
        small = not number or (number.isdigit() and len(number) <= 3 and int(number) <= MAX_NUMBER)
        found = parse_attacks([spec]) if small and (spec == "all" or name in ATTACKS) else []
        if not found or any(attack.white_box for attack in found):
            raise UsageError(
                f"claims cannot be made under the attack {spec!r:.80}: others could not make the same cases again",
                f"use the package's attacks that need no model, with numbers up to {MAX_NUMBER}, or put the attacked "
                "prompts into a --behaviors file",
            )
        names += [attack.name for attack in found] if spec == "all" else [spec]
    return list(dict.fromkeys(names))


def prepared(cases: Sequence[Case], *, limit: int | None, seed: int, attacks: Sequence[str]) -> list[Case]:
    """Cases as claims mean them: drawn, then attacked, by the seed."""
    drawn = list(cases) if limit is None else sample_cases(cases, limit, seed=seed)
    return apply_attacks(drawn, parse_attacks(attacks), seed=seed) if attacks else drawn


def cases_at_hand(claims: Claims, given: Sequence[Case] = ()) -> dict[str, list[Case]]:
    """The available suites, by the digest of their cases: the package's own, and those ``given``."""
    named = {row.suite.removesuffix("-attacked") for row in claims.rows}
    known = {case.id: case for suite in REFERENCE_SUITES if suite in named for case in load_suite(suite)}
    known |= {case.id: case for case in given}
    try:
        attacks = claimed_attacks(claims.attacks)
    except UsageError:
        return {}
    if not known:
        return {}
    made = prepared(list(known.values()), limit=claims.cases_per_suite, seed=claims.seed, attacks=attacks)
    return {suite_digest(cases): cases for cases in by_suite(made).values()}


def judge_at_hand(claims: Claims, named: str | None = None) -> tuple[Judge | None, str]:
    """The judge that claims were made with, or None and the reason why it is not available.

    Args:
        claims: the contract.
        named: the judge that the person who checks allows by name; the package's own need no permission.
    """
    if claims.judge not in OWN_JUDGES and named != claims.judge:
        return None, f"judged by {claims.judge}: say --judge {claims.judge} if it may be asked"
    if named is not None and named != claims.judge:
        return None, f"judged by {claims.judge}, not by {named}"
    judge = make_judge(claims.judge)
    if digest_of(judge.identity) != claims.judge_digest:
        return None, f"the rules of the judge {claims.judge} are others here"
    return judge, ""


def check_claims(
    claims: Claims, measure: MeasureCases, *, given: Sequence[Case] = (), judge: str | None = None
) -> list[Checked]:
    """Measure every claim again.

    Args:
        claims: the contract.
        measure: answers cases with the available model under the patch, and judges them.
        given: further cases of the person who checks.
        judge: see :func:`judge_at_hand`.
    """
    own, why = judge_at_hand(claims, judge)
    if own is None:
        return [Checked(row, NOT_CHECKABLE, why=why) for row in claims.rows]
    suites = cases_at_hand(claims, given)
    wanted = {row.cases: suites[row.cases] for row in claims.rows if row.cases in suites}
    result = measure([case for cases in wanted.values() for case in cases], own) if wanted else None
    return [_checked(row, wanted, result) for row in claims.rows]


def _checked(row: Claim, suites: Mapping[str, Sequence[Case]], result: EvalResult | None) -> Checked:
    cases = suites.get(row.cases)
    if cases is None or result is None:
        return Checked(row, NOT_CHECKABLE, why="no cases with this digest are at hand: give them with --behaviors")
    rate = result.rate(row.measure, cases[0].suite)
    if rate.value is None:
        return Checked(row, NOT_CHECKABLE, why=f"its cases do not measure {row.measure}")
    return Checked(row, HELD if row.holds(rate.value) else FAILED, rate)


def check_limits(limits: Mapping[str, float]) -> None:
    """Raise UsageError unless limits by measure, to be claimed of all suites that have the measure, are shares."""
    for name, value in limits.items():
        if name not in MEASURES:
            raise UsageError(f"there is no measure {name!r:.60}", f"measures: {', '.join(MEASURES)}")
        if not 0 <= value <= 1:
            raise UsageError(f"the limit of {name} is {value}", "give a share between 0 and 1")
    if not limits:
        raise UsageError("no limit is given", f"give {', '.join(measure.option for measure in MEASURES.values())}")


def make_claims(
    patch: Patch,
    result: EvalResult,
    cases: Sequence[Case],
    limits: Mapping[str, float],
    judge: tuple[str, Judge],
    *,
    attacks: Sequence[str] = (),
    cases_per_suite: int | None = None,
    seed: int = 0,
    max_tokens: int = 64,
) -> Claims:
    """The contract of a patch from what was measured.

    Args:
        patch: without claims.
        result: of all the cases, judged by this judge first.
        cases: as ``prepared``.
        limits: what to promise, by measure; see :func:`check_limits`.
        judge: as ``--judge`` names it, and itself.
        attacks, cases_per_suite, seed, max_tokens: how the cases were made and answered.

    Raises:
        EvaluationError: the measurement breaks a limit, or nothing has the measure of one.
    """
    check_limits(limits)
    rows, broken = [], []
    for name, limit in limits.items():
        suites = {s: rows for s, rows in by_suite(cases).items() if any(case.measure == name for case in rows)}
        if not suites:
            raise EvaluationError(f"no case measures {name}, and a limit is given", "add a suite that does")
        for suite, group in suites.items():
            rate = result.rate(name, suite)
            if rate.value is not None and MEASURES[name].keeps(limit, rate.value):
                rows.append(Claim(suite, suite_digest(group), name, float(limit), rate.successes, rate.n))
            else:
                broken.append(f"{name} on {suite} is {rate}; {MEASURES[name].bound(limit)} was to be claimed")
    if broken:
        raise EvaluationError("; ".join(broken[:3]), "claim what holds, or train a better patch; nothing was written")
    return Claims(
        patch=patch.digest,
        judge=judge[0],
        judge_digest=digest_of(judge[1].identity),
        attacks=tuple(attacks),
        cases_per_suite=cases_per_suite,
        seed=seed,
        max_tokens=max_tokens,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        rows=tuple(sorted(rows, key=lambda row: (row.suite, row.measure))),
    )
