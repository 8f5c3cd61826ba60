"""Everything public in the package has a docstring, and functions of tensors tell their shapes."""

from __future__ import annotations

import ast
import re
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


SHAPE = re.compile(r"\[[^\]]+\]|\((?:[\w…·+ ]|\.{3})+,[^)]*\)|\bshapes?\b|\bscalar\b")
TENSOR = re.compile(r"Tensor\b|ndarray\b")


def shapeless(source: str) -> list[str]:
    """Public functions that take or give tensors, and whose docstrings tell no shape; tensors of callables aside."""
    missing = []
    for name, node in public(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            continue
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        kinds = [each.annotation for each in every if each.annotation] + ([node.returns] if node.returns else [])
        texts = [text for text in map(ast.unparse, kinds) if "Callable" not in text]
        if any(TENSOR.search(text) for text in texts) and not SHAPE.search(ast.get_docstring(node) or ""):
            missing.append(name)
    return missing


def test_what_tells_no_shape_is_found() -> None:
    told = (
        'def f(x: torch.Tensor) -> None:\n    """Take x [n, d]."""\ndef g(x: Tensor) -> int:\n    """Of (rows, n)."""\n'
    )
    untold = 'def h(x: np.ndarray) -> None:\n    """Take x (quickly)."""\n'
    assert shapeless(told + untold) == ["h"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_functions_of_tensors_tell_shapes(path: Path) -> None:
    assert shapeless(path.read_text(encoding="utf-8")) == []
