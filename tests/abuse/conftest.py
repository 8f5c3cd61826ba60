"""The command line as a user has it, with a home of its own and none of the package's patches."""

from __future__ import annotations

from pathlib import Path

import pytest

from nest_runtime.store import entries
from tests.support.cli import Result, Run, command_line
from tests.support.store import small_patch
from tests.support.trust import Keys, make_keys


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``$NEST_HOME``, and no patches of the package."""
    folder = tmp_path / "builtin"
    folder.mkdir()
    monkeypatch.setattr(entries, "builtin_patches_dir", lambda: folder)
    monkeypatch.delenv("NEST_KEY_PASSPHRASE", raising=False)
    made = tmp_path / "nest-home"
    made.mkdir()
    return made


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return command_line(capsys)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """The publisher's key pair, ``release``, and a stranger's, ``other``."""
    return make_keys(tmp_path_factory.mktemp("abuse-keys"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three versions of one patch, unsigned."""
    return {v: small_patch(v, seed=int(v[1])).save(tmp_path / f"{v}.safetensors") for v in ("v1", "v2", "v3")}


def refused(result: Result, status: int, *words: str) -> None:
    """A refusal is two lines on stderr, nothing on stdout, and its exit status."""
    lines = result.err.splitlines()
    assert result.status == status, result
    assert [line.partition(":")[0] for line in lines[-2:]] == ["error", "hint"], result
    assert result.out == ""
    for word in words:
        assert word in result.err, result
