"""Everything public in the package has a docstring, and functions of tensors tell their shapes and dtypes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nest_runtime"
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
LONGEST = 40  # words of a sentence
PARTS = re.compile(r"\n\s*\n|\n(?=\s*(?:Args|Returns|Raises|Yields|Attributes):|\s*[\w, ]+: |\s*[-*] )")
CODE = re.compile(r" {4}(?![\w, ]+: )")  # what a paragraph of code begins with, and no argument
TRIVIAL = 4  # lines of a function within a function that need no words


def public(node: ast.Module | ast.ClassDef, path: str = "") -> Iterator[tuple[str, Documented]]:
    """Public classes and functions of a module, and public methods of such classes, by dotted name."""
    for child in node.body:
        if isinstance(child, Documented) and not child.name.startswith("_"):
            yield path + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{path}{child.name}.")


def inner(node: ast.AST, path: str = "", *, inside: bool = False) -> Iterator[tuple[str, Documented]]:
    """Functions within functions whose names are public and whose bodies have more than ``TRIVIAL`` lines."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Documented):
            yield from inner(child, path, inside=inside)
            continue
        function = not isinstance(child, ast.ClassDef)
        lines = (child.end_lineno or 0) - child.body[0].lineno + 1
        if inside and function and not child.name.startswith("_") and lines > TRIVIAL:
            yield path + child.name, child
        yield from inner(child, f"{path}{child.name}.", inside=inside or function)


def undocumented(source: str) -> list[str]:
    """Names without a docstring, ``module`` among them."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["module"]
    return missing + [name for name, node in [*public(tree), *inner(tree)] if not ast.get_docstring(node)]


def test_what_has_no_docstring_is_found() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    assert undocumented(source) == ["A.f", "h"]
    assert undocumented("x = 1") == ["module"]


def test_functions_within_functions_count_unless_they_are_short() -> None:
    long, short = "\n        ".join(["x = 1"] * (TRIVIAL + 1)), "x = 1"
    source = f'"""M."""\ndef _f():\n    def g():\n        {long}\n    def h():\n        {short}\n'
    assert undocumented(source) == ["_f.g"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8")) == []


def wrapped(source: str) -> list[str]:
    """Names whose docstrings begin with more than one line."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Documented)]
    return [node.name for node in nodes if "\n" in (ast.get_docstring(node) or "").split("\n\n")[0]]


def test_a_summary_of_two_lines_is_found() -> None:
    assert wrapped('def f():\n    """One\n    two."""\ndef g():\n    """One.\n\n    Two.\n    """\n') == ["f"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_summaries_are_one_line(path: Path) -> None:
    assert wrapped(path.read_text(encoding="utf-8")) == []


def unsectioned(source: str) -> list[str]:
    """Names whose docstrings have a paragraph of results or errors that is no section."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Documented)]
    later = re.compile(r"\n\n(Raises|Returns) ")
    return [node.name for node in nodes if later.search(ast.get_docstring(node) or "")]


def test_a_paragraph_that_should_be_a_section_is_found() -> None:
    told = 'def g():\n    """One.\n\n    Raises:\n        E: why.\n    """\n'
    assert unsectioned('def f():\n    """One.\n\n    Raises E if so.\n    """\n' + told) == ["f"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_results_and_errors_are_sections(path: Path) -> None:
    assert unsectioned(path.read_text(encoding="utf-8")) == []


def overlong(source: str) -> list[str]:
    """Sentences of more than ``LONGEST`` words in docstrings; code counts as one word."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Documented | ast.Module)]
    parts = [part for node in nodes for part in PARTS.split(ast.get_docstring(node) or "") if not CODE.match(part)]
    plain = [re.sub(r"``[^`]*``|`[^`]*`", "code", " ".join(part.split())) for part in parts]
    return [one for part in plain for one in re.split(r"(?<=[.?!])[)]*\s+", part) if len(one.split()) > LONGEST]


def test_a_sentence_of_very_many_words_is_found() -> None:
    long = " ".join(["word"] * (LONGEST + 1))
    assert overlong(f'"""Short.\n\n{long}."""\n') == [f"{long}."]
    assert overlong(f'def f():\n    """One.\n\n    Args:\n        x: {long}.\n    """\n') == [f"x: {long}."]
    assert overlong(f'"""Short.\n\n    {long}\n\nShort."""\n') == []


@pytest.mark.parametrize(
    "path", [*sorted(PACKAGE.rglob("*.py")), PACKAGE.parent / "nest_verify.py"], ids=lambda path: path.name
)
def test_sentences_are_short(path: Path) -> None:
    assert overlong(path.read_text(encoding="utf-8")) == []


SHAPE = re.compile(r"\[[^\]]+\]|\((?:[\w…·+ ]|\.{3})+,[^)]*\)|\bshapes?\b|\bscalar\b")
DTYPE = re.compile(r"\b(?:u?int\d*|bool|float\d*|bfloat16|dtypes?|integers?|integer)\b")
TENSOR = re.compile(r"Tensor\b|ndarray\b")


def of_tensors(source: str, told: re.Pattern[str]) -> list[str]:
    """Public functions that take or give tensors, and whose docstrings lack what is told; not tensors of callables."""
    missing = []
    for name, node in public(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            continue
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        kinds = [each.annotation for each in every if each.annotation] + ([node.returns] if node.returns else [])
        texts = [text for text in map(ast.unparse, kinds) if "Callable" not in text]
        if any(TENSOR.search(text) for text in texts) and not told.search(ast.get_docstring(node) or ""):
            missing.append(name)
    return missing


def test_what_tells_no_shape_or_dtype_is_found() -> None:
    told = (
        'def f(x: torch.Tensor) -> None:\n    """Take x [n, d] int64."""\n'
        'def g(x: Tensor) -> int:\n    """Of (rows, n), in any dtype."""\n'
    )
    untold = 'def h(x: np.ndarray) -> None:\n    """Take x (quickly)."""\n'
    assert of_tensors(told + untold, SHAPE) == of_tensors(told + untold, DTYPE) == ["h"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_functions_of_tensors_tell_shapes_and_dtypes(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert of_tensors(source, SHAPE) == []
    assert of_tensors(source, DTYPE) == []
