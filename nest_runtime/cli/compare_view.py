"""What the command compare prints: what the methods do, what they cost in utility, and what they cost to make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nest_runtime.cli.measuring import change, interval
from nest_runtime.cli.output import Output, percent, size
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES

SHORT = {  # the standard suite's scores of utility, as narrow heads
    "mmlu acc": "MMLU",
    "gsm8k nats_per_token": "GSM8K NATS",
    "alpaca kl_to_base": "KL",
    "alpaca answer_tokens": "TOKENS",
    "alpaca ended": "ENDED",
}


def render(out: Output, document: dict[str, Any], folder: Path) -> None:
    """Two tables that fit a terminal: what the methods do, and what they cost; comparison.md has the rest."""
    table = document["rows"]
    others = [measure for measure in MEASURES.values() if measure is not ATTACK_SUCCESS]
    columns = [ATTACK_SUCCESS.column.upper(), "95 % CI", "VS BASE", "OTHER", *(m.column.upper() for m in others)]
    out.table(["METHOD", *columns], [_safety(row, [m.key for m in others]) for row in table], right=columns)
    out.line()
    columns = ["TRAINABLE", "ARTIFACT", "SECONDS", "MEMORY", "SETTING"]
    out.table(["METHOD", *columns], [_cost(row) for row in table], right=columns)
    if names := list(table[0]["ability"]):
        out.line()
        heads = [SHORT.get(name, name.upper()) for name in names]
        out.table(["METHOD", *heads], [_ability(row, names) for row in table], right=heads)
    for note in document["notes"]:
        out.note(note)
    out.line(f"{ATTACK_SUCCESS.title} over {table[0]['n']} prompts; OTHER: neither refused nor complied")
    out.line(f"all figures in {folder}/comparison.md and .json")


def _safety(row: dict[str, Any], others: Sequence[str]) -> list[object]:
    relative = ((row.get("vs_base") or {}).get(ATTACK_SUCCESS.key) or {}).get("relative")
    shares = [percent(row[name]) for name in ("other", *others)]
    return [row["method"], percent(row[ATTACK_SUCCESS.key]), interval(row["ci95"]), change(relative), *shares]


def _ability(row: dict[str, Any], names: Sequence[str]) -> list[object]:
    return [row["method"], *(f"{row['ability'][name]['value']:.3f}" for name in names)]


def _cost(row: dict[str, Any]) -> list[object]:
    seconds = None if row["seconds"] is None else f"{row['seconds']:.0f}"
    memory = None if row["peak_bytes"] is None else size(row["peak_bytes"])
    return [row["method"], row["trainable"], size(row["artifact_bytes"]), seconds, memory, row["setting"]]
