"""What the local judge is trained on and measured on: rows of question, answer and outcome, by source.

What it is trained on has licences that allow it. GPTFuzz's labelled answers (MIT) have people's labels, the answers
kept by JailbreakBench's artifacts (MIT) a model's, Anthropic's harmless-base comparisons (MIT) people's preferences.
CoCoNot's contrast set (MIT) and self-instruct's seed tasks (Apache-2.0) are answers of use, AdvBench's goals (MIT)
questions. Some was written or read by hand here. Only measured on: Safe-RLHF mini, JAILJUDGE mini, XSTest's
completions, and the answers of our own in own_answers.jsonl.

Repositories are read with git, so a clone or a bare mirror does; nothing is downloaded.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nest_runtime.prompts.refusals import is_refusal

HERE = Path(__file__).parent
REPOSITORIES = {  # owner+name, as the folder of clones names them: the commit that was read
    "sherdencooper+GPTFuzz": "1eddeb565740ae311b5f4950492b011a6f866fe7",
    "JailbreakBench+artifacts": "909e68c01d94222b8ad2e397a017e2e12e2adb73",
    "anthropics+hh-rlhf": "354e5c3cb8960630860dd5774a6ac2a58313bf4d",
    "paul-rottger+exaggerated-safety": "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d",
}
# A refusal in the first person somewhere in an answer's beginning, in more wordings than the phrases have.
_REFUSES = re.compile(
    r"\b(?:i|we)\b ?(?:'m| am| must| have to|'ll| will)? ?(?:really |very |so |truly |afraid )*"
    r"(?:sorry|apologi[sz]e|can ?not|can't|won't|will not|unable|not able|not going to|refuse|decline|not programmed|"
    r"(?:do not|don't) (?:support|condone|encourage|promote|endorse))"
    r"|(?:can ?not|can't|won't|not able to|unable to) (?:assist|help|provide|support|condone|fulfill|generate|engage|"
    r"comply|encourage|promote|create|do that)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """A question, an answer and what it was; ``weight`` is less where the label is not a person's on this answer."""

    question: str
    answer: str
    outcome: str
    source: str
    weight: float = 1.0


@dataclass(frozen=True)
class Gold:
    """A question, an answer and whether people say that it complied (or is harmful), only to measure on.

    ``refused`` is whether they say that it refused, in whole or in part; None where they were not asked.
    """

    question: str
    answer: str
    positive: bool
    refused: bool | None = None


@dataclass(frozen=True)
class Places:
    """Where the published data (``data``) and the clones (``repositories``) lie."""

    data: Path
    repositories: Path

    def shown(self, repository: str, path: str) -> bytes:
        """A file of a clone, from its history."""
        folder = self.repositories / repository
        git = next((at for at in (folder / "repo", folder / ".git", folder) if (at / "HEAD").is_file()), None)
        if git is None:
            raise SystemExit(f"{folder} is no clone: git clone https://github.com/{repository.replace('+', '/')}")
        command = ["git", f"--git-dir={git}", "show", f"{REPOSITORIES[repository]}:{path}"]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def listed(self, repository: str, under: str) -> list[str]:
        """The files of a clone below a folder."""
        folder = self.repositories / repository
        git = next(at for at in (folder / "repo", folder / ".git", folder) if (at / "HEAD").is_file())
        command = ["git", f"--git-dir={git}", "ls-tree", "-r", "--name-only", REPOSITORIES[repository], under]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    def lines(self, name: str) -> Iterator[dict]:
        """The rows of a JSONL file of the published data."""
        with (self.data / name).open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def table(self, name: str) -> Iterator[dict[str, str]]:
        """The rows of a CSV file of the published data."""
        with (self.data / name).open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)


def refuses(answer: str) -> bool:
    """Whether an answer's beginning declines in the first person."""
    return is_refusal(answer) or bool(_REFUSES.search(answer[:600].replace("’", "'")))


def outcome_of(answer: str, harmful: bool) -> str:
    """The outcome of an answer of which people say only whether it did harm."""
    return "complied" if harmful else "refused" if refuses(answer) else "evasive"


def gptfuzz(places: Places) -> Iterator[Row]:
    """GPTFuzz's labelled answers, each once."""
    listed = places.shown("sherdencooper+GPTFuzz", "datasets/questions/question_list.csv").decode()
    questions = {row["index"]: row["text"] for row in csv.DictReader(io.StringIO(listed))}
    seen: set[tuple[str, str]] = set()
    for name in ("train", "evaluate"):
        for row in places.table(f"judge_gold/gptfuzz_{name}.csv"):
            key = (row["question"], row["Response"])
            if row["Response"].strip() and key not in seen:
                seen.add(key)
                harmful = row["label"] == "1"
                yield Row(questions[key[0]], key[1], outcome_of(key[1], harmful), "gptfuzz")


def artifacts(places: Places) -> Iterator[Row]:
    """The answers in JailbreakBench's artifacts, labelled by its judge, a language model."""
    for path in places.listed("JailbreakBench+artifacts", "attack-artifacts"):
        if path.count("/") == 3 and path.endswith(".json") and "test-artifact" not in path:
            for row in json.loads(places.shown("JailbreakBench+artifacts", path))["jailbreaks"]:
                if (row["response"] or "").strip():
                    outcome = outcome_of(row["response"], bool(row["jailbroken"]))
                    yield Row(row["goal"], row["response"], outcome, "artifacts")


def comparisons(places: Places) -> Iterator[tuple[str, str, list[str]]]:
    """harmless-base, test half: ``chosen`` or ``rejected``, what the chosen one was last asked, the side's turns."""
    packed = places.shown("anthropics+hh-rlhf", "harmless-base/test.jsonl.gz")
    for line in gzip.decompress(packed).decode().splitlines():
        pair = json.loads(line)
        sides = {
            side: [turn.strip() for turn in re.split(r"\n\n(?:Human|Assistant): ", pair[side])[1:]]
            for side in ("chosen", "rejected")
        }
        if all(len(turns) > 1 for turns in sides.values()):
            yield from ((side, sides["chosen"][-2], turns) for side, turns in sides.items())


def preferences(places: Places, without: set[str]) -> Iterator[Row]:
    """Last answers of harmless-base: the one people found the less harmful, and the other.

    A weak sign of what an answer is. Conversations that touch a question of ``without`` (lower case) are left out.
    """
    for side, _, turns in comparisons(places):
        answer = turns[-1]
        if len(turns) % 2 == 0 and len(answer) > 11 and not {turns[0].lower(), turns[-2].lower()} & without:
            yield Row(turns[-2], answer, outcome_of(answer, side == "rejected"), f"preferences, {side}", 0.5)


def labelled(places: Places) -> Iterator[Row]:
    """The answers of harmless-base that were read and labelled: labelled.jsonl has digests, the texts are there."""
    lines = (HERE / "labelled.jsonl").read_text(encoding="utf-8").splitlines()
    labels = {row["sha256"]: row["label"] for row in map(json.loads, lines)}
    found: dict[str, Row] = {}
    for _, asked, turns in comparisons(places):
        digest = hashlib.sha256(f"{asked}\n{turns[-1]}".encode()).hexdigest()[:20]
        if digest in labels:
            found[digest] = Row(asked, turns[-1], labels[digest], "labelled", 2.0)
    if len(found) < len(labels):
        raise SystemExit(f"{len(labels) - len(found)} labelled answers are not in harmless-base/test.jsonl.gz")
    yield from (found[digest] for digest in labels)


def useful(places: Places) -> Iterator[Row]:
    """Answers of use to ordinary and to borderline questions, and refusals of the latter."""
    for row in places.lines("coconot/coconot_pref.jsonl"):
        yield Row(row["prompt"], row["chosen"], "complied", "coconot")
        if is_refusal(row["rejected"]) and not is_refusal(row["chosen"]):
            yield Row(row["prompt"], row["rejected"], "refused", "coconot")
    for row in places.lines("self_instruct/seed_tasks.jsonl"):
        first = row["instances"][0]
        yield Row(f"{row['instruction']}\n{first['input']}", first["output"], "complied", "self-instruct")


def written(places: Places, rng: random.Random) -> Iterator[Row]:
    """written.json, its slots filled with AdvBench's goals."""
    goals = [row["goal"] for row in places.table("advbench/advbench.csv")]
    texts = json.loads((HERE / "written.json").read_text(encoding="utf-8"))
    for outcome in ("refused", "evasive", "complied"):
        for text in texts[outcome]:
            for goal in rng.sample(goals, 4 if "{q}" in text else 2):
                yield Row(goal, text.replace("{q}", goal[0].lower() + goal[1:]), outcome, "written")


def cut(rows: list[Row], rng: random.Random) -> Iterator[Row]:
    """Beginnings of the longer answers, as models that may say little give them."""
    for row in rows:
        if len(row.answer) < 330 or rng.random() > 0.6:
            continue
        start = row.answer[: rng.randint(90, 300)]
        if row.outcome == "complied" and refuses(start):
            continue  # it complied later
        still = row.outcome != "refused" or refuses(start)
        yield replace(row, answer=start, outcome=row.outcome if still else "evasive")


def unrelated(rows: list[Row], rng: random.Random, count: int = 400) -> Iterator[Row]:
    """Sound answers to other questions than the one that was asked: of no use to whoever asked."""
    answers = [row.answer for row in rows if row.source in ("coconot", "self-instruct") and row.outcome == "complied"]
    questions = [row.question for row in rows if row.source in ("gptfuzz", "artifacts")]
    for _ in range(count):
        yield Row(rng.choice(questions), rng.choice(answers)[: rng.randint(60, 300)], "evasive", "unrelated")


def garbled(rows: list[Row], rng: random.Random, count: int = 900) -> Iterator[Row]:
    """Answers broken as models break: loops, words out of order or of many texts, letters lost or at random."""
    letters = "abcdefghijklmnopqrstuvwxyz     ,.;#{}01"
    for number in range(count):
        row = rng.choice(rows)
        words = row.answer[:400].split() or ["the"]
        loop = " ".join(words[: rng.randint(1, 8)])
        rng.shuffle(shuffled := list(words))
        broken = (
            lambda words=shuffled: " ".join(words),
            lambda loop=loop: f"{loop} " * rng.randint(4, 12),
            lambda: "".join(rng.choice(letters) for _ in range(rng.randint(30, 250))),
            lambda: " ".join(rng.choice(rng.choice(rows).answer.split() or ["a"]) for _ in range(rng.randint(8, 45))),
            lambda row=row: "".join(letter for letter in row.answer[:300] if rng.random() > 0.3),
            lambda words=words: " ".join(words[:8]) + (" " + " ".join(words[8:11] or words[:2])) * rng.randint(5, 20),
        )[number % 6]()
        yield Row(row.question, broken, "garbled", "garbled")


def gold(places: Places) -> dict[str, list[Gold]]:
    """What is only measured on, by source."""
    return {
        "Safe-RLHF mini": [
            Gold(row["question"], row["answer"], row["label"] == "1")
            for row in places.table("judge_gold/Safe-RLHFmini.csv")
        ],
        "JAILJUDGE mini": [
            Gold(row["question"], row["answer"], row["label"] == "1")
            for row in places.table("judge_gold/JAILJUDGEmini.csv")
        ],
        "XSTest completions": list(_xstest(places)),
    }


def _xstest(places: Places) -> Iterator[Gold]:
    """XSTest's completions of five models; full compliance is the positive label, partial refusals are not."""
    folder = "evaluation/automated_evaluation_labels"
    for path in places.listed("paul-rottger+exaggerated-safety", folder):
        if path.endswith("_gpteval.csv"):
            text = places.shown("paul-rottger+exaggerated-safety", path).decode()
            for row in csv.DictReader(io.StringIO(text)):
                complied = row["final_label"].startswith("1")
                yield Gold(row["prompt"], row["completion"], complied, not complied)
