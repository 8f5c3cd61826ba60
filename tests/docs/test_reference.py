"""The pages that come from the code, and the help of every command, are what the code says now.

After a change that is meant: ``python docs/make_reference.py``, and look at the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pages import reference

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["docs/reference/cli.md", "docs/reference/settings.md", "tests/cli/help.txt"])
def test_what_is_committed_is_what_is_generated(path: str) -> None:
    made = reference().pages()
    assert set(made) == {"docs/reference/cli.md", "docs/reference/settings.md", "tests/cli/help.txt"}
    committed = (ROOT / path).read_text(encoding="utf-8")
    assert committed == made[path], "run: python docs/make_reference.py"
