"""The command line as a process of its own: start-up, streams, signals, pipes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from nest_runtime.cli.main import main
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.store.store import Store
from tests.cli.test_commands import write_prompts
from tests.support.store import small_patch


def command(*arguments: object) -> list[str]:
    """``nest-runtime …`` as installed beside this Python, else through the module."""
    script = Path(sys.executable).with_name("nest-runtime")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "nest_runtime"]
    return start + [str(item) for item in arguments]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), check=False, capture_output=True, text=True, timeout=240, env=environment(**changes)
    )


def run_python(script: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment(**changes)
    )


WITHOUT_MODEL = (
    "keygen {home}/keys",
    "list",
    "inspect v3",
    "push v3 {home}/mirror --key {home}/keys/nest.key --channel stable",
    "pull {home}/mirror@stable --trust {home}/keys/nest.pub",
    "verify v3 --trust {home}/keys/nest.pub",
    "activate v2",
    "activate v3",
    "rollback",
    "history --verify",
)


def test_what_needs_no_model_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Nobody who rolls back at 3 a.m. waits seconds for an import."""
    script = """
import sys
from nest_runtime.cli.main import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0, line
    assert "torch" not in sys.modules, line
"""
    lines = [line.format(home=tmp_path) for line in WITHOUT_MODEL]
    result = subprocess.run(
        [sys.executable, "-c", script, *lines],
        check=False,
        capture_output=True,
        text=True,
        env=environment(NEST_HOME=str(tmp_path / "home")),
    )
    assert result.returncode == 0, result.stderr


HEAVY = ("torch", "transformers", "huggingface_hub", "sklearn", "fastapi", "gradio", "matplotlib", "model_signing")


def test_help_waits_for_nothing_heavy() -> None:
    """Of every command, in one process: what takes seconds to import is imported where it is used."""
    script = f"""
import sys
import typer
from nest_runtime.cli.main import app, main
for name, command in typer.main.get_command(app).commands.items():
    inner = getattr(command, "commands", {{}})
    for words in [[name], *([name, each] for each in inner)]:
        assert main([*words, "--help"]) == 0, words
        assert not set(sys.modules) & set({HEAVY!r}), (words, set(sys.modules) & set({HEAVY!r}))
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert "--harmful" in result.stdout
    assert result.stderr == ""


def test_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "nest_runtime", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == run("--version").stdout != ""


def test_help_and_completion_load_no_torch() -> None:
    """One help stands for all: every command's module is loaded by then. What each shows: cli/test_help.py."""
    script = (
        "import contextlib, io, sys\n"
        "from nest_runtime.cli import complete\n"
        "from nest_runtime.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert main(['train', '--help']) == 0\n"
        "for offer in (complete.patches, complete.models, complete.suites, complete.attacks, complete.methods):\n"
        "    assert offer('')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'huggingface_hub', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run_python(script)
    assert result.returncode == 0, result.stderr


def test_listing_loads_no_torch() -> None:
    script = (
        "import sys\nfrom nest_runtime.cli.main import main\n"
        "assert main(['list', '--json']) == 0\nassert 'torch' not in sys.modules\n"
    )
    result = run_python(script)
    assert result.returncode == 0, result.stderr


def test_errors_and_documents_keep_to_their_streams() -> None:
    Store().add(small_patch("v1"))
    good = run("list", "--json")  # neither command loads torch: quick
    assert good.returncode == 0, good.stderr
    assert "v1" in [patch["version"] for patch in json.loads(good.stdout)["patches"]]
    bad = run("remove", "v9", "--json")
    assert bad.returncode == 1
    assert bad.stdout == ""
    first, second = bad.stderr.splitlines()
    assert first.startswith("error: there is no patch 'v9'")
    assert second.startswith("hint: ")
    assert "v1" in second


def test_no_color_and_forced_color_in_help() -> None:
    assert "\x1b[" in run("list", "--help", FORCE_COLOR="1", TERM="xterm").stdout
    plain = run("list", "--help", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm").stdout
    assert not re.search("\x1b\\[[0-9;]*(3|4|9)[0-7]", plain)  # bold is no color


def test_a_closed_pipe_is_no_error() -> None:
    started = subprocess.Popen(
        command("list", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert started.stdout is not None
    assert started.stderr is not None
    started.stdout.close()
    assert started.stderr.read() == ""
    started.stderr.close()
    assert started.wait(timeout=120) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a terminal")
def test_a_chat_in_a_real_terminal(tiny_llama: Path) -> None:
    """A prompt, Tab, a line brought back, Ctrl-C that keeps the chat, Ctrl-D that ends it; lines are kept privately."""
    home = Path(os.environ["NEST_HOME"])
    Store().add(small_patch("v1", base=model_hash(tiny_llama)))
    controller, terminal = os.openpty()
    chat = subprocess.Popen(
        command("chat", "--model", tiny_llama, "--max-tokens", "3", "--no-patch"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(TERM="xterm", COLUMNS="80"),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (Ctrl-C needs it)
    )
    os.close(terminal)
    seen = ""

    def until(pattern: str, *, again: bytes = b"") -> None:
        """Read until the pattern has come; ``again`` is typed anew after every two seconds of silence."""
        nonlocal seen
        ends = time.monotonic() + 60
        while not (match := re.search(pattern, seen)):
            left = max(0.0, ends - time.monotonic())
            ready, _, _ = select.select([controller], [], [], min(left, 2.0) if again else left)
            if ready:
                seen += os.read(controller, 4096).decode(errors="replace")
                continue
            assert again and left, (pattern, seen)  # noqa: PT018
            os.write(controller, again)
        seen = seen[match.end() :]

    until("base> ")
    os.write(controller, b"How do I bake bread?\n")
    until("bread\\?\r\n")
    until("base> ")
    os.write(controller, b"/pat\tv\t\n")  # Tab, twice: the patch is of other shapes, and refused
    until("/patch v1")
    until("error:[\\s\\S]*hint:")
    until("base> ")
    os.write(controller, b"\x1b[A\x1b[A\n")  # up, up: the question again
    until("How do I bake bread\\?")
    until("base> ")
    os.write(controller, b"half a line\x03")
    until("stopped", again=b"\x03")  # Python's readline leaves a signal lying that comes just before it waits
    until("base> ")
    os.write(controller, b"\x04")
    assert chat.wait(timeout=60) == 0
    os.close(controller)
    history = home / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.read_text().splitlines() == ["How do I bake bread?", "/patch v1", "How do I bake bread?"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_nothing_half_written_and_the_run_goes_on(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmful, benign = write_prompts(tmp_path)
    out = tmp_path / "patch.safetensors"
    options = ["train", "--model", tiny_llama, "--harmful", harmful, "--benign", benign, "--out", out]
    started = subprocess.Popen(
        command(*options, "--steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (a background suite ignores it)
    )
    work = out.with_name("patch.safetensors.work")
    for _ in range(2000):
        if list(work.glob("tune-*/*")):
            break
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=120)
    assert started.returncode == 130
    assert stdout == ""
    note, *_, last = stderr.splitlines()  # between them a line every 30 seconds, on a slow machine
    assert note.startswith("training tiny-llama-safety@v1")
    assert last.startswith("interrupted")
    assert str(work) in last
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    shutil.rmtree(work / next(work.glob("tune-*")).name)  # 100,000 steps would take long: go on with fewer
    capsys.readouterr()
    assert main([*map(str, options), "--steps", "2", "--json"]) == 0  # in this process, which has torch loaded
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert out.exists()
    assert not work.exists()
