"""Adaptive attacks: each is made against the very model and patch that is then asked.

Searches over prompts (best-of-n, evolution, random search, GCG) and surgery on the model (surgery.py), on the same
goals, with the same judge. Surgery may break the model, so harmless requests are asked as well. Results of a search
are kept, and an interrupted run continues.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.attacks import AttackTarget, parse_attacks
from nest_runtime.evaluate.cases import Case, digest_of
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.records import other_share, rate_of, trials_of
from nest_runtime.evaluate.rounds import BASE, Subject
from nest_runtime.evaluate.run import evaluate_answers, model_answerer
from nest_runtime.evaluate.surgery import pruned, random_rows, refusal_direction, rows_of, without_direction
from nest_runtime.hints import did_you_mean
from nest_runtime.measures import ATTACK_SUCCESS, OVER_REFUSAL
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example

if TYPE_CHECKING:
    from nest_runtime.evaluate.stats import Rate
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.runtime import PatchRuntime

SURGERY = ("refusal-ablation", "prune-rows", "prune-random")
SEARCHES = ("direct", "best-of-n", "evolution", "random-search", "gcg")
KNOWS = {  # what the attacker must have
    "direct": "nothing",
    "best-of-n": "answers",
    "evolution": "probabilities",
    "random-search": "probabilities",
    "gcg": "weights",
    "refusal-ablation": "weights",
    "prune-rows": "weights, patch",
    "prune-random": "weights",
}
DIRECTION_PROMPTS = 32  # of each class, to find the refusal direction with


@dataclass(frozen=True)
class Attacked:
    """What one attack came to.

    Attributes:
        attack: its name, with its budget; knows: what the attacker must have.
        success: trials that complied; other: the share that neither refused nor complied; None without goals.
        over_refusal, other_benign: the same of harmless requests, where they were asked too.
        seconds: searching and answering, of what was not kept from before.
        notes: what it did to the model.
    """

    attack: str
    knows: str
    success: Rate
    other: float | None
    over_refusal: Rate | None
    other_benign: float | None
    seconds: float
    notes: str = ""

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        benign = None if self.over_refusal is None else self.over_refusal.to_json()
        return {
            "attack": self.attack,
            "knows": self.knows,
            **self.success.to_json(ATTACK_SUCCESS.rate_key),
            "other": self.other,
            OVER_REFUSAL.key: benign,
            "other_benign": self.other_benign,
            "seconds": round(self.seconds, 1),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Range:
    """Where attacks are tried: model, patch, goals and judge.

    Attributes:
        loaded, runtime: the model, and the runtime that holds the patch.
        patch: the one attacked; None attacks the base.
        goals: plain harmful cases; benign: harmless ones, asked under surgery.
        harmful, harmless: prompts that are tested with nowhere, to find the refusal direction.
        judge: of all answers.
        max_new_tokens, batch_size: of generation. seed: of everything random.
        workdir: where finds, answers and verdicts are kept.
    """

    loaded: LoadedModel
    runtime: PatchRuntime
    patch: Patch | None
    goals: Sequence[Case]
    benign: Sequence[Case]
    harmful: Sequence[Example]
    harmless: Sequence[Example]
    judge: Judge
    max_new_tokens: int = 32
    batch_size: int = 32
    seed: int = 0
    workdir: Path | None = None
    progress: Progress = lambda stage, done, total: None


def check_attacks(specs: Sequence[str], patch: Patch | None) -> None:
    """Refuse what cannot be tried, before any work.

    Raises:
        UsageError: there is no such attack, or it needs a patch and there is none.
    """
    for spec in specs:
        if spec == "prune-rows" and patch is None:
            raise UsageError("prune-rows takes the rows that a patch lists, and there is no patch", "name a patch")
        if spec in SURGERY:
            continue
        if spec.partition(":")[0] not in SEARCHES:
            near = did_you_mean(spec.partition(":")[0], (*SEARCHES, *SURGERY))
            raise UsageError(f"there is no adaptive attack {spec!r}", f"{near}use {', '.join((*SEARCHES, *SURGERY))}")
        parse_attacks([spec])


def attack_range(where: Range, specs: Sequence[str]) -> Iterator[Attacked]:
    """Try attacks one after the other, each against the patch that is on. Yields as they are done.

    Args:
        where: model, patch, goals and judge.
        specs: of :data:`SEARCHES` with or without a budget (``gcg:20``), and of :data:`SURGERY`.

    Raises:
        UsageError: as :func:`check_attacks`, before any work.
    """
    check_attacks(specs, where.patch)
    for spec in specs:
        began = time.perf_counter()
        key = None if where.patch is None else where.patch.digest
        with where.runtime.using(key), _operated(where, spec) as notes:
            cases = list(where.goals) if spec in SURGERY else _found(where, spec)
            benign = list(where.benign) if spec in (*SURGERY, "direct") else []
            harm, good = _asked(where, spec, cases, benign)
        yield Attacked(
            spec,
            KNOWS[spec.partition(":")[0]],
            rate_of(harm),
            other_share(harm),
            rate_of(good) if good else None,
            other_share(good),
            time.perf_counter() - began,
            notes,
        )


@contextmanager
def _operated(where: Range, spec: str) -> Iterator[str]:
    """The model under the surgery that an attack is; returns a note on it."""
    model, tokenizer = where.loaded.model, where.loaded.tokenizer
    context: AbstractContextManager[Any] = nullcontext()
    notes = ""
    if spec == "refusal-ablation":
        talks = [[list(example.messages) for example in some] for some in (where.harmful, where.harmless)]
        layer, direction = refusal_direction(model, tokenizer, talks[0], talks[1])
        context, notes = without_direction(model, direction), f"the direction of layer {layer}"
    elif spec in SURGERY:
        rows = {} if where.patch is None else rows_of(where.patch)
        rows = rows if spec == "prune-rows" else random_rows(model, rows, where.seed)
        context, notes = pruned(model, rows), f"{sum(map(len, rows.values())):,} rows at {len(rows)} projections"
    with context:
        yield notes


def _found(where: Range, spec: str) -> list[Case]:
    """The attacked cases of every goal; what an earlier run found is taken from there."""
    if spec == "direct":
        return list(where.goals)
    (attack,) = parse_attacks([spec])
    target = AttackTarget(where.loaded.model, where.loaded.tokenizer)
    ledger = Ledger(None if where.workdir is None else where.workdir / "finds.jsonl")
    subject = [where.loaded.hash, None if where.patch is None else where.patch.digest]
    made: list[Case] = []
    for done, goal in enumerate(where.goals, 1):
        key = digest_of([spec, attack.about, where.seed, *subject, goal.id, goal.content_digest, dict(goal.meta)])
        kept = ledger.get(key)
        if kept is None:
            cases = attack(goal, random.Random(f"{where.seed}/{spec}/{goal.id}"), target)
            kept = {"cases": [{"messages": list(c.messages), "meta": dict(c.meta), "id": c.id} for c in cases]}
            ledger.add({key: kept})
        for attempt, row in enumerate(kept["cases"]):
            case = replace(goal, id=row["id"], messages=tuple(row["messages"]), meta=row["meta"], attempt=attempt)
            made.append(replace(case, attack=attack.name, family=attack.family))
        where.progress(spec, done, len(where.goals))
    return made


def _asked(where: Range, spec: str, cases: list[Case], benign: list[Case]) -> tuple[list[Any], list[Any]]:
    """Records of trials, harmful and harmless, of the model as it is now."""
    loaded, patch = where.loaded, where.patch
    surgery = {"surgery": spec, "seed": where.seed} if spec in SURGERY else {}
    subject = Subject(
        loaded.name,
        loaded.hash,
        BASE if patch is None else patch.version,
        None if patch is None else patch.digest,
        {"max_new_tokens": where.max_new_tokens, "decoding": "greedy", **surgery},
    )
    result = evaluate_answers(
        model_answerer(loaded.model, loaded.reader, batch_size=where.batch_size, max_new_tokens=where.max_new_tokens),
        [*cases, *benign],
        [where.judge],
        subject=subject,
        progress=where.progress,
        workdir=where.workdir,
    )
    trials = trials_of(result.records)
    return [r for r in trials if r.kind == "harmful"], [r for r in trials if r.kind == "benign"]
