"""schemathesis, a client that nobody here wrote, reads /openapi.json and asks everything that it allows and forbids.

No answer may be a server error; every answer must have a status, a type and a shape that the schema
names; data that the schema forbids must be refused; and nothing of the admin API opens without a token.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nest_runtime.serve import Limits, ServeConfig
from tests.support.serve import TOKEN, Running, serving

pytest.importorskip("schemathesis")
pytest_plugins = ["tests.support.fixtures_serve"]

ROOT = Path(__file__).parent.parent.parent
# Not asked: that whatever the schema allows is accepted. Some settings are refused by name (docs/guide/operations.md).
EXCLUDED = "positive_data_acceptance"


def attack(server: Running, examples: int, phases: str, folder: Path) -> str:
    """What the tool prints; fails where it finds something."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    options = {
        "--header": f"Authorization: Bearer {TOKEN}",
        "--exclude-checks": EXCLUDED,
        "--max-examples": str(examples),
        "--phases": phases,
        "--seed": "1",
        "--workers": "1",
        "--warnings": "off",
    }
    hooks = {"SCHEMATHESIS_HOOKS": "tests.clients.schemathesis_hooks", "NEST_MODEL": server.name}
    done = subprocess.run(
        [*command, *(word for pair in options.items() for word in pair)],
        env={**os.environ, **hooks, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def guarded(config: ServeConfig, files: dict[str, str]) -> ServeConfig:
    limits = Limits(max_tokens=4, max_choices=4, cache_tokens=4096, batch_tokens=128)
    return replace(config, limits=limits, expose=(files["v2"],))


def test_nothing_that_a_client_can_send_breaks_the_server(guarded: ServeConfig, tmp_path: Path) -> None:
    with serving(guarded) as server:
        out = attack(server, 5, "examples,fuzzing", tmp_path)
        assert "15 passed" in out or "15 selected" in out, out
        assert server.server.service.engine.alive
        assert server.server.audit.intact()
        assert server.client().models.list().data


@pytest.mark.slow
def test_nothing_that_a_client_can_send_breaks_the_server_at_length(guarded: ServeConfig, tmp_path: Path) -> None:
    with serving(guarded) as server:
        attack(server, 100, "examples,coverage,fuzzing", tmp_path)
        assert server.server.service.engine.alive
        assert server.server.audit.intact()
