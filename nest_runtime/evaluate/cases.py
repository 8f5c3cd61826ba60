"""A case: one conversation to answer, and what its answer counts towards.

Nothing here reads files (suites.py), rewrites prompts (attacks/) or runs a model (run.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nest_runtime.errors import EvaluationError
from nest_runtime.io import canonical_json
from nest_runtime.measures import MEASURES, default_measure, measures_of
from nest_runtime.prompts.content import plain_content, text_of

Message = dict[str, Any]

KINDS = ("harmful", "benign")


@dataclass(frozen=True)
class Case:
    """One conversation to answer.

    Attributes:
        id: unique within an evaluation.
        messages: ``{"role", "content"}`` dicts; content is a text, or parts with images (prompts/images.py). They end
            with the user's turn, or with an assistant message that the model must continue from (a prefilled answer).
        kind: ``harmful`` or ``benign``: whether a good model refuses.
        suite: the suite whose rate the case counts in.
        family, category, attack: for the breakdowns: the attack's family, the behavior's category, the attack's name.
        expected: the exact answer, if there is one.
        behavior: what is asked for, in plain words, for judges; the last user turn where it is not given.
        measure: the key of one of measures.MEASURES. By default ``asr`` for harmful cases, ``utility`` for benign
            ones with an expected answer, ``over_refusal`` for the other benign ones.
        trial: cases of one trial are attempts at the same goal; the trial succeeds if any of them does.
            The case's own id by default.
        attempt: its place in the trial; later attempts run only while no earlier one has succeeded.
        follow_ups: user turns to continue with, each after the model's own answer; the last answer is judged.
        meta: further fields, JSON values.
    """

    id: str
    messages: tuple[Message, ...]
    kind: str
    suite: str
    family: str = "direct"
    category: str = ""
    attack: str = "direct"
    expected: str | None = None
    behavior: str = ""
    measure: str = ""
    trial: str = ""
    attempt: int = 0
    follow_ups: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(dict(message) for message in self.messages))
        object.__setattr__(self, "follow_ups", tuple(self.follow_ups))
        if self.kind not in KINDS:
            raise EvaluationError(f"case {self.id} has kind {self.kind!r}", f"use {' or '.join(KINDS)}")
        if not self.messages or not any(message["role"] == "user" for message in self.messages):
            raise EvaluationError(f"case {self.id} has no user message", "give at least one user turn")
        object.__setattr__(self, "behavior", self.behavior or self.prompt)
        object.__setattr__(self, "trial", self.trial or self.id)
        chosen = self.measure or default_measure(self.kind, exact=self.expected is not None)
        object.__setattr__(self, "measure", chosen)
        measure = MEASURES.get(str(chosen))
        if measure is None or measure.kind != self.kind:
            known = (f"{kind} cases measure {' or '.join(m.key for m in measures_of(kind))}" for kind in KINDS)
            raise EvaluationError(f"case {self.id} is {self.kind} and measures {chosen!r}", "; ".join(known))
        if measure.exact and self.expected is None:
            other = default_measure(self.kind, exact=False)
            raise EvaluationError(
                f"case {self.id} measures {chosen} without an expected answer", f"give one, or measure {other}"
            )

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return next(text_of(message["content"]) for message in reversed(self.messages) if message["role"] == "user")

    @property
    def prefill(self) -> str:
        """The beginning of the answer that the case prescribes, or nothing."""
        last = self.messages[-1]
        return text_of(last["content"]) if last["role"] == "assistant" else ""

    @property
    def content_digest(self) -> str:
        """``sha256:<hex>`` over everything that decides the answer: messages and follow-ups."""
        return digest_of([plain_content(self.messages), list(self.follow_ups)])

    @property
    def judged_digest(self) -> str:
        """``sha256:<hex>`` over all that a judge may read besides the answer: messages, behavior, kind and so on."""
        seen = [self.kind, self.measure, self.behavior, self.expected, dict(self.meta)]
        return digest_of([self.content_digest, *seen])


def digest_of(value: Any) -> str:
    """``sha256:<hex>`` of a JSON value: sorted keys, no spaces, UTF-8."""
    data = canonical_json(value, errors="surrogatepass", allow_nan=True, default=str)
    return "sha256:" + hashlib.sha256(data).hexdigest()


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


def check_cases(cases: Sequence[Case]) -> None:
    """Raise EvaluationError if there are no cases, or an id appears twice."""
    if not cases:
        raise EvaluationError("there are no cases to evaluate", "give a suite or a behaviors file that holds some")
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise EvaluationError(f"the case id {case.id!r} appears twice", "give every case its own id")
        seen.add(case.id)
