"""Attacks: ways of asking for a harmful behavior that may get past a refusal.

``ATTACKS`` has the built-in ones by name; :func:`parse_attacks` takes names and template files as the
command line does, :func:`apply_attacks` makes the attacked cases.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.attacks.base import Attack, AttackTarget, derive, infinitive, text_attack
from nest_runtime.evaluate.attacks.conversation import CRESCENDO, PREFILL, best_of_n, in_context, many_shot
from nest_runtime.evaluate.attacks.encoding import ENCODINGS
from nest_runtime.evaluate.attacks.evolution import evolution
from nest_runtime.evaluate.attacks.framing import FRAMINGS
from nest_runtime.evaluate.attacks.gcg import gcg
from nest_runtime.evaluate.attacks.random_search import random_search
from nest_runtime.evaluate.attacks.templates import read_templates
from nest_runtime.evaluate.cases import Case
from nest_runtime.hints import did_you_mean
from nest_runtime.io import expand

__all__ = [
    "ATTACKS",
    "Attack",
    "Target",
    "apply_attacks",
    "best_of_n",
    "derive",
    "evolution",
    "gcg",
    "in_context",
    "infinitive",
    "many_shot",
    "parse_attacks",
    "random_search",
    "read_templates",
    "text_attack",
]

WHITE_BOX = (evolution(), random_search(), gcg())  # need the model; no part of `all`
ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (*FRAMINGS, *ENCODINGS, many_shot(), in_context(), CRESCENDO, best_of_n(), PREFILL, *WHITE_BOX)
}
# Attacks with a number: shots, tries, steps.
_NUMBERED: dict[str, Callable[[int], Attack]] = {
    "many-shot": many_shot,
    "ica": in_context,
    "best-of-n": best_of_n,
    "evolution": lambda generations: evolution(generations=generations),
    "random-search": lambda steps: random_search(steps=steps),
    "gcg": lambda steps: gcg(steps=steps),
}


def parse_attacks(specs: Iterable[str]) -> list[Attack]:
    """Attacks from the texts of the command line, each once, in order.

    Args:
        specs: names, ``name:number`` (``many-shot:64``, ``ica:5``, ``best-of-n:16``, ``gcg:100``), ``all`` (every
            black-box attack), template files, or several of these with commas.

    Raises:
        UsageError: there is no such attack, or it takes no number.
        DataError: a template file cannot be used.
    """
    found: dict[str, Attack] = {}
    for spec in specs:
        for attack in _parse(spec.strip()):
            found[attack.name] = attack
    if not found:
        raise UsageError("no attacks were given", f"use all, a template file, or {', '.join(ATTACKS)}")
    return list(found.values())


def _parse(spec: str) -> list[Attack]:
    if spec == "all":
        return [attack for attack in ATTACKS.values() if not attack.white_box]
    if spec in ATTACKS:
        return [ATTACKS[spec]]
    if expand(spec).is_file():
        return read_templates(spec)
    if "," in spec:
        return [attack for part in spec.split(",") if part.strip() for attack in _parse(part.strip())]
    name, _, number = spec.partition(":")
    if name in _NUMBERED and number.isdigit():
        return [_NUMBERED[name](int(number))]
    if Path(spec).suffix:
        return read_templates(spec)  # raises that there is no such file
    near = did_you_mean(name, ["all", *ATTACKS])
    raise UsageError(
        f"there is no attack {spec!r}",
        f"{near}use all, a template file, {', '.join(ATTACKS)}, "
        f"or a number with {', '.join(_NUMBERED)}, as in best-of-n:16",
    )


def apply_attacks(
    cases: Sequence[Case],
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    model: Any = None,
    tokenizer: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Case]:
    """The cases and, behind them, the attacked ones of every plain harmful case.

    Benign cases and cases that are jailbreaks already pass unchanged. White-box attacks are made against
    ``model`` with whatever patch is active in the caller's context: call this inside ``runtime.using(…)``.

    Args:
        cases: of any suites.
        attacks: see :func:`parse_attacks`.
        seed: of everything random; each attack on each case draws from a generator of its own.
        model, tokenizer: for white-box attacks.
        progress: called as ``("attacks", done, total)``.

    Raises:
        UsageError: a white-box attack without a model.
    """
    blind = [attack.name for attack in attacks if attack.white_box and (model is None or tokenizer is None)]
    if blind:
        raise UsageError(f"{', '.join(blind)} attacks the model itself", "give the model, or choose black-box attacks")
    target = None if model is None or tokenizer is None else AttackTarget(model, tokenizer)
    plain = [case for case in cases if case.kind == "harmful" and case.attack == "direct"]
    jobs = [(attack, case) for attack in attacks if attack.name != "direct" for case in plain]
    made: list[Case] = []
    for done, (attack, case) in enumerate(jobs, 1):
        made += attack(case, random.Random(f"{seed}/{attack.name}/{case.id}"), target)
        if progress is not None and (attack.white_box or done % 500 == 0 or done == len(jobs)):
            progress("attacks", done, len(jobs))
    return [*cases, *made]
