"""Patches find the base they were made on, and what to do next names the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nest_runtime.io import nest_home
from nest_runtime.model.bases import bases_file, remember_base
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.model.load import known_base, load_model
from tests.conftest import save_tiny
from tests.support.cli import Run, fails
from tests.support.patches import make_patch

pytest_plugins = ["tests.support.cli"]


def prompts(folder: Path) -> list[object]:
    for name, thing in (("bad", "bomb"), ("good", "cake")):
        rows = [{"prompt": f"How do I make {thing} number {n}?", "response": "Mix it."} for n in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--harmful", folder / "bad.jsonl", "--benign", folder / "good.jsonl"]


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model of this test's own, which it may change; its path has a space in it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "my models" / "mine"))


def test_a_patch_finds_the_base_it_was_trained_on(run: Run, base: Path, tmp_path: Path) -> None:
    files, out = prompts(tmp_path), tmp_path / "p.safetensors"
    made = run("train", "--model", base, *files, "--steps", "1", "--out", out)
    assert made.status == 0, made.err
    flag = f"--model '{base}'"
    assert f"next: nest-runtime chat {flag} --patch {out}" in made.err

    answered = run("chat", "--patch", out, "--max-tokens", "2", "--json", "hello")
    assert answered.status == 0, answered.err
    assert answered.document["model"] == "mine"
    assert str(base) in answered.err
    case = ["--behaviors", tmp_path / "bad.jsonl", "--judge", "phrases", "--limit", "1", "--max-tokens", "1"]
    measured = run("eval", "--patch", out, *case)
    assert measured.status == 0, measured.err
    assert f"next: nest-runtime serve --patch {out} {flag}" in measured.err
    written = run("export", out, "--to", "merged", "--no-check", "--out", tmp_path / "merged")
    assert written.status == 0, written.err
    added = run("add", out)
    assert f"next: nest-runtime serve --patch mine-safety@v1 {flag}" in added.err
    stored = run("chat", "--patch", "mine-safety@v1", "--max-tokens", "1", "--json", "hello")
    assert stored.document["model"] == "mine"
    again = run("train", "--from", "mine-safety@v1", *files, "--steps", "1", "--out", tmp_path / "q.safetensors")
    assert again.status == 0, again.err


def test_a_model_that_is_named_is_taken(run: Run, base: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    loaded = load_model(base)
    out = make_patch(loaded.model, base_hash=loaded.hash, base_model="mine").save(tmp_path / "p.safetensors")
    assert known_base(loaded.hash) == str(base)
    fails(run("chat", "--model", tiny_qwen, "--patch", out, "hello"), 3, loaded.hash)
    assert run("chat", "--model", "reference", "--patch", out, "hello").status != 0


def test_a_base_that_is_not_known_is_named_and_one_that_changed_is_not_used(
    run: Run, base: Path, tmp_path: Path
) -> None:
    loaded = load_model(base)
    patch = make_patch(loaded.model, base_hash=model_hash(base), base_model="mine")
    out = patch.save(tmp_path / "p.safetensors")
    fails(run("chat", "--patch", out, "hello"), 3, f"mine ({patch.base_hash})", "not seen", "--model")

    remember_base(patch.base_hash, "mine", base)
    assert known_base(patch.base_hash) == str(base)
    save_tiny(base, "LlamaForCausalLM", "LlamaConfig", seed=9)
    assert known_base(patch.base_hash) is None
    fails(run("chat", "--patch", out, "hello"), 3, str(base), "holds it no more")
    shutil.rmtree(base)
    fails(run("eval", "--patch", out, "--behaviors", tmp_path / "none.txt"), 3, str(base))


def test_notes_that_cannot_be_read_or_written_are_no_error(base: Path) -> None:
    found = load_model(base).hash
    for text in ("", "{", "[]", '{"version": 1}', '{"version": 1, "bases": {"x": 3}}', '{"version": 2, "bases": {}}'):
        bases_file().write_text(text)
        assert known_base(found) is None
    remember_base(found, "mine", base)
    assert known_base(found) == str(base)
    shutil.rmtree(nest_home())
    nest_home().write_text("a file")
    remember_base(found, "mine", base)
    assert known_base(found) is None


def test_a_gguf_file_is_found_again(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.support.gguf import write_gguf

    path = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    assert known_base(load_model(path).hash) == str(path)


def test_a_snapshot_of_the_hub_is_remembered_by_its_commit(tmp_path: Path) -> None:
    remember_base("sha256:1", "org/name", tmp_path / "snapshots" / "abc")
    assert json.loads(bases_file().read_text())["bases"]["sha256:1"]["path"] == "org/name@abc"


def test_the_reference_model_is_the_default_and_is_not_noted(run: Run) -> None:
    answered = run("chat", "--patch", "v3", "--max-tokens", "4", "--json", "hello")
    assert answered.document["model"] == "reference"
    assert not bases_file().exists()


def test_what_comes_next_names_the_model(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    files = prompts(tmp_path)
    located = run("locate", "--model", tiny_llama, *files, "--out", tmp_path / "sites.json")
    assert f"next: nest-runtime train --model {tiny_llama} --harmful {tmp_path / 'bad.jsonl'}" in located.err
    speed = ["--tflops", "1", "--gbps", "10"]
    assert (
        f"next: nest-runtime train --model {tiny_llama} --harmful FILE"
        in run("plan", "--model", tiny_llama, *speed).err
    )
    assert "next: nest-runtime train --harmful FILE" in run("plan", *speed).err
    own = run("plan", *speed, "--recipe", "fast", "--steps", "20", "--z", "2").err
    assert "FILE --benign FILE --recipe fast --z 2.0 --steps 20 --out v1.safetensors" in own
    assert "next:" not in run("plan", *speed, "--quiet").err
