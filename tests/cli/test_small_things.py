"""What people stumble over first: how to leave, what a column cuts, which words an option takes."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nest_runtime.cli.commands.compare import DEFAULT_METHODS, CompareOptions
from nest_runtime.cli.commands.compare import _prompts as prompts_of
from nest_runtime.cli.common import prompts_named
from nest_runtime.demo.server import Listen, bind
from nest_runtime.errors import EngineError
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.ports import bind as bind_server
from nest_runtime.store.store import Store
from tests.support.cli import Run, fails
from tests.support.store import small_patch

pytest_plugins = ["tests.support.cli"]


def test_out_is_given_the_ending_and_not_a_second_one(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    given = ("train", "--harmful", prompts, "--benign", prompts, "--out", tmp_path / "a.pt")
    fails(run(*given), 2, f"write --out {tmp_path / 'a.safetensors'}\n")


def test_methods_are_not_cut_in_the_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.sub(r"[\s│]+", " ", run("compare", "--help").out)
    assert DEFAULT_METHODS.replace(",", ", ") in shown
    assert "…" not in shown


def test_a_date_stands_on_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    store = Store()
    store.add(small_patch("v1", name="a-name-that-is-rather-long-for-a-table"), who="somebody@with.a.long.name.example")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", run("history").out, re.MULTILINE)


def test_a_taken_port_is_told_in_one_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = []
        for take in (lambda: bind_server(ServeConfig(port=port)), lambda: bind(Listen(host="127.0.0.1", port=port))):
            with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1 is in use") as caught:
                take()
            assert isinstance(caught.value.__cause__, OSError)
            assert caught.value.__cause__.errno == errno.EADDRINUSE
            said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_taken_port_is_told_before_torch_is_imported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = ["serve", "--port", str(taken.getsockname()[1])]
        script = f"import sys; from nest_runtime.cli.main import main; print(main({given}), 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "is in use" in done.stderr
    assert done.stdout == "1 False\n"


def test_reference_names_prompts_wherever_prompts_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (len(prompts_named("reference", "harmful")), len(prompts_named("reference", "benign"))) == (602, 1343)
    files = dict.fromkeys(("suite", "data", "behaviors", "attacks", "judge", "limit"))
    compared = CompareOptions("tiny", "reference", "reference", **files, device="cpu", dtype="auto")
    assert [len(prompts) for prompts in prompts_of(compared)] == [602, 1343]
    monkeypatch.chdir(tmp_path)
    Path("reference").write_text("a file of that name\n")
    (tmp_path / "reference").rename(tmp_path / "reference.txt")
    assert len(prompts_named("reference.txt", "benign")) == 1


def test_collecting_tests_warns_of_nothing() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "tests/cli", "tests/store"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout.lower()


def test_a_file_that_is_no_patch_is_said_to_be_none(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("harm.csv").write_text("goal\nForge it\n")
    said = run("inspect", "harm.csv")
    fails(said, 1, "harm.csv ends with .csv; expected a patch's file, .safetensors")
    assert "did you mean" not in said.err  # it is what was typed
    Path("model.safetensors").write_bytes(b"GGUF" + bytes(range(200, 240)))
    fails(run("inspect", "model.safetensors"), 1, "it is a GGUF file")


def test_names_in_a_pipe_are_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "a-patch-whose-name-is-rather-long-for-a-column-of-a-table"
    Store().add(small_patch("v1", name=long))
    assert any(f"{long}@v1" in line for line in run("list").out.splitlines())
    assert any(f"{long}@v1" in line for line in run("history").out.splitlines())


def test_a_file_that_is_not_there_is_called_what_it_should_hold(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one\n")
    given = ("eval", "--no-patch", "--behaviors", tmp_path / "one.txt", "--attacks", tmp_path / "none.txt")
    fails(run(*given), 1, f"no such template file: {tmp_path / 'none.txt'}")
    fails(run("judge", tmp_path / "none.jsonl"), 1, f"no such answer file: {tmp_path / 'none.jsonl'}")


def test_names_of_other_tools_lead_to_ours(run: Run) -> None:
    fails(run("rm", "v1"), 2, "no such command 'rm'", "did you mean remove?")


def test_a_name_that_no_patch_can_have_is_refused_before_anything_loads(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("one\n")
    (tmp_path / "good.txt").write_text("two\n")
    given = ("--harmful", tmp_path / "bad.txt", "--benign", tmp_path / "good.txt", "--out", tmp_path / "a.safetensors")
    fails(run("train", *given, "--name", "bad name@x"), 2, "the name is 'bad name@x'; expected letters")
    fails(run("train", *given, "--version", "base"), 2, "it means no patch")
    assert not [*tmp_path.glob("a.*")]


def test_plan_counts_the_borderline_prompts_that_train_would_take(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("one\n")
    (tmp_path / "good.txt").write_text("two\nthree\n")
    given = ("--harmful", tmp_path / "bad.txt", "--benign", tmp_path / "good.txt", "--tflops", 1, "--gbps", 10)
    assert "1 harmful and 2 benign" in run("plan", *given, "--borderline", "none").out
    (tmp_path / "near.txt").write_text("four\n")
    assert "1 harmful and 3 benign" in run("plan", *given, "--borderline", tmp_path / "near.txt").out
    fails(run("plan", "--borderline", "none"), 2, "--borderline is given without --benign")


def test_the_public_half_signs_nothing(run: Run, tmp_path: Path) -> None:
    assert run("keygen", tmp_path).status == 0
    small_patch("v1").save(tmp_path / "v1.safetensors")
    signed = run("sign", tmp_path / "v1.safetensors", "--key", tmp_path / "nest.pub")
    fails(signed, 2, f"{tmp_path / 'nest.pub'} is a public key; expected the private key")
