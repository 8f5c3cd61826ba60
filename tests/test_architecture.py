"""docs/architecture.md against the code: which package may import which, no circles, and functions that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nest_runtime"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(node: ast.AST) -> Iterator[str]:
    """The package's modules that some source imports when it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.ImportFrom) and child.module in MODULES:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in MODULES)
        yield from imported(child)


IMPORTS = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) - {name} for name, path in MODULES.items()}


def ranks() -> dict[str, int]:
    """Each package's line in the page's block, counted from the bottom."""
    block = PAGE.split("## Which package may import which")[1].split("```")[1]
    lines = [line for line in block.splitlines() if line.strip()]
    known = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    found: dict[str, int] = {}
    for rank, line in enumerate(reversed(lines)):
        for word in line.split():
            if word not in known:
                break
            found[word] = rank
    return found


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_package_has_a_line() -> None:
    assert {package(name) for name in MODULES} - {"", "__main__"} == set(ranks())


def test_imports_go_down_only() -> None:
    rank = ranks()
    upward = [
        f"{name} imports {other}"
        for name, found in IMPORTS.items()
        for other in found
        if package(name) in rank and package(other) in rank
        if package(name) != package(other) and rank[package(other)] >= rank[package(name)]
    ]
    assert not upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(IMPORTS) == []


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle for each module that is in one, as ``a > b > a``."""
    found = []
    for start in graph:
        ways = {start: start}
        todo = [start]
        while todo:
            here = todo.pop()
            for there in graph[here]:
                if there == start:
                    found.append(f"{ways[here]} > {start}")
                    todo.clear()
                    break
                if there not in ways:
                    ways[there] = f"{ways[here]} > {there}"
                    todo.append(there)
    return found


IMPORTERS = {  # folders of a package, and the modules outside of them that may import theirs
    "cli.commands": ("cli.main",),
    "demo.tabs": ("demo.app",),
    "demo.html": ("demo.app", "demo.results", "demo.tabs."),
    "serve.following": ("serve.app", "serve.vllm."),
    "serve.switching": ("cli.commands.", "doctor.", "serve.app", "serve.following.", "serve.http.", "serve.vllm."),
}


def test_folders_of_a_package_are_imported_by_those_above_them() -> None:
    for folder, above in IMPORTERS.items():
        inside = f"nest_runtime.{folder}."
        importers = {name for name, found in IMPORTS.items() if any(f"{one}.".startswith(inside) for one in found)}
        outside = {name.removeprefix("nest_runtime.") for name in importers if not f"{name}.".startswith(inside)}
        assert outside, f"nothing imports {folder}"
        assert {name for name in outside if not f"{name}.".startswith(above)} == set()


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
        "a > b > c > a",
        "b > c > a > b",
        "c > a > b > c",
    ]


DEFINED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
NAMED = sorted(set(re.findall(r"`(\w+)`[ (,]+`([\w/]+\.py)`", PAGE)))


@pytest.mark.parametrize(("name", "file"), NAMED)
def test_what_the_page_names_is_there(name: str, file: str) -> None:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, DEFINED)}


def test_the_page_names_functions_of_all_three_ways() -> None:
    assert len(NAMED) >= 25
