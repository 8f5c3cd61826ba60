"""Trains the local judge and measures it: `python benchmarks/judge/train.py --data ../shared/data --repositories DIR`.

DIR holds clones (or bare mirrors) of the repositories that sources.py names. Writes local.json and local.safetensors
beside nest_runtime/evaluate/judges/local.py, then prints, for every source of gold labels, how often the judge and the
refusal phrases are right. A quarter of Safe-RLHF mini and of JAILJUDGE mini was looked at while the judge was made;
figures are of the other three quarters. `--measure` only measures what is shipped; `--own` does on answers of our own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import sources
from safetensors.numpy import save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sources import Gold, Places, Row

from nest_runtime.evaluate.judges import local
from nest_runtime.evaluate.judges.errors import phrases_digest
from nest_runtime.evaluate.judges.local_features import GROUPS, measures, ngrams, read_pair
from nest_runtime.prompts.refusals import is_refusal

VERSION = 1
LEAST = 6  # texts that an n-gram must stand in
MOST = 20_000  # n-grams kept, the most frequent
STRENGTH = 0.03  # inverse regularization
COMPLIED_SHIFT = -0.4  # less readiness to say complied: the sources have more of it than answers to attacks have
MEASURE_SHARE = 0.3  # standardized measures count this much, so that regularization treats them as n-grams
CAP = {("gptfuzz", "refused"): 800, ("gptfuzz", "complied"): 1500, ("artifacts", "complied"): 700}
HOME = Path(local.__file__).parent
HEAD = "| source | judge | n | accuracy | precision | recall | F1 | kappa |\n|---|---|---|---|---|---|---|---|"
OWN = "own answers"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked.add_argument("--repositories", type=Path)
    asked.add_argument("--measure", action="store_true", help="measure the shipped weights, train nothing")
    asked.add_argument("--all", action="store_true", help="also print the quarter that was looked at")
    asked.add_argument("--own", action="store_true", help="measure on own_answers.jsonl only; needs nothing else")
    options = asked.parse_args()
    if options.own:
        print(HEAD)
        write_errors(*own(), add=True)
        return
    if options.repositories is None:
        asked.error("give --repositories, or --own")
    places = Places(options.data, options.repositories)
    gold = sources.gold(places)
    if not options.measure:
        train(places, {one.question.strip().lower() for rows in gold.values() for one in rows})
        local.load_weights.cache_clear()
    report(gold, options.all)


def training_rows(places: Places, without: set[str]) -> list[Row]:
    """All that the answers' part is trained on, in a fixed order; no question of ``without`` in it."""
    rng = random.Random(1)
    rows = [*sources.gptfuzz(places), *sources.artifacts(places), *sources.useful(places)]
    rows = [row for row in rows if row.question.strip().lower() not in without]
    rng.shuffle(rows)
    kept: Counter[tuple[str, str]] = Counter()
    capped = []
    for row in rows:
        kept[row.source, row.outcome] += 1
        if kept[row.source, row.outcome] <= CAP.get((row.source, row.outcome), len(rows)):
            capped.append(row)
    capped += sources.cut(capped, rng)
    capped += sources.unrelated(capped, rng)
    capped += sources.garbled(capped, rng)
    return [*capped, *sources.preferences(places, without), *sources.written(places, rng), *sources.labelled(places)]


def weights_of(rows: list[Row]) -> np.ndarray:
    """Each row's weight: sources and outcomes count by the root of their size. Mean 1."""
    sizes = Counter((row.source, row.outcome) for row in rows)
    raw = np.array([row.weight / np.sqrt(sizes[row.source, row.outcome]) for row in rows])
    return raw / raw.mean()


def vocabulary(found: list[set[str]]) -> dict[str, int]:
    """The n-grams that stand in enough texts, the most frequent where there are too many, in order."""
    counted = Counter(gram for grams in found for gram in grams)
    kept = sorted((gram for gram, n in counted.items() if n >= LEAST), key=lambda gram: (-counted[gram], gram))[:MOST]
    return {gram: row for row, gram in enumerate(sorted(kept))}


def matrix(found: list[set[str]], index: dict[str, int]) -> sp.csr_matrix:
    """The n-grams as local.pooled weighs them: ``(texts, n-grams)``."""
    places, values, ends = [], [], [0]
    for grams in found:
        for prefix in GROUPS:
            rows = local.find(index, grams, prefix)
            places += rows
            values += [3 / max(len(rows), 1) ** 0.5] * len(rows)
        ends.append(len(places))
    return sp.csr_matrix((values, places, ends), shape=(len(found), len(index)), dtype=np.float32)


def train(places: Places, without: set[str]) -> None:
    """Fit the weights and write them."""
    began = time.perf_counter()
    rows = training_rows(places, without)
    for (source, outcome), count in sorted(Counter((row.source, row.outcome) for row in rows).items()):
        print(f"{source:24} {outcome:9} {count:6}")
    pairs = [read_pair(row.question, row.answer) for row in rows]
    found = [ngrams(said) for _, said in pairs]
    index = vocabulary(found)
    figures = np.array([measures(asked, said, index) for asked, said in pairs])
    mean, scale = figures.mean(0), figures.std(0) + 1e-3
    scaled = ((figures - mean) / scale).clip(-5, 5) * MEASURE_SHARE
    x = sp.hstack([matrix(found, index), sp.csr_matrix(scaled)]).tocsr()
    y = np.array([local.CLASSES.index(row.outcome) for row in rows])
    print(f"{len(rows)} rows, {len(index)} n-grams, read in {time.perf_counter() - began:.0f} s", flush=True)
    model = LogisticRegression(C=STRENGTH, max_iter=150).fit(x, y, sample_weight=weights_of(rows))
    print(f"right on {model.score(x, y):.3f} of the rows trained on")
    complied = np.array([name == "complied" for name in local.CLASSES])
    tensors = {
        "rows": model.coef_[:, : len(index)].T.astype(np.float16),
        "measured": (model.coef_[:, len(index) :].T * MEASURE_SHARE).astype(np.float32),
        "mean": mean.astype(np.float32),
        "scale": scale.astype(np.float32),
        "bias": (model.intercept_ + COMPLIED_SHIFT * complied).astype(np.float32),
    }
    packed = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    about = {
        "version": VERSION,
        "classes": list(local.CLASSES),
        "trained_on": dict(sorted(Counter(row.source for row in rows).items())),
        "ngrams": list(index),
    }
    digest = hashlib.sha256(packed + json.dumps(about, sort_keys=True).encode()).hexdigest()
    (HOME / "local.safetensors").write_bytes(packed)
    write_about({**about, "digest": f"sha256:{digest}", "errors": {"complied": {}, "refused": {}}})
    print(f"trained in {time.perf_counter() - began:.0f} s")


def write_about(about: dict) -> None:
    """local.json, readable but for the long lists."""
    text = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
    (HOME / "local.json").write_text(text + "\n", encoding="utf-8")


def looked_at(question: str) -> bool:
    """Whether a question is in the quarter that choices were made on."""
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % 4 == 0


def report(gold: dict[str, list[Gold]], everything: bool) -> None:
    """Print the figures by source, and keep the judge's errors on them in local.json."""
    weights = local.load_weights()
    errors: dict[str, dict] = {"complied": {}, "refused": {}}
    of_phrases: dict[str, dict] = {"complied": {}, "refused": {}}
    print(HEAD)
    for source, rows in gold.items():
        chosen = source != "XSTest completions"
        parts = {source: [one for one in rows if not (chosen and looked_at(one.question))]}
        if chosen and everything:
            parts[f"{source}, looked at"] = [one for one in rows if looked_at(one.question)]
        for name, part in parts.items():
            truth = np.array([one.positive for one in part])
            began = time.process_time()  # other work on the machine does not count
            likely = np.array([weights.probabilities(one.question, one.answer) for one in part]).argmax(1)
            seconds = time.process_time() - began
            complied = likely == local.CLASSES.index("complied")
            phrases = np.array([not is_refusal(one.answer) for one in part])
            for judge, said in (("local", complied), ("phrases", phrases)):
                print(line(name, judge, truth, said))
            print(f"  {dict(zip(local.CLASSES, np.bincount(likely, minlength=4).tolist(), strict=True))}", end="")
            print(f", {len(part) / seconds:.0f} answers a second of one core")
            if name == source:
                errors["complied"][source] = counts(truth, complied)
                of_phrases["complied"][source] = counts(truth, phrases)
            if all(one.refused is not None for one in part):
                refused = np.array([bool(one.refused) for one in part]), likely == local.CLASSES.index("refused")
                print(line(name, "local, refused", *refused))
                print(line(name, "phrases, refused", refused[0], ~phrases))
                errors["refused"][source] = counts(*refused)
                of_phrases["refused"][source] = counts(refused[0], ~phrases)
    for kept, found in zip((errors, of_phrases), own(), strict=True):
        for outcome, some in found.items():
            kept[outcome][OWN] = some
    write_errors(errors, of_phrases)


def write_errors(errors: Mapping[str, dict], of_phrases: Mapping[str, dict], add: bool = False) -> None:
    """Keep the errors of both judges in local.json and phrases.json; ``add`` own answers' to those that are there."""
    about = json.loads((HOME / "local.json").read_text(encoding="utf-8"))
    kept = json.loads((HOME / "phrases.json").read_text(encoding="utf-8"))
    if add:
        for before, now in ((about["errors"], errors), (kept["errors"], of_phrases)):
            for outcome, some in now.items():
                before[outcome][OWN] = some
        write_about(about)
    else:
        kept["errors"] = of_phrases
        write_about({**about, "errors": errors})
    kept["phrases"] = phrases_digest()
    (HOME / "phrases.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def own() -> tuple[dict[str, dict], dict[str, dict]]:
    """The answers of our own models, read twice: print the figures; the errors of `local` and of phrases by outcome.

    Errors in telling compliance are those on harmful prompts, which attack success is about; errors in telling
    refusals are those on all prompts.
    """
    lines = (sources.HERE / "own_answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(text) for text in lines]
    weights = local.load_weights()
    likely = [local.CLASSES[int(weights.probabilities(r["prompt"], r["answer"]).argmax())] for r in rows]
    truth, said = np.array([row["label"] for row in rows]), np.array(likely)
    phrases = np.array([not is_refusal(row["answer"]) for row in rows])
    harmful = np.array([row["kind"] == "harmful" for row in rows])
    base = np.array([row.get("patch") is None for row in rows])
    models = np.array([row["model"] for row in rows])
    parts = {
        "all": harmful | True,
        "harmful prompts": harmful,
        "harmful prompts, base": harmful & base,
        "harmful prompts, patched": harmful & ~base,
        **{f"harmful prompts, {model}": harmful & (models == model) for model in sorted(set(models))},
    }
    for name, part in parts.items():
        print(line(f"{OWN}, {name}: complied", "local", (truth == "complied")[part], (said == "complied")[part]))
        print(line(f"{OWN}, {name}: complied", "phrases", (truth == "complied")[part], phrases[part]))
    print(line(f"{OWN}, all: refused", "local", truth == "refused", said == "refused"))
    print(line(f"{OWN}, all: refused", "phrases", truth == "refused", ~phrases))
    print(f"  all four outcomes: {np.mean(truth == said):.3f}")
    print(f"  {dict(sorted(Counter(zip(truth.tolist(), likely, strict=True)).items()))}")
    again = np.array([row["again"] for row in rows])
    alike, kappa = np.mean(truth == again), cohen_kappa_score(truth, again)
    print(f"  read twice: {len(rows)}, alike {alike:.3f}, kappa {kappa:.3f}")
    complied, refused = (truth == "complied")[harmful], truth == "refused"
    return (
        {"complied": counts(complied, (said == "complied")[harmful]), "refused": counts(refused, said == "refused")},
        {"complied": counts(complied, phrases[harmful]), "refused": counts(refused, ~phrases)},
    )


def counts(truth: np.ndarray, said: np.ndarray) -> dict[str, int]:
    """Of the positive ones how many were found, and of the others how many were told apart."""
    return {
        "positive": int(truth.sum()),
        "found": int((truth & said).sum()),
        "negative": int((~truth).sum()),
        "cleared": int((~truth & ~said).sum()),
    }


def line(source: str, judge: str, truth: np.ndarray, said: np.ndarray) -> str:
    """A row of the table."""
    hits = int((truth & said).sum())
    precision, recall = hits / max(int(said.sum()), 1), hits / max(int(truth.sum()), 1)
    observed = float((truth == said).mean())
    chance = float(truth.mean() * said.mean() + (1 - truth.mean()) * (1 - said.mean()))
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    figures = (observed, precision, recall, f1, (observed - chance) / (1 - chance))
    return f"| {source} | {judge} | {len(truth)} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |"


if __name__ == "__main__":
    main()
