"""Names, versions, file names and errors of others, on their way to a terminal, a log or a page."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nest_runtime.demo.html import markup
from nest_runtime.errors import NestError, PatchFormatError
from nest_runtime.escape import clean, visible
from nest_runtime.serve import events
from tests.abuse.conftest import Run, refused
from tests.support.patches import random_site
from tests.support.store import small_patch

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\nerror: forged\u202egnp\u2028b\x9b31m\ud800"
STEERING = ("\x1b", "\x07", "\r", "\u202e", "\u2028", "\x9b")


def harmless(text: str) -> None:
    assert not [mark for mark in STEERING if mark in text]
    text.encode("utf-8")


def test_one_line_and_several() -> None:
    harmless(visible(EVIL))
    assert "\n" not in visible(EVIL)
    assert visible("ä 語 €") == "ä 語 €"
    assert visible("x" * 50, 10) == "x" * 10 + "… (40 more)"
    harmless(clean(EVIL))
    assert clean("a\n\tb") == "a\n\tb"


def test_a_file_name_in_an_error(run: Run, tmp_path: Path) -> None:
    result = run("add", str(tmp_path / "x\x1b]0;owned\x07\nerror: forged\u202e.safetensors"))
    refused(result, 1)
    harmless(result.err)
    assert sum(line.startswith("error:") for line in result.err.splitlines()) == 1


def test_names_in_a_header(run: Run, tmp_path: Path) -> None:
    """A site's name and the base's are held to their form; what is free is escaped where it is shown."""
    evil = "layers.0\x1b[31m\u202e.gate_proj"
    with pytest.raises(PatchFormatError):
        small_patch("v1").evolve(sites=(random_site(evil, 8, 4, neurons=3),))
    path = small_patch("v1").evolve(method={"note": evil}, data={evil: evil}).save(tmp_path / "x.safetensors")
    harmless(run("inspect", path).out)
    shown = run("inspect", path, "--json").out
    json.loads(shown)
    assert "\x1b" not in shown


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    logger = logging.getLogger("nest_runtime.abuse")
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(events.Escaped())
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    yield written
    logger.removeHandler(handler)


def test_a_log_line(stream: io.StringIO) -> None:
    logging.getLogger("nest_runtime.abuse").warning("following %s: %s", EVIL, NestError(EVIL))
    assert len(stream.getvalue().splitlines()) == 1
    harmless(stream.getvalue())


def test_a_sentence_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    events.sentence({"event": "warning", "message": EVIL})
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    harmless(said)


def test_the_demos_page() -> None:
    for made in (markup.text(f"<script>{EVIL}"), markup.alert(NestError(EVIL))):
        harmless(made)
        assert "<script>" not in made


@pytest.mark.parametrize("mark", ["\u200b", "\u2060", "\u2063", "\u00ad", "\u180e", "\U000e0041", "\ufff9"])
def test_characters_that_are_not_seen_are_shown(mark: str) -> None:
    """``v3`` with one of them inside looks like ``v3``."""
    assert visible(f"v{mark}3") == f"v{ascii(mark)[1:-1]}3"
    assert mark not in clean(f"v{mark}3")


@pytest.mark.parametrize("text", ["क्\u200dष", "می\u200cخواهم", "👩\u200d🔬", "naïve"])
def test_scripts_keep_what_they_are_written_with(text: str) -> None:
    assert visible(text) == clean(text) == text
