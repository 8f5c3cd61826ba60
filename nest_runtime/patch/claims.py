"""The claims of a patch: what its publisher promises about it, in a form that anyone can measure again.

Claims are in the patch's header: suites by the digest of their cases, the judge by the digest of its rules, a limit
for each rate, and what was measured when the claims were made. evaluate/contract.py measures whether they hold.
Signatures say whether to believe the publisher (trust/).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, Self

from nest_runtime.errors import PatchFormatError
from nest_runtime.measures import MEASURES
from nest_runtime.patch.values import MAX_INT

MAX_ROWS = 256
MAX_ATTACKS = 64
MAX_TOKENS = 1 << 16

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,255}")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|\+00:00)")
_HINT = "write claims with `nest-runtime claim`"


@dataclass(frozen=True)
class Claim:
    """One promise: a rate on one suite, and its limit.

    Attributes:
        suite: the suite's name, e.g. ``plain`` or ``plain-attacked``.
        cases: digest of all its cases (evaluate/contract.py).
        measure: the key of one of measures.MEASURES.
        limit: a share: at most where lower is better, at least where higher is.
        hits, n: what was measured: how many trials counted, of how many.
    """

    suite: str
    cases: str
    measure: str
    limit: float
    hits: int
    n: int

    def __post_init__(self) -> None:
        _line(self.suite, "suite")
        _digest(self.cases, "cases")
        if self.measure not in tuple(MEASURES):  # it may be any JSON value
            _refuse(f"measure is {self.measure!r:.60}; expected one of {', '.join(MEASURES)}")
        if type(self.limit) is not float or not 0 <= self.limit <= 1 or math.copysign(1, self.limit) < 0:
            _refuse(f"limit is {self.limit!r:.60}; expected a share from 0.0 to 1.0")
        _whole(self.n, "n", 1)
        _whole(self.hits, "hits", 0, self.n)
        if not self.holds(self.value):
            _refuse(f"{self.suite}: {self.measure} was {self.value:.4f}, which is not {self.bound}")

    @property
    def value(self) -> float:
        """The rate that was measured."""
        return self.hits / self.n

    @property
    def bound(self) -> str:
        """The limit for people: ``at most 0.05``."""
        return MEASURES[self.measure].bound(self.limit)

    def holds(self, value: float) -> bool:
        """Whether a rate keeps the limit; a rate equal to the limit does."""
        return MEASURES[self.measure].keeps(self.limit, value)

    def as_strict_as(self, limit: float) -> bool:
        """Whether keeping this claim implies keeping a limit."""
        return MEASURES[self.measure].keeps(limit, self.limit)


@dataclass(frozen=True)
class Claims:
    """A patch's contract.

    Attributes:
        patch: digest of the patch without its claims: they are about this content and no other.
        judge, judge_digest: its name as ``--judge`` takes it, and the digest of its rules.
        attacks: of the harmful cases, by name; none leaves the suites as they are.
        cases_per_suite: at most so many cases of each suite, drawn by the seed; None for all.
        seed: of that, and of the attacks.
        max_tokens: the longest answer.
        date: when it was measured, ISO 8601 in UTC.
        rows: the promises, in order of suite and measure, each once.
    """

    patch: str
    judge: str
    judge_digest: str
    max_tokens: int
    date: str
    rows: tuple[Claim, ...]
    attacks: tuple[str, ...] = ()
    cases_per_suite: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "attacks", tuple(self.attacks))
        _digest(self.patch, "patch")
        _line(self.judge, "judge")
        _digest(self.judge_digest, "judge_digest")
        for attack in self.attacks:
            _line(attack, "attacks")
        if len(self.attacks) > MAX_ATTACKS or len(set(self.attacks)) != len(self.attacks):
            _refuse(f"attacks are {len(self.attacks)}; expected at most {MAX_ATTACKS}, each once")
        if self.cases_per_suite is not None:
            _whole(self.cases_per_suite, "cases_per_suite", 1)
        _whole(self.seed, "seed", 0)
        _whole(self.max_tokens, "max_tokens", 1, MAX_TOKENS)
        if not isinstance(self.date, str) or not _DATE.fullmatch(self.date):
            _refuse(f"date is {self.date!r:.60}; expected ISO 8601 in UTC, e.g. 2026-02-18T12:00:00Z")
        keys = [(row.suite, row.measure) for row in self.rows]
        if not 1 <= len(keys) <= MAX_ROWS or sorted(set(keys)) != keys:
            _refuse(f"{len(keys)} rows; expected 1 to {MAX_ROWS}, in order of suite and measure, each once")
        digests = {(row.suite, row.cases) for row in self.rows}
        if len(digests) != len({row.suite for row in self.rows}):
            _refuse("a suite has two digests; expected one for all its rows")

    @classmethod
    def parse(cls, value: Any) -> Self:
        """The claims in a header's JSON value. Raises PatchFormatError naming the first field that is wrong."""
        known = _object(value, cls, "claims")
        rows, attacks = known.pop("rows"), known.pop("attacks")
        if not isinstance(rows, list | tuple) or not isinstance(attacks, list | tuple):
            _refuse("rows and attacks are not both lists")
        return cls(**known, attacks=tuple(attacks), rows=tuple(Claim(**_object(row, Claim, "a row")) for row in rows))

    def to_json(self) -> dict[str, Any]:
        """The claims as JSON values, as they are in the header."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "attacks": list(self.attacks), "rows": [asdict(row) for row in self.rows]}


def _object(value: Any, kind: type, where: str) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if not isinstance(value, Mapping):
        _refuse(f"{where} is a {type(value).__name__}; expected an object")
    if set(value) != names:
        odd = sorted(map(str, set(value) ^ names))[0]
        _refuse(f"{where} {'lacks the' if odd in names else 'has an unknown'} field {odd!r:.60}")
    return dict(value)


def _line(value: Any, name: str) -> None:
    if not isinstance(value, str) or not _LINE.fullmatch(value):
        _refuse(f"{name} is {value!r:.80}; expected one line of 1 to 255 characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(f"{name} is no Unicode text")


def _digest(value: Any, name: str) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        _refuse(f"{name} is {value!r:.80}; expected sha256:<64 hex digits>")


def _whole(value: Any, name: str, least: int, most: int = MAX_INT) -> None:
    if type(value) is not int or not least <= value <= most:
        _refuse(f"{name} is {value!r:.60}; expected a whole number from {least} to {most}")


def _refuse(message: str) -> NoReturn:
    raise PatchFormatError(f"claims: {message}", _HINT)
