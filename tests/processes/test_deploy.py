"""The files that run a server elsewhere: they name options that exist, and the health check tells life from death."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
import yaml

from nest_runtime.cli.main import app
from nest_runtime.serve import ServeConfig
from tests.support.serve import serving

pytest_plugins = ["tests.support.fixtures_serve"]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def variables() -> set[str]:
    """The environment variables that ``serve`` reads."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option.envvar or f"NEST_SERVE_{option.name.upper()}" for option in serve.params}


@pytest.mark.parametrize(
    "path", ["Dockerfile", "deploy/compose.yaml", "deploy/nest-runtime.service", "deploy/healthcheck.py"]
)
def test_variables_are_options_of_serve(path: str) -> None:
    named = set(re.findall(r"NEST_SERVE_[A-Z_]*[A-Z]", (ROOT / path).read_text(encoding="utf-8")))
    assert named
    assert named <= variables(), named - variables()


def test_the_image_copies_what_is_there_and_runs_as_nobody_in_particular() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert any(source.startswith(kept.removeprefix("!")) for kept in ignored if kept.startswith("!")), (
                    source
                )
    last = "\n".join(lines[max(number for number, line in enumerate(lines) if line.startswith("FROM")) :])
    assert re.search(r"^USER 10001$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    wheel = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in re.findall(r'^"?([a-z/]+)"? = "nest_runtime/_(?!_)', wheel, re.MULTILINE):
        assert f"COPY {folder} {folder}" in "\n".join(lines), folder


def test_compose_keeps_a_server_and_a_follower_apart() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert services["follower"]["environment"]["NEST_SERVE_REQUIRE_SIGNATURE"] == "1"
    assert "NEST_SERVE_FOLLOW" in services["follower"]["environment"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "nest-runtime.service"
    text = (DEPLOY / "nest-runtime.service").read_text(encoding="utf-8")
    unit.write_text(
        text.replace("/opt/nest-runtime/bin/nest-runtime", sys.executable).replace("User=nest", "User=root")
    )
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "nest-runtime.service" not in done.stderr


def test_the_health_check_tells_a_server_from_none(config: ServeConfig) -> None:
    def check(port: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, DEPLOY / "healthcheck.py"],
            env={**os.environ, "NEST_SERVE_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    with serving(replace(config, admin_token_file=None)) as server:
        alive = check(int(server.url.rpartition(":")[2]))
        assert alive.returncode == 0, alive.stderr
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        dead = check(unheard.getsockname()[1])
    assert dead.returncode == 1
    assert "unhealthy" in dead.stderr


def test_the_install_script_takes_what_the_image_gives_it(tmp_path: Path) -> None:
    """Its lines, with pip replaced by an echo: torch is the tested one, and the package comes with its extras."""
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)

    def said(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(DEPLOY / "install.sh"), *words]
        environment = {**os.environ, "VENV": str(tmp_path)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    tested = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested is not None
    assert f"torch=={tested[1]} --index-url https://download.pytorch.org/whl/cpu" in said("torch", "cpu").stdout
    assert "whl/cpu" not in said("torch", "cuda").stdout
    assert said("package", "sign").stdout == "install -c constraints.txt .[sign]\n"
    assert said("package", "").stdout == "install -c constraints.txt .\n"
    assert said("torch", "rocm").returncode == 2
