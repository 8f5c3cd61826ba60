"""What a channel demands of the patches that it names: claims at least as strict as these, in the signed file.

A demand is a contract without figures. This module checks whether a patch carries claims that meet it. Whether the
claims hold is measured by the publisher (cli/commands/claim.py), and tried by servers before they switch
(serve/following/promises.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from nest_runtime.errors import ClaimsRefused
from nest_runtime.escape import short
from nest_runtime.measures import MEASURES
from nest_runtime.patch.claims import MAX_ROWS, Claims
from nest_runtime.trust.documents import Digest, Value

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,255}$"
Line = Annotated[str, Field(pattern=_LINE)]


class Demand(Value):
    """A limit on one suite, as in claims.Claim."""

    suite: Line
    cases: Digest
    measure: str
    limit: float = Field(ge=0, le=1)

    @field_validator("measure")
    @classmethod
    def _known(cls, measure: str) -> str:
        if measure not in MEASURES:
            raise ValueError(f"expected one of {', '.join(MEASURES)}")
        return measure


class Demands(Value):
    """What claims must be judged by, and promise at least. Rows stand in order of suite and measure, each once."""

    judge: Line
    judge_digest: Digest
    rows: tuple[Demand, ...] = Field(min_length=1, max_length=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> Demands:
        keys = [(row.suite, row.measure) for row in self.rows]
        if keys != sorted(set(keys)):
            raise ValueError("rows must be sorted by suite and measure, each once")
        return self


def demands_of(claims: Claims) -> Demands:
    """A demand for claims at least as strict as these."""
    rows = tuple(Demand(suite=row.suite, cases=row.cases, measure=row.measure, limit=row.limit) for row in claims.rows)
    return Demands(judge=claims.judge, judge_digest=claims.judge_digest, rows=rows)


def check_met(patch: Patch, demands: Demands, where: str) -> None:
    """Whether a patch carries claims that meet a demand; nothing is measured.

    Args:
        patch: the patch.
        demands: what is demanded.
        where: who demands it, for messages: ``channel stable``.

    Raises:
        ClaimsRefused: the message names what is missing first.
    """
    label = patch.label
    claims = patch.claims
    if claims is None:
        raise ClaimsRefused(
            f"{where} demands claims; {label} carries none",
            "make them with `nest-runtime claim`, and sign the file that it writes",
        )
    if (claims.judge, claims.judge_digest) != (demands.judge, demands.judge_digest):
        raise ClaimsRefused(
            f"{where} demands claims judged by {demands.judge} ({short(demands.judge_digest)}); those of {label} "
            f"are judged by {claims.judge} ({short(claims.judge_digest)})",
            "make the claims with that judge, by the same rules",
        )
    rows = {(row.cases, row.measure): row for row in claims.rows}
    for demand in demands.rows:
        found = rows.get((demand.cases, demand.measure))
        bound = MEASURES[demand.measure].bound(demand.limit)
        what = f"{demand.measure} on {demand.suite} ({short(demand.cases)}) of {bound}"
        if found is None or not found.as_strict_as(demand.limit):
            claimed = f"{label} claims {found.bound}" if found is not None else f"{label} claims nothing of it"
            raise ClaimsRefused(f"{where} demands {what}; {claimed}", "claim at least what is demanded")
