"""Every module, class and public function of the package says what it does, in a sentence that begins its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nest_runtime"
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(node: ast.Module | ast.ClassDef, path: str = "") -> Iterator[tuple[str, Documented]]:
    """Public classes and functions of a module, and public methods of such classes, by dotted name."""
    for child in node.body:
        if isinstance(child, Documented) and not child.name.startswith("_"):
            yield path + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{path}{child.name}.")


def undocumented(source: str) -> list[str]:
    """Names without a docstring, ``module`` among them."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["module"]
    return missing + [name for name, node in public(tree) if not ast.get_docstring(node)]


def test_what_has_no_docstring_is_found() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    assert undocumented(source) == ["A.f", "h"]
    assert undocumented("x = 1") == ["module"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8")) == []
