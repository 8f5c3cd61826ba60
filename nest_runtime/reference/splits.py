"""The reference world's splits: fixed by a seed, kept in splits.json, read from there.

Acts go to train, validation and test by object, so that "forge a passport" and "fake a passport" are never on two
sides. Wrappings go to those that the base's own training saw (some answered, some refused in its weak safety stage)
and those held out. ``make_splits`` is the rule that wrote the file.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from nest_runtime.reference.acts import BENIGN, HARMFUL
from nest_runtime.reference.wrappings import FAMILIES, WRAPPINGS

SPLITS_FILE = Path(__file__).with_name("splits.json")
SEED = 0
SHARES = (("test", 0.25), ("validation", 0.15))  # the rest is train
HELD_OUT_FAMILIES = ("hypothetical", "emotional")
ANSWERED_SHARE = 0.67  # of the seen wrappings, those that the weak safety stage leaves open


def make_splits(seed: int = SEED) -> dict[str, Any]:
    """Draw the splits; the same seed gives the same value."""
    rng = random.Random(f"splits/{seed}")
    return {"seed": seed, "harmful": _harmful(rng), "benign": _benign(rng), "wrappings": _wrappings(rng)}


@cache
def load_splits() -> dict[str, Any]:
    """The shipped splits, as splits.json has them."""
    value: dict[str, Any] = json.loads(SPLITS_FILE.read_text(encoding="utf-8"))
    return value


def write_splits(path: Path = SPLITS_FILE, seed: int = SEED) -> None:
    """Write splits.json (done once; the file is part of the package)."""
    path.write_text(json.dumps(make_splits(seed), indent=1) + "\n", encoding="utf-8")


def _deal(units: list[str], rng: random.Random) -> dict[str, list[str]]:
    units = sorted(units)
    rng.shuffle(units)
    out: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    start = 0
    for name, share in SHARES:
        end = start + round(share * len(units))
        out[name] = sorted(units[start:end])
        start = end
    out["train"] = sorted(units[start:])
    return out


def _harmful(rng: random.Random) -> dict[str, dict[str, list[str]]]:
    """Objects per category: every verb of an object goes where the object goes."""
    objects: dict[str, set[str]] = {}
    for group in HARMFUL:
        objects.setdefault(group.category, set()).update(group.objects)
    return {category: _deal(list(names), rng) for category, names in objects.items()}


def _benign(rng: random.Random) -> dict[str, dict[str, list[str]]]:
    return {f"{group.verb}/{group.topic}": _deal(list(group.objects), rng) for group in BENIGN}


def _wrappings(rng: random.Random) -> dict[str, list[str]]:
    held_out, seen = [], []
    for family in FAMILIES:
        members = [wrapping for wrapping in WRAPPINGS if wrapping.family == family]
        if family in HELD_OUT_FAMILIES:
            held_out += [wrapping.name for wrapping in members]
            continue
        # A code that training never showed cannot be read: hold out only one that another wrapping shares.
        codes = [wrapping.encoding for wrapping in members]
        candidates = [wrapping.name for wrapping in members if codes.count(wrapping.encoding) > 1]
        chosen = rng.choice(candidates)
        held_out.append(chosen)
        seen += [wrapping.name for wrapping in members if wrapping.name != chosen]
    rng.shuffle(seen)
    cut = round(ANSWERED_SHARE * len(seen))
    return {"answered": sorted(seen[:cut]), "refused": sorted(seen[cut:]), "held_out": sorted(held_out)}
