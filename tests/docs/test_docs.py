"""The documentation against the code: the Python reference names what is there, and every link leads somewhere.

The site itself is built strictly by CI (`mkdocs build --strict`), which needs the extra ``docs``.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nest_runtime

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
REFERENCES = [
    (page.name, name)
    for page in (ROOT / "docs" / "reference" / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def resolved(name: str) -> Any:
    """The object of a dotted name, its module found first."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_the_reference_names_what_is_there_and_explained() -> None:
    for page, name in REFERENCES:
        assert (resolved(name).__doc__ or "").strip(), (page, name)


def test_every_public_name_is_in_the_reference() -> None:
    shown = [resolved(name) for _, name in REFERENCES]
    modules = [item for item in shown if hasattr(item, "__path__") or type(item).__name__ == "module"]
    for name in nest_runtime.__all__:
        if name.startswith("__"):
            continue
        public = getattr(nest_runtime, name)
        if isinstance(public, ModuleType):  # a package that can be called
            public = getattr(import_module(f"{public.__name__}.api"), name)
        within = any(public.__module__ == module.__name__ for module in modules)
        assert within or any(public is item for item in shown), name


@pytest.mark.parametrize(
    "page", [*PAGES, *TOP, *sorted(ROOT.glob("examples/*.md"))], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            heads = re.findall(r"^#+ +(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
            assert anchor in slugs, target
