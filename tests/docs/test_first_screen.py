"""README's first screen: what it is in two sentences, a picture of real answers, commands, figures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.docs.test_prose import sentences

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST = README[: README.index("## Talk to the server")]


def test_it_says_what_it_is_in_two_sentences_and_shows_it() -> None:
    first = FIRST.split("\n\n")[1]
    assert len(sentences(first.replace(":", ""))) == 2
    picture, first_block = FIRST.index("docs/pictures/two-answers.svg"), FIRST.index("```bash")
    table = FIRST.index("| SmolLM2-135M-Instruct")
    assert FIRST.index("safety patch") < picture < first_block < table


def test_the_picture_is_of_both_answers_and_names_its_command() -> None:
    root = ElementTree.parse(ROOT / "docs" / "pictures" / "two-answers.svg").getroot()
    words = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text"))
    assert "smollm2-135m-instruct" in words
    assert words.count("Base, no patch: answered") == 2
    assert "Patch v2: refused" in words
    assert "Patch v2: answered" in words
    assert "python benchmarks/two_answers.py" in FIRST
    assert (ROOT / "benchmarks" / "two_answers.py").is_file()


def test_what_people_look_for_in_a_repository_is_there() -> None:
    for name in ("SECURITY.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "CHANGELOG.md", "examples/README.md"):
        assert (ROOT / name).is_file(), name
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.ipynb")]:
        assert path.name in listed


def test_contributing_names_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|nest_runtime|benchmarks|\.ci)/[\w./-]+)`", text)
    named += re.findall(r"(?<=[ ])(tests/[\w./-]+)(?= |`|,)", text)
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_citation_names_this_version() -> None:
    import nest_runtime

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'version: "{nest_runtime.__version__}"' in text
    assert "2602.16835" in text
