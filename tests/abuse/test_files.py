"""Paths that are no files, files that do not end, modes, and folders that cannot be written."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nest_runtime.compare.methods.registry import read_settings
from nest_runtime.evaluate.attacks import read_templates
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.io import atomic_write, check_folder, check_writable, lines_of, read_bytes, replacing, write_json
from nest_runtime.prompts.readers import read_rows
from nest_runtime.trust.material import material_paths
from tests.abuse.conftest import Run, refused
from tests.support.trust import Keys

SECONDS = 120
KINDS = ("pipe", "socket", "folder", "endless", "device")


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test hangs, and none takes the machine's memory."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def special(path: Path, kind: str) -> Path:
    """Something at a path that is no file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else "/dev/tty")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_for_a_patch(run: Run, keys: Keys, tmp_path: Path, kind: str) -> None:
    path = special(tmp_path / "x.safetensors", kind)
    trust = keys.mine.with_suffix(".pub")
    for command in (("verify", path, "--trust", trust), ("sign", path, "--key", keys.mine), ("add", path)):
        result = run(*command)
        refused(result, result.status)
        assert result.status in (1, 2, 3), result


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_for_a_signature_or_manifest(
    run: Run, keys: Keys, files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    for number in (0, 1):
        assert run("sign", files["v1"], "--key", keys.mine).status == 0
        path = special(material_paths(files["v1"])[number], kind)
        for command in (("verify", files["v1"], "--trust", keys.mine.with_suffix(".pub")), ("add", files["v1"])):
            result = run(*command)
            refused(result, result.status)
            assert result.status in (1, 3), result
        path.rmdir() if kind == "folder" else path.unlink()


def test_a_signature_that_is_a_link_to_nowhere_is_not_unsigned(run: Run, keys: Keys, files: dict[str, Path]) -> None:
    for path in material_paths(files["v1"]):
        path.symlink_to("nowhere")
    assert run("add", files["v1"]).status == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_for_a_key(run: Run, keys: Keys, files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = special(tmp_path / "k.key", kind)
    refused(run("sign", files["v1"], "--key", path), 2, "k.key", "cannot be read")
    refused(run("verify", files["v1"], "--trust", path), 2, "k.key", "cannot be read")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["channels/stable.json", "channels/stable.sig", "revocations.json", "manifest.json"])
def test_no_file_in_a_mirror(
    run: Run, keys: Keys, files: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    place = tmp_path / "mirror"
    assert run("push", files["v1"], place, "--key", keys.mine, "--channel", "stable").status == 0
    special(place / name, kind)
    result = run("pull", f"{place}@stable", "--trust", keys.mine.with_suffix(".pub"), "--require-signature")
    if not (kind == "folder" and name in ("revocations.json", "manifest.json")):  # which a mirror may lack at its root
        refused(result, result.status)
        assert result.status in (1, 3), result


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_for_prompts_templates_and_results(tmp_path: Path, kind: str) -> None:
    from nest_runtime.errors import DataError

    with pytest.raises(DataError):
        read_rows(special(tmp_path / "prompts.txt", kind))
    with pytest.raises(DataError):
        read_templates(special(tmp_path / "templates.jsonl", kind))
    with pytest.raises(DataError):
        EvalResult.load(special(tmp_path / "eval.json", kind))
    with pytest.raises(DataError):
        read_settings(special(tmp_path / "settings.json", kind))


def test_a_file_that_grows_and_a_link_where_none_may_be(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than the 4 bytes"):
        read_bytes(path, 4)
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="it is a link"):
        read_bytes(tmp_path / "link", 5, follow=False)
    with pytest.raises(OSError, match="more than"):
        read_bytes("/proc/self/status", 10)  # which says that it has no bytes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_the_umask_holds_whoever_writes(tmp_path: Path, umask: int) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "plain", b"x")
        atomic_write(tmp_path / "secret", "x", secret=True)
        write_json(tmp_path / "sites.json", {})
        with replacing(tmp_path / "adapter") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    usual = 0o666 & ~umask
    assert modes == {"plain": usual, "secret": 0o600, "sites.json": usual, "adapter": usual}


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            atomic_write(tmp_path / "file", b"x" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["folder", "pipe", "endless"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A command that runs as root with ``--out /dev/null`` must not take the device's place."""
    target = special(tmp_path / "out", kind)
    for write in (lambda: atomic_write(target, b"x"), lambda: check_writable(target)):
        with pytest.raises(OSError, match="expected a file"):
            write()
    check_writable(tmp_path / "new.json")
    check_folder(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


NOWHERE = "/sys/nest-runtime"  # where nobody may write, root neither


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--out", f"{NOWHERE}.json"),
        ("eval", "--out", "{folder}"),
        ("eval", "--workdir", NOWHERE),
        ("train", "--harmful", "{prompts}", "--benign", "{prompts}", "--out", f"{NOWHERE}.safetensors"),
        ("locate", "--harmful", "{prompts}", "--benign", "{prompts}", "--out", f"{NOWHERE}.json"),
        ("plot", "v3", "--out", NOWHERE),
        ("compare", "--out", NOWHERE),
        ("export", "{patch}", "--to", "peft", "--no-check", "--out", NOWHERE),
    ],
    ids=lambda command: f"{command[0]} {command[-2]} {command[-1]}",
)
def test_what_cannot_be_written_is_found_before_the_work(
    run: Run, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    from nest_runtime.model import load as models

    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the work has begun"))
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\n")
    given = [word.format(folder=tmp_path, prompts=prompts, patch=files["v1"]) for word in command]
    result = run(*given)
    refused(result, result.status, given[-1].removesuffix("/nest-runtime"))
    assert result.status in (1, 2), result


def test_no_home_and_no_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEST_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    refused(run("list"), 2, "set NEST_HOME")


@pytest.mark.parametrize("ref", ["~nosuch/x.safetensors", "~nosuch/mirror@v1"])
def test_a_home_of_nobody(run: Run, ref: str) -> None:
    refused(run("add" if ref.endswith("s") else "pull", ref), 2, "~nosuch")


def test_lines_end_with_line_ends_alone() -> None:
    text = "one\u2028still one\x0cand\x85here\ntwo\r\nthree\rfour"
    assert lines_of(text) == ["one\u2028still one\x0cand\x85here", "two", "three", "four"]
    assert lines_of("") == []
    assert lines_of("a\n\nb\n") == ["a", "", "b"]
