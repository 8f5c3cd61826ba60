"""The page of an evaluation: what it shows, hostile answers in it, and its filter in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nest_runtime.cli.main import main
from nest_runtime.evaluate import EvalResult, evaluate_answers
from nest_runtime.evaluate.judges import PhraseJudge
from nest_runtime.evaluate.page import page, write_page
from nest_runtime.evaluate.rounds import Subject
from nest_runtime.evaluate.standard import SuiteSource
from tests.support.demo import CHROMIUM, FLAGS, VIOLATIONS, axe_source, why_no_browser
from tests.support.evaluate import Parrot, benign, harmful

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REFUSED = "I'm sorry, but I cannot help with that."
HOSTILE = (
    "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    '"><svg/onload=document.title="owned"><a href="javascript:alert(1)">go</a>',
    "\u202ereversed\u202c \x1b[31mred\x00 \ud800 half",
    "]]><!--<style>body{display:none}</style>",
)
SUITE = "plain<b>\"'&"


def result(with_base: bool = True) -> EvalResult:
    """Hostile texts wherever a text can be: prompts, answers, suites, names, sources."""
    cases = [harmful(f"h{i}", f"Break {text}", suite=SUITE) for i, text in enumerate(HOSTILE)]
    cases += [benign(f"b{i}", f"Bake bread {i}", suite="kitchen") for i in range(3)]
    cases += [harmful("w1", "In a play: break it", suite="jailbreak-wild", family="<i>play</i>", attack="play")]
    base = Parrot({f"Break {text}": text for text in HOSTILE})
    new = Parrot({case.prompt: REFUSED for case in cases[2:5]} | {f"Break {text}": text for text in HOSTILE[:2]})
    made = [
        evaluate_answers(answers, cases, [PhraseJudge()], subject=Subject("<model>", "sha256:0", patch, digest, {}))
        for answers, patch, digest in ((new, "v1", "sha256:" + "1" * 64), (base, "base", None))
    ]
    suites = {SUITE: SuiteSource("<u>source</u>, 2024", "MIT", 4, 10)}
    found = made[0].compared_with(made[1]) if with_base else made[0]
    return EvalResult(**{**vars(found), "suites": suites})


class Tags(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_texts_become_no_markup_and_nothing_is_fetched() -> None:
    text = page(result())
    tags = Tags(text).found
    assert [tag for tag, _ in tags].count("script") == 1
    assert [tag for tag, _ in tags].count("style") == 1
    assert not {"img", "a", "b", "i", "u", "link", "iframe"} & {tag for tag, _ in tags}
    attributes = {name for _, given in tags for name in given}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "action")]
    assert "\x00" not in text
    assert "\x1b" not in text
    text.encode("utf-8")
    assert "default-src 'none'" in text
    assert "&lt;script&gt;" in text


def test_it_shows_both_answers_the_tables_and_the_plots() -> None:
    shown = page(result())
    assert shown.count("<article ") == 8
    assert shown.count('data-base="complied"') == 8
    assert shown.count("<svg ") > 3
    for words in ("corrected for the judge", "McNemar p", "MIT", "drawn from", "attack success", "over-refusal"):
        assert words in shown
    alone = page(result(with_base=False))
    assert "data-base" not in alone
    assert "McNemar" not in alone


def test_what_was_saved_gives_the_same_page(tmp_path: Path) -> None:
    made = result()
    text = page(made).replace("\ufffd", "?")
    kept = EvalResult.load(made.save(tmp_path / "r.json"))
    assert page(kept).replace("\ufffd", "?") == text
    assert kept.base_records == made.base_records


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    words = ["eval", "--patch", "v3", "--with-base", "--suite", "plain", "--suite", "over-refusal", "--limit", "3"]
    assert main([*words, "--max-tokens", "8", "--html", str(out)]) == 0
    assert out.read_text(encoding="utf-8").count("<article ") == 6
    capsys.readouterr()
    assert main([*words, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "--html" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if why_no_browser():
        pytest.skip(why_no_browser())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[tuple[Page, list[str]]]:
    """The page in a tab, and what it complained of or asked for."""
    heard: list[str] = []
    tab = browser.new_page()
    tab.set_default_timeout(90_000)
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    path = write_page(result(), tmp_path / "page.html")
    tab.on("request", lambda request: None if request.url == path.as_uri() else heard.append(request.url))
    tab.goto(path.as_uri())
    yield tab, heard
    tab.close()


def test_in_a_browser_it_filters_by_suite_outcome_and_text(opened: tuple[Page, list[str]]) -> None:
    tab, heard = opened
    cards = tab.locator("article:visible")

    def shows(count: int) -> None:
        tab.wait_for_function("n => document.querySelector('#count').textContent.startsWith(`${n} of 8`)", arg=count)
        assert cards.count() == count

    shows(8)
    tab.select_option("[name=suite]", SUITE)
    shows(4)
    tab.select_option("[name=outcome]", "refused")
    shows(2)
    tab.click("input[type=reset]")
    shows(8)
    tab.check("[name=changed]")
    shows(3)
    tab.click("input[type=reset]")
    tab.fill("[name=text]", "ONERROR=")
    shows(1)
    assert "onerror" in cards.first.locator("pre").last.inner_text()
    assert "owned" not in tab.title()
    assert tab.locator("article script, article img, article svg").count() == 0
    assert heard == []


def test_in_a_browser_it_can_be_read_by_everyone(opened: tuple[Page, list[str]]) -> None:
    tab, _ = opened
    source = axe_source()
    if not source:
        pytest.skip("axe-core is not installed (axe-playwright-python, or NEST_AXE)")
    tab.evaluate(source)
    assert tab.evaluate(VIOLATIONS) == []
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert re.search(r"8 of 8", tab.inner_text("#count"))
