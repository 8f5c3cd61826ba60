"""examples/: every script as its users start it, every notebook from top to bottom, on the reference model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nest_runtime as nest
from nest_runtime.serve import Limits, ServeConfig
from tests.support.serve import serving

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 280  # for one script, on a busy machine
pytestmark = pytest.mark.timeout(2 * SECONDS + 40)  # the longest runs two
COVERED = {"patch_in_python", "peft_beside_a_patch", "openai_client", "train_from_csv", "evaluate_a_patch"}


def started(name: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script that has ended."""
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def run(name: str, *arguments: object, folder: Path) -> str:
    """What a script prints on stdout; it must end well."""
    done = started(name, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == COVERED
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 70, path.name


def test_patch_in_python(tmp_path: Path) -> None:
    lines = run("patch_in_python", folder=tmp_path).splitlines()
    base, patched, again = (line.partition(":")[2].strip() for line in lines)
    assert "whistle" in base
    assert patched.startswith("Sorry")
    assert again == base


def test_peft_beside_a_patch(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    said = run("peft_beside_a_patch", folder=tmp_path)
    assert said.count("moves the logits") == 3
    assert "up to 0.000" not in said
    assert "neither: the base, bit for bit" in said


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("patch_in_python", ["nowhere"], "nowhere"),
        ("evaluate_a_patch", ["reference", "v33"], "there is no patch 'v33'"),
        ("evaluate_a_patch", ["reference", "v3", "many"], "invalid int value"),
        ("train_from_csv", ["reference", "none.csv"], "none.csv"),
        ("openai_client", ["http://127.0.0.1:9"], "is a server running there?"),
        ("peft_beside_a_patch", ["a", "b"], "unrecognized arguments: b"),
        ("peft_beside_a_patch", ["nowhere"], "nowhere is no folder of an adapter"),
    ],
)
def test_a_wrong_argument_gets_an_error_and_no_traceback(
    name: str, wrong: list[str], said: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    done = started(name, *wrong, folder=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(said) == 1
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.fixture
def url() -> Iterator[str]:
    config = ServeConfig(
        model="reference",
        patch="v3",
        expose_base=True,
        port=0,
        limits=Limits(cache_tokens=4096, batch_tokens=128, drain_seconds=5),
    )
    with serving(config) as running:
        yield running.url


def test_openai_client(url: str, tmp_path: Path) -> None:
    said = run("openai_client", url, folder=tmp_path)
    assert "reference, patch v3: Sorry, I can't do that." in said
    assert "reference@base, patch base: Warning: to forge" in said
    assert said.splitlines()[-1].startswith("Sorry, I can't do that.")


def test_train_from_csv_and_evaluate_a_patch(tmp_path: Path) -> None:
    said = run("train_from_csv", folder=tmp_path)
    patch = nest.load_patch(tmp_path / "my.safetensors")
    assert f"{patch.parameters:,} trained numbers, {patch.digest[:19]}" in said
    assert "nest-runtime serve --model reference --patch my.safetensors" in said
    measured = run("evaluate_a_patch", "reference", tmp_path / "my.safetensors", 6, folder=tmp_path)
    assert measured.startswith("my-safety@v1")
    assert "| jailbreak-held-out |" in measured
    assert "attack success, all suites: between" in measured


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra test)")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra test)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra test)")
    book = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in book.cells), "kept without outputs: figures of one machine"
    client = nbclient.NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()
    said = "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/markdown", ""))
        for cell in book.cells
        for output in cell.get("outputs", [])
    )
    wanted = {"two_answers": "restored bit for bit: True", "train_a_patch": "bytes; True"}
    assert wanted[path.stem] in said
