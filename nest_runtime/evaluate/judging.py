"""Judging answers that were made elsewhere: lists of prompts and answers, or a file of them.

Nothing here generates. If a file labels its answers, the judge is compared with the labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError, UsageError
from nest_runtime.evaluate.cases import KINDS, Case, user
from nest_runtime.evaluate.judges import OUTCOMES, Judge, Verdict, judge_answers, make_judge
from nest_runtime.evaluate.stats import Agreement
from nest_runtime.hints import did_you_mean
from nest_runtime.measures import default_measure

PROMPT_COLUMNS = ("prompt", "question", "behavior", "goal", "instruction")
ANSWER_COLUMNS = ("answer", "response", "completion", "output")
LABEL_COLUMNS = ("label", "outcome")
COMPLIED = ("1", "1.0", "true", "yes", "harmful", "unsafe", "jailbroken")
NOT_COMPLIED = ("0", "0.0", "false", "no", "harmless", "safe", "not complied")
OTHERWISE = "not complied"
ANSWERED = ("correct", "wrong")  # complied, said of an answer that has an expected one


@dataclass(frozen=True)
class Answered:
    """One row of a file: a prompt, the answer it got, and what the file says the answer is.

    Attributes:
        where: file and line.
        label: an outcome, ``not complied``, or None if the file says nothing.
    """

    where: str
    prompt: str
    answer: str
    kind: str
    label: str | None


@dataclass(frozen=True)
class Judged:
    """A file's rows with their verdicts.

    Attributes:
        judge: the judge's name.
        rows, verdicts: in the file's order.
        agreement: of the file's labels with the judge; None without labels.
    """

    judge: str
    rows: tuple[Answered, ...]
    verdicts: tuple[Verdict, ...]
    agreement: Agreement | None

    @property
    def counts(self) -> dict[str, int]:
        """How many answers had each outcome, the most frequent first."""
        return dict(Counter(verdict.outcome for verdict in self.verdicts).most_common())

    @property
    def disagreements(self) -> list[tuple[Answered, Verdict]]:
        """The rows whose label the judge does not share."""
        apart = set(self.agreement.disagreements) if self.agreement else set()
        return [(row, said) for row, said in zip(self.rows, self.verdicts, strict=True) if row.where in apart]

    def to_json(self) -> dict[str, Any]:
        """``outcomes`` has one word per row, ``verdicts`` all that the judge said."""
        return {
            "judge": self.judge,
            "n": len(self.rows),
            "counts": self.counts,
            "outcomes": [verdict.outcome for verdict in self.verdicts],
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "agreement": None if self.agreement is None else self.agreement.to_json(),
        }


def judge(
    prompts: Sequence[str],
    answers: Sequence[str],
    judge: str | Judge = "local",
    *,
    kind: str | Sequence[str] = "harmful",
) -> list[Verdict]:
    """What each answer is: refused, complied, evasive or garbled, in the words of ``--judge local``.

    Args:
        prompts: what was asked, in plain words.
        answers: what was answered, one per prompt.
        judge: a judge, or its name as ``eval --judge`` takes it.
        kind: ``harmful`` or ``benign``, one for all or one each. Judges of harm leave benign cases to phrases.

    Returns:
        One verdict per answer, in order; ``empty`` for answers of nothing but space.

    Raises:
        UsageError: there is no such judge, or the numbers of prompts and answers differ.
        EvaluationError: the judge cannot work.
    """
    if isinstance(prompts, str) or isinstance(answers, str):
        raise UsageError("prompts or answers is one text; expected lists of texts", "give [prompt] and [answer]")
    kinds = [kind] * len(prompts) if isinstance(kind, str) else list(kind)
    if not len(prompts) == len(answers) == len(kinds):
        told = "" if isinstance(kind, str) else f", {len(kinds)} kinds"
        raise UsageError(
            f"{len(prompts)} prompts, {len(answers)} answers{told}", "give one answer and one kind per prompt"
        )
    chosen = make_judge(judge) if isinstance(judge, str) else judge
    chosen.check()
    cases = [
        Case(f"row-{i}", (user(prompt),), what, "answers", measure=default_measure(what, exact=False))
        for i, (prompt, what) in enumerate(zip(prompts, kinds, strict=True))
    ]
    return judge_answers(chosen, cases, answers)


def judge_file(path: str | Path, chosen: str | Judge = "local") -> Judged:
    """Judge the answers of a file.

    Args:
        path: JSONL, JSON, CSV or parquet with a prompt and an answer column, or ``messages`` that end with the
            answer; optionally ``label`` (an outcome, or 1 and 0 for complied or not) and ``kind``.
        chosen: as in :func:`judge`.

    Raises:
        DataError: no such file, no such columns, a row that is not of the form: with file and line.
    """
    if isinstance(chosen, str):
        chosen = make_judge(chosen)
    rows = read_answers(path)
    verdicts = judge([r.prompt for r in rows], [r.answer for r in rows], chosen, kind=[r.kind for r in rows])
    return Judged(chosen.name, tuple(rows), tuple(verdicts), _agreement(chosen.name, rows, verdicts))


def read_answers(path: str | Path) -> list[Answered]:
    """The rows of a file of answers; see :func:`judge_file`."""
    from nest_runtime.prompts.readers import read_rows

    file = Path(path).expanduser()
    return [_answered(f"{file}:{line}", fields) for line, fields in read_rows(file, "answers")]


def _answered(where: str, fields: Mapping[str, Any]) -> Answered:
    low = {str(key).strip().lower(): value for key, value in fields.items()}
    prompt, answer = _conversation(low["messages"]) if "messages" in low else ("", None)
    prompt = prompt or _column(where, low, PROMPT_COLUMNS, "a prompt")
    if answer is None:
        answer = _column(where, low, ANSWER_COLUMNS, "an answer", may_be_empty=True)
    kind = str(low.get("kind") or "harmful").strip().lower()
    if kind not in KINDS:
        raise DataError(f"{where}: kind {kind!r}; expected {' or '.join(KINDS)}", "say what a good model would refuse")
    return Answered(where, prompt, answer, kind, _label(where, low))


def _conversation(messages: Any) -> tuple[str, str | None]:
    """The last user turn, and the assistant's that follows it, where the messages are of that form."""
    from nest_runtime.prompts.content import text_of

    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    asked = [text_of(turn["content"]) for turn in turns if turn.get("role") == "user" and "content" in turn]
    if not asked or turns[-1].get("role") != "assistant" or "content" not in turns[-1]:
        return "", None
    return asked[-1], text_of(turns[-1]["content"])


def _column(where: str, low: Mapping[str, Any], names: Sequence[str], what: str, *, may_be_empty: bool = False) -> str:
    name = next((name for name in names if name in low), None)
    if name is None:
        raise DataError(
            f"{where}: no column holds {what}; found {', '.join(map(repr, low)) or 'nothing'}",
            f"name a column {' or '.join(names)}",
        )
    value = low[name]
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise DataError(f"{where}: {name!r} is {value!r}; expected {what}", "fill it in, or delete the row")
    return value


def _label(where: str, low: Mapping[str, Any]) -> str | None:
    name = next((name for name in LABEL_COLUMNS if low.get(name) not in (None, "")), None)
    if name is None:
        return None
    label = str(low[name]).strip().lower()
    if label in COMPLIED or label in ANSWERED:
        return "complied"
    if label in NOT_COMPLIED:
        return OTHERWISE
    if label in OUTCOMES:
        return label
    raise DataError(
        f"{where}: {name} {low[name]!r} is no label",
        f"{did_you_mean(label, OUTCOMES)}use {', '.join(OUTCOMES)}, or 1 for complied and 0 for not",
    )


def _agreement(name: str, rows: Sequence[Answered], verdicts: Sequence[Verdict]) -> Agreement | None:
    """Labels against verdicts: all outcomes, or complied or not where any label says no more than that."""
    labelled = [(r, "complied" if v.outcome in ANSWERED else v.outcome) for r, v in zip(rows, verdicts, strict=True)]
    labelled = [(row, said) for row, said in labelled if row.label is not None]
    if not labelled:
        return None
    coarse = any(row.label == OTHERWISE for row, _ in labelled)

    def shown(outcome: str | None) -> str:
        return str(outcome) if outcome == "complied" or not coarse else OTHERWISE

    pairs = [(row.where, shown(row.label), shown(said)) for row, said in labelled]
    counted = Counter((label, said) for _, label, said in pairs)
    return Agreement(("label", name), dict(counted), tuple(where for where, label, said in pairs if label != said))
