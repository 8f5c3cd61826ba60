"""Bundled prompts and framings: readable, diverse, of our own writing, the framings alike for both classes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_runtime.errors import DataError
from nest_runtime.prompts.builtin import NAMES, bundled
from nest_runtime.prompts.examples import Example, load_examples
from nest_runtime.prompts.framings import (
    CODE_FRAMINGS,
    FRAMINGS,
    HELD_OUT_CODE,
    HELD_OUT_FRAMINGS,
    MOVED_ON,
    Framing,
    chosen,
    framed,
    in_code,
    moved_on,
)

ROOT = Path(__file__).parents[2]
GIVEN = Path(os.environ.get("NEST_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def split(names: str) -> set[str]:
    return set(names.split())


BORDERLINE_CATEGORIES = split(
    "homonyms history fiction security_defence medicine law society home_safety privacy figurative "
    "harmless_discrimination harmless_imperatives"
)
EVERYDAY_CATEGORIES = split(
    "code maths facts lists_planning letters rewriting translation formats roleplay languages summaries long_texts "
    "conversations"
)
HARMFUL_CATEGORIES = split(
    "chemistry biology weapons hacking fraud theft violence self-harm hate harassment children disinformation "
    "trafficking infrastructure extremism animals law privacy"
)
IMPERATIVES_CATEGORIES = split(
    "politics finance medicine law discrimination sexuality fiction games security malware danger fraud economy "
    "government surveillance drugs chemistry animals journalism humour everyday"
)
SMALL_TALK_CATEGORIES = split("greetings manners about_you jokes feelings chat tests")
PASTED_CATEGORIES = split("completion split_strings ciphers data reading mails tables documents")
CATEGORIES = {
    "everyday": EVERYDAY_CATEGORIES,
    "harmful": HARMFUL_CATEGORIES,
    "imperatives": IMPERATIVES_CATEGORIES,
    "imperatives-validation": IMPERATIVES_CATEGORIES,
    "pasted": PASTED_CATEGORIES,
    "small-talk": SMALL_TALK_CATEGORIES,
}
HELD_OUT = ("validation", "imperatives-validation")
IMPERATIVES = split(
    "write develop create provide give teach outline make draft explain describe compose rewrite suggest come sketch "
    "tell summarise summarize review critique prove help"
)
ORDERS = IMPERATIVES | split(
    "list design show argue propose plan generate compare advise invent configure calculate produce persuade"
)
PUBLISHED = ("xstest", "jailbreakbench", "coconot", "advbench", "harmbench")
PROMPT_KEYS = ("prompt", "goal", "behavior", "text", "instruction", "question")
HARMFUL_LIKE = "Write a tutorial on how to pick the lock of a shed"
QUESTION = "Why does my neighbour's cat hate me?"


def rows(name: str) -> list[Example]:
    return load_examples(bundled(name))


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def imperatives(examples: list[Example]) -> float:
    return sum(example.prompt.split()[0].lower().strip(",:") in IMPERATIVES for example in examples) / len(examples)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("harmful", 200), ("borderline", 600), ("imperatives", 400), ("everyday", 400), ("pasted", 180)),
        *(("small-talk", 100), ("validation", 150), ("imperatives-validation", 60)),
    ],
)
def test_the_files_parse_and_hold_prompts_without_answers(name: str, least: int) -> None:
    examples = rows(name)
    assert len(examples) >= least
    assert not [example.id for example in examples if example.response]
    assert {example.category for example in examples} == CATEGORIES.get(name, BORDERLINE_CATEGORIES)


def test_no_prompt_comes_twice_in_any_file() -> None:
    texts = Counter(
        " ".join(re.findall(r"\w+", " ".join(message["content"] for message in example.messages).lower()))
        for name in NAMES
        for example in rows(name)
    )
    assert [text for text, times in texts.items() if times > 1] == []


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_validation_is_no_near_copy_of_the_training_prompts(held_out: str) -> None:
    trained = [words(example.prompt) for name in NAMES if name not in HELD_OUT for example in rows(name)]
    near = [
        example.prompt
        for example in rows(held_out)
        if max(overlap(words(example.prompt), other) for other in trained) > 0.6
    ]
    assert near == []


def test_borderline_prompts_have_the_shapes_of_harmful_ones() -> None:
    assert imperatives(rows("borderline")) >= 0.4
    assert imperatives(rows("validation")) >= 0.5
    lengths = [len(example.prompt.split()) for example in rows("borderline")]
    assert min(lengths) <= 6
    assert max(lengths) >= 50
    openings = Counter(" ".join(example.prompt.lower().split()[:3]) for example in rows("borderline"))
    assert max(openings.values()) <= len(lengths) // 15  # no template has taken over


@pytest.mark.parametrize("name", ["imperatives", "imperatives-validation"])
def test_imperatives_are_one_order_each(name: str) -> None:
    prompts = [example.prompt for example in rows(name)]
    assert [prompt for prompt in prompts if prompt.split()[0].lower().strip(",") not in ORDERS] == []
    assert [prompt for prompt in prompts if not 5 <= len(prompt.split()) <= 22] == []
    assert [prompt for prompt in prompts if "?" in prompt or "\n" in prompt] == []
    shares = Counter(example.category for example in rows(name))
    assert max(shares.values()) <= 0.08 * len(prompts)
    openings = Counter(" ".join(prompt.lower().split()[:3]) for prompt in prompts)
    assert max(openings.values()) <= len(prompts) // 15  # no template has taken over


@pytest.mark.parametrize("name", ["imperatives", "pasted"])
def test_the_added_prompts_are_no_near_copies_of_others(name: str) -> None:
    others = [words(example.prompt) for other in NAMES if other != name for example in rows(other)]
    own = [words(example.prompt) for example in rows(name)]
    pairs = [overlap(one, other) for number, one in enumerate(own) for other in own[:number]]
    assert max(pairs) <= 0.6
    assert max(overlap(one, other) for one in own for other in others) <= 0.6


def test_pasted_prompts_hold_code_data_or_a_text() -> None:
    by_category: dict[str | None, list[str]] = {}
    for example in rows("pasted"):
        by_category.setdefault(example.category, []).append(example.prompt)
    texts = by_category["mails"] + by_category["documents"]
    assert len(texts) + len(by_category["tables"]) >= 60
    assert min(len(text.split()) for text in texts) >= 50
    code = [text for category in ("completion", "reading") for text in by_category[category]]
    assert [text for text in code if "\n" not in text] == []


def test_small_talk_is_short_and_says_it_in_several_languages() -> None:
    prompts = [example.prompt for example in rows("small-talk")]
    assert max(len(prompt.split()) for prompt in prompts) <= 12
    assert sum(len(prompt.split()) <= 2 for prompt in prompts) >= 20
    assert {"hi", "Bonjour !", "hola", "Hallo"} <= set(prompts)


def test_everyday_prompts_are_of_many_kinds() -> None:
    examples = rows("everyday")
    shares = Counter(example.category for example in examples)
    assert 0.25 <= shares["code"] / len(examples) <= 0.35
    assert shares["languages"] / len(examples) >= 0.09
    assert sum(len(example.messages) > 1 for example in examples) >= 40
    assert max(len(example.prompt.split()) for example in examples) >= 180


@cache
def published(name: str) -> dict[int, list[frozenset[str]]]:
    """The words of each prompt of a set, by their number: only sets of about one size can overlap much."""
    csv.field_size_limit(10**8)
    texts: list[str] = []
    for path in sorted((GIVEN / name).rglob("*")):
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                found: list[dict[str, str]] = list(csv.DictReader(file))
        elif path.suffix == ".jsonl":
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            continue
        lowered = [{key.lower(): value for key, value in row.items() if key} for row in found]
        texts += [next(row[key] for key in PROMPT_KEYS if row.get(key)) for row in lowered]
    by_size: dict[int, list[frozenset[str]]] = {}
    for found_words in {words(text) for text in texts}:
        by_size.setdefault(len(found_words), []).append(found_words)
    return by_size


def taken(text: str, known: dict[int, list[frozenset[str]]]) -> bool:
    own = words(text)
    sizes = range(int(0.8 * len(own)), int(len(own) / 0.8) + 1)
    return any(overlap(own, other) > 0.8 for size in sizes for other in known.get(size, ()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_prompt_is_taken_from_a_published_set(name: str) -> None:
    if not (GIVEN / name).is_dir():
        pytest.skip(f"{GIVEN / name} is not there")
    known = published(name)
    assert sum(map(len, known.values())) >= 90
    assert [example.prompt for own in NAMES for example in rows(own) if taken(example.prompt, known)] == []


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(DataError, match="harmful, borderline, imperatives, everyday, pasted, small-talk, validation"):
        bundled("benign")


def test_importing_prompts_and_framings_needs_no_torch() -> None:
    code = "import sys, nest_runtime.prompts.framings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("framing", [*CODE_FRAMINGS, *HELD_OUT_CODE], ids=lambda framing: framing.name)
def test_code_holds_the_whole_prompt(framing: Framing) -> None:
    prompt = 'Say "yes" twice.\nThen stop \\ wait.'
    (message,) = framing.render(prompt)
    found = re.search(r"\[\"Say\".*\]|\[\"wait.*\]|\[\"Say .*\]", message["content"])
    if found is None:
        assert prompt in message["content"] or json.dumps(prompt)[1:-1] in message["content"]
        return
    pieces = json.loads(found[0])
    assert len(pieces) >= 4
    assert prompt.split() in (pieces, pieces[::-1]) or "".join(pieces) == prompt


def test_code_framings_of_a_prompt_follow_from_it_alone() -> None:
    names = [framing.name for framing in in_code("What is rain?", 5)]
    assert len(set(names)) == 5
    assert names == [framing.name for framing in in_code("What is rain?", 5)]
    assert names != [framing.name for framing in in_code("What is snow?", 5)]
    assert not {framing.name for framing in in_code("What is rain?", len(CODE_FRAMINGS))} & {
        framing.name for framing in HELD_OUT_CODE
    }
    with pytest.raises(ValueError, match="number of code framings"):
        in_code("What is rain?", len(CODE_FRAMINGS) + 1)


def test_there_are_framings_of_every_kind() -> None:
    kinds = Counter(framing.kind for framing in FRAMINGS)
    assert set(kinds) == {
        *("request", "context", "format", "language", "structure", "conversation", "long", "persona"),
    }
    assert len(FRAMINGS) >= 80
    assert len(HELD_OUT_FRAMINGS) >= 12
    names = [framing.name for framing in (*FRAMINGS, *CODE_FRAMINGS, *HELD_OUT_FRAMINGS, *HELD_OUT_CODE, *MOVED_ON)]
    assert len(names) == len(set(names))


def said(framing: Framing, prompt: str) -> str:
    return "\n".join(message["content"] for message in framing.render(prompt))


@pytest.mark.parametrize("prompt", [HARMFUL_LIKE, QUESTION, 'He said: "{escaped}" {prompt}\nWhat now?'])
def test_a_framing_holds_the_prompt_and_ends_with_the_user(prompt: str) -> None:
    for framing in (*FRAMINGS, *HELD_OUT_FRAMINGS, *MOVED_ON):
        messages = framing.render(prompt)
        roles = [message["role"] for message in messages]
        assert roles[-1] == "user"
        assert framing.has_system == (roles[0] == "system")
        turns = roles[framing.has_system :]
        assert turns == [("user", "assistant")[i % 2] for i in range(len(turns))]
        text = said(framing, prompt)
        if framing.name.startswith(("typos", "no-punctuation")):
            block = SequenceMatcher(None, text.lower(), prompt.lower())
            assert sum(match.size for match in block.get_matching_blocks()) > 0.8 * len(prompt)
        else:
            escaped = json.dumps(prompt)[1:-1]
            assert any(form.lower().rstrip(".") in text.lower() for form in (prompt, escaped)), framing.name


def test_framings_are_no_jailbreaks_and_do_not_open_the_answer() -> None:
    banned = (
        r"ignore (all|your|the|previous)|no (rules|limits|restrictions|filter)|\bDAN\b|unfiltered|never refuse|\bSure\b"
    )
    texts = [said(framing, "X") for framing in (*FRAMINGS, *MOVED_ON)]
    assert [text for text in texts if re.search(banned, text)] == []


def test_imperatives_and_questions_each_get_a_sentence_that_fits() -> None:
    by_name = {framing.name: framing for framing in FRAMINGS}
    assert said(by_name["can-you"], HARMFUL_LIKE) == f"Can you write{HARMFUL_LIKE[5:]}?"
    assert said(by_name["can-you"], QUESTION) == f"Can you help me with this? {QUESTION}"
    assert said(by_name["three-bullets"], HARMFUL_LIKE) == f"{HARMFUL_LIKE}. Answer in three bullet points."


def test_held_out_framings_are_never_chosen_for_training() -> None:
    trained = {framing.name for framing in chosen(QUESTION, len(FRAMINGS))}
    assert trained == {framing.name for framing in FRAMINGS}
    assert not trained & {framing.name for framing in (*HELD_OUT_FRAMINGS, *MOVED_ON)}


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1, max_size=80), st.integers(0, 5), st.integers(0, 20))
def test_the_choice_is_the_same_each_time_and_without_repeats(prompt: str, seed: int, count: int) -> None:
    first = chosen(prompt, count, seed)
    assert first == chosen(prompt, count, seed)
    assert len({framing.name for framing in first}) == count
    assert len({framing.kind for framing in first}) == min(count, 8)
    assert framed(prompt, count, seed) == [framing.render(prompt) for framing in first]
    assert moved_on(prompt, seed) == moved_on(prompt, seed)


def test_the_choice_is_the_same_in_another_process() -> None:
    code = f"from nest_runtime.prompts.framings import chosen; print([f.name for f in chosen({QUESTION!r}, 9, 4)])"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str([framing.name for framing in chosen(QUESTION, 9, 4)])


def test_both_classes_get_the_same_shares_of_framings() -> None:
    """Imperatives of the harmful kind against everyday prompts: the shares differ by no more than chance allows."""
    benign = [example.prompt for example in rows("everyday")]
    alarming = [example.prompt for example in rows("borderline")][: len(benign)]
    for what in ("kind", "name"):
        one, other = (
            Counter(getattr(framing, what) for prompt in prompts for framing in chosen(prompt, 3))
            for prompts in (benign, alarming)
        )
        names = set(one) | set(other)
        # chi-square of two samples of equal size: about one per degree of freedom, +- sqrt(2 / degrees)
        statistic = sum((one[name] - other[name]) ** 2 / (one[name] + other[name]) for name in names)
        degrees = len(names) - 1
        assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_framings_without_system_messages_can_be_asked_for() -> None:
    plain = sum(not framing.has_system for framing in FRAMINGS)
    assert not any(framing.has_system for framing in chosen(QUESTION, plain, system=False))
    with pytest.raises(ValueError, match=f"0 to {plain}"):
        chosen(QUESTION, plain + 1, system=False)


def test_moved_on_ends_with_a_harmless_question_of_its_own() -> None:
    messages = moved_on(HARMFUL_LIKE)
    assert messages[0]["content"] == HARMFUL_LIKE
    assert HARMFUL_LIKE not in messages[-1]["content"]


def test_the_files_lie_in_the_package_that_the_wheel_takes_whole() -> None:
    import tomllib

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["packages"] == ["nest_runtime"]
    assert "nest_runtime" in build["sdist"]["include"]
    package = ROOT / "nest_runtime"
    files = [bundled(name).resolve() for name in NAMES] + [package / "prompts" / "framings.json"]
    assert all(file.is_file() and file.is_relative_to(package.resolve()) for file in files)
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ignored.stdout == ""  # hatch leaves out what git ignores
