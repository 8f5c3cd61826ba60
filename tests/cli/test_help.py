"""What ``--help`` teaches, what Tab offers, and that both name things that exist."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from nest_runtime.cli import complete
from nest_runtime.cli.main import app, main
from nest_runtime.store.store import Store
from tests.processes.test_cli import command
from tests.support.store import small_patch

ROOT = typer.main.get_command(app)


def walk(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups included."""
    for name, inner in group.commands.items():
        yield (*path, name)
        if hasattr(inner, "commands"):
            yield from walk(inner, (*path, name))


COMMANDS = [" ".join(words) for words in walk(ROOT)]


def found(name: str) -> Any:
    inner = ROOT
    for word in name.split():
        inner = inner.commands[word]  # type: ignore[attr-defined]
    return inner


def examples_of(name: str) -> list[str]:
    lines = (found(name).epilog or "").replace("\\\n\n", "").split("\n\n")
    return [line.replace(r"\[", "[") for line in lines if line.startswith("nest-runtime ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_the_parser_takes(name: str) -> None:
    lines = examples_of(name)
    assert max(map(len, (found(name).epilog or "").split("\n\n"))) <= 78
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        inner = ROOT
        while hasattr(inner, "commands"):
            inner = inner.commands[words.pop(0)]
        inner.make_context("nest-runtime", words)  # raises where an option or argument is wrong; runs nothing
    assert any(line.startswith(f"nest-runtime {name}") for line in lines)


def test_help_fits_eighty_columns_and_shows_no_type_beside_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ["", *COMMANDS]:
        assert main([*name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80, name
        assert "<bool>" not in text, name
        assert "Example" in text or not name, name
        assert "\x1b" not in text
        assert "-h " in text
    assert main(["list", "-h"]) == 0


def test_the_list_of_commands_says_what_each_does() -> None:
    for name in COMMANDS:
        text = (found(name).help or "").strip()
        assert len(text) > 20, name
        assert text.splitlines()[0].endswith((".", ":")) or "\n\n" not in text, name


def test_names_that_are_written_out_are_those_of_the_code() -> None:
    from nest_runtime.evaluate.suites import REFERENCE_SUITES
    from nest_runtime.model.load import _DEVICES, _DTYPES
    from nest_runtime.serve.served_patch import POLICIES

    assert [name for name, _ in complete.suites("")] == ["standard", "reference", *REFERENCE_SUITES]
    assert [name for name, _ in complete.devices("")] == list(_DEVICES)
    assert [name for name, _ in complete.dtypes("")] == ["auto", *_DTYPES]
    assert {name for name, _ in complete.swap_policies("")} == set(POLICIES)


def offered(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is offered after ``line``, whose last word is being typed."""
    monkeypatch.setenv("_NEST_RUNTIME_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("nest-runtime ch", ["chat", "channel"]),
        ("nest-runtime channel s", ["set", "show"]),
        ("nest-runtime export v1 --t", ["--to"]),
        ("nest-runtime export v1 --to ", ["peft", "merged", "vllm", "gguf"]),
        ("nest-runtime activate v", ["v1", "v2"]),
        ("nest-runtime diff v1 te", ["test@v1", "test@v2"]),
        ("nest-runtime chat --patch v2", ["v2"]),
        ("nest-runtime eval --suite jail", ["jailbreak-seen", "jailbreak-held-out"]),
        ("nest-runtime eval --attacks pre", ["prefix-injection", "prefill"]),
        ("nest-runtime eval --judge p", ["phrases"]),
        ("nest-runtime judge --judge l", ["local"]),
        ("nest-runtime eval --device c", ["cpu", "cuda"]),
        ("nest-runtime compare --methods base,lora-f", ["base,lora-ffn"]),
        ("nest-runtime compare --methods base,nest,n", ["base,nest,nest-loadings"]),
        ("nest-runtime plot v1 --kind n", ["neurons", "norms"]),
        ("nest-runtime reference prompts x --category w", ["weapons"]),
        ("nest-runtime chat --model ./", ["./tiny"]),
        ("nest-runtime channel show ./mirror st", ["stable"]),
        ("nest-runtime serve --swap-policy d", ["drain"]),
        ("nest-runtime serve --engine ", ["transformers", "generate", "vllm"]),
        ("nest-runtime train --control r", ["random"]),
        ("nest-runtime train --recipe p", ["paper"]),
        ("nest-runtime serve --expose v", ["v1", "v2"]),
        ("nest-runtime activate frobnicate", []),
    ],
)
def test_tab_offers_names(
    line: str,
    wanted: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nest_runtime.store import entries

    monkeypatch.setattr(entries, "builtin_patches_dir", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    for version in ("v1", "v2"):
        Store().add(small_patch(version))
    assert offered(line, capsys, monkeypatch) == wanted


def test_a_store_that_cannot_be_read_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no disk")

    monkeypatch.setattr(Store, "list", broken)
    assert complete.patches("") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_installed_script_works_in_a_real_bash(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "NEST_HOME": str(tmp_path / "nest"), "SHELL": "/bin/bash"}
    installed = subprocess.run(
        command("--install-completion", "bash"), env=environment, capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    (script,) = (tmp_path / ".bash_completions").iterdir()
    program = command()[0] if len(command()) == 1 else "nest-runtime"
    ask = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=(nest-runtime reference p); COMP_CWORD=2; "
        f"_nest_runtime_completion {shlex.quote(program)}; echo ${{COMPREPLY[@]}}"
    )
    answer = subprocess.run(
        ["bash", "--norc", "-c", ask], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.split() == ["prompts"]
