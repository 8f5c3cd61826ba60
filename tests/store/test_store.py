"""The local store: what it keeps, what it refuses, and that a killed process never leaves it half changed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nest_runtime.errors import BaseMismatch, DigestMismatch, NestError, PatchNotFound, StoreError, UsageError
from nest_runtime.store import entries
from nest_runtime.store.history import ChainLog
from nest_runtime.store.store import Store
from tests.support.store import BASE_A, BASE_B, small_patch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of built-in patches, which tests may fill."""
    folder = tmp_path / "builtin"
    folder.mkdir()
    monkeypatch.setattr(entries, "builtin_patches_dir", lambda: folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_an_added_patch_is_found_by_version_name_and_digest(store: Store) -> None:
    patch = small_patch("v1")
    entry = store.add(patch, who="ann", why="first")
    for ref in ("v1", "test@v1", patch.digest, patch.digest[:19]):
        assert store.get(ref, model_hash=BASE_A) == patch
    assert (entry.version, entry.digest, entry.active, entry.signed) == ("v1", patch.digest, False, False)
    assert store.list() == [entry]
    assert store.list(BASE_B) == []


def test_reading_makes_no_folder(store: Store) -> None:
    assert store.list() == []
    assert store.history() == []
    assert store.verify_history() == 0
    assert store.gc() == []
    assert not store.root.exists()


def test_versions_belong_to_models(store: Store) -> None:
    a, b = small_patch("v1", base=BASE_A), small_patch("v1", base=BASE_B, seed=1)
    store.add(a)
    store.add(b)
    assert store.get("v1", model_hash=BASE_A).digest == a.digest
    assert store.get("v1", model_hash=BASE_B).digest == b.digest
    with pytest.raises(UsageError, match="of the models tiny-a, tiny-b") as caught:
        store.get("v1")
    assert "--model" in caught.value.hint


def test_two_names_with_one_version_are_ambiguous(store: Store) -> None:
    store.add(small_patch("v1", name="one"))
    store.add(small_patch("v1", name="two", seed=1))
    with pytest.raises(UsageError, match="one@v1, two@v1"):
        store.get("v1", model_hash=BASE_A)
    assert store.get("two@v1", model_hash=BASE_A).name == "two"


def test_what_is_not_there_names_the_closest(store: Store) -> None:
    with pytest.raises(PatchNotFound, match="the store has none"):
        store.get("v1")
    for number in (1, 2, 3):
        store.add(small_patch(f"v{number}", seed=number))
    with pytest.raises(PatchNotFound) as caught:
        store.get("v22", model_hash=BASE_A)
    assert "v2" in caught.value.hint
    with pytest.raises(PatchNotFound) as caught:
        store.get("v2", model_hash=BASE_B)
    assert "tiny-a" in caught.value.hint
    with pytest.raises(UsageError, match="no digest"):
        store.get("sha256:abc")


def test_a_version_never_changes(store: Store) -> None:
    store.add(small_patch("v1"))
    store.add(small_patch("v1"))  # the same content again is no change
    assert len(store.history()) == 1
    with pytest.raises(StoreError, match="test@v1 is already") as caught:
        store.add(small_patch("v1", seed=1))
    assert "another version" in caught.value.hint
    assert store.get("v1") == small_patch("v1")


@pytest.mark.parametrize("fields", [{"version": "base"}, {"name": "a@b"}, {"name": "a/b"}, {"version": "v 1"}])
def test_names_that_cannot_be_typed_are_refused(store: Store, fields: dict[str, str]) -> None:
    with pytest.raises(NestError):
        store.add(small_patch(**fields))  # type: ignore[arg-type]
    assert store.list() == []


def test_activate_and_roll_back_further_and_further(store: Store) -> None:
    patches = [small_patch(f"v{number}", seed=number) for number in (1, 2, 3)]
    for patch in patches:
        store.add(patch)
    assert store.active(BASE_A) is None
    assert store.active_patch(BASE_A) is None
    for patch in patches:
        store.activate(patch.version, model_hash=BASE_A, who="ann", why="newer")
    active = store.active_patch(BASE_A)
    assert active is not None
    assert active.digest == patches[2].digest
    assert [entry.active for entry in store.list()] == [False, False, True]
    assert store.rollback().version == "v2"
    assert store.rollback(BASE_A, why="worse").version == "v1"
    with pytest.raises(StoreError, match="v1 is the first"):
        store.rollback()
    assert [line["what"] for line in store.history()] == ["add"] * 3 + ["activate"] * 3 + ["rollback"] * 2
    last = store.history()[-1]
    assert (last["version"], last["why"], last["digest"]) == ("v1", "worse", patches[0].digest)
    assert store.history()[3]["who"] == "ann"
    assert store.verify_history() == 8


def test_rollback_needs_to_know_the_model(store: Store) -> None:
    with pytest.raises(StoreError, match="no patch is active"):
        store.rollback()
    for base in (BASE_A, BASE_B):
        for number in (1, 2):
            store.activate(store.add(small_patch(f"v{number}", base=base)).digest)
    with pytest.raises(UsageError, match="several models"):
        store.rollback()
    assert store.rollback(BASE_B).key == "test@v1"
    active = store.active(BASE_A)
    assert active is not None
    assert active.version == "v2"


def test_a_patch_is_not_activated_for_another_model(store: Store) -> None:
    digest = store.add(small_patch("v1")).digest
    with pytest.raises(BaseMismatch) as caught:
        store.activate(digest, model_hash=BASE_B)
    assert BASE_A in caught.value.message
    assert BASE_B in caught.value.message
    assert caught.value.exit_status == 3


def test_remove_refuses_the_active_one_and_gc_frees_the_rest(store: Store) -> None:
    one, two = small_patch("v1"), small_patch("v2", seed=2)
    store.add(one)
    store.add(two)
    store.activate("v2")
    with pytest.raises(StoreError, match="is active"):
        store.remove("v2")
    store.remove("v1")
    assert [entry.version for entry in store.list()] == ["v2"]
    assert store.gc() == [one.digest]
    assert store.gc() == []
    assert store.get("v2") == two
    assert store.verify_history() == len(store.history()) == 5


def test_gc_keeps_what_a_rollback_needs_and_drops_leftovers(store: Store) -> None:
    for number in (1, 2):
        store.activate(store.add(small_patch(f"v{number}", seed=number)).digest)
    leftover = store.root / "tmp" / ".index.json.00ff.tmp"
    leftover.write_bytes(b"half")
    assert store.gc() == []
    assert not leftover.exists()
    assert store.rollback().version == "v1"


def test_damaged_bytes_are_never_given_out(store: Store) -> None:
    patch = small_patch("v1")
    store.add(patch)
    store.activate("v1")
    path = next(store.root.glob("objects/sha256/*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        store.get("v1")
    with pytest.raises(DigestMismatch):
        store.activate("v1")
    with pytest.raises(DigestMismatch):
        store.active_patch(BASE_A)
    small_patch("v1", seed=9).save(path)  # a valid patch, but another one
    with pytest.raises(DigestMismatch, match="the store expects"):
        store.get("v1")
    path.unlink()
    with pytest.raises(StoreError, match="are gone"):
        store.get("v1")


def test_builtin_patches_of_several_bases_stand_in_folders_of_their_own(store: Store, no_builtin: Path) -> None:
    """Versions repeat: each base has its v1, and the model at hand decides."""
    ours = small_patch("v1", base=BASE_A).save(no_builtin / "v1.safetensors")
    folder = no_builtin / "tiny-b"
    folder.mkdir()
    theirs = small_patch("v1", base=BASE_B, name="tiny-b-safety", seed=1)
    theirs.save(folder / "v1.safetensors")
    assert ours.exists()
    assert [(e.base_hash, e.key, e.builtin) for e in store.list()] == [
        (BASE_A, "test@v1", True),
        (BASE_B, "tiny-b-safety@v1", True),
    ]
    assert store.get("v1", model_hash=BASE_B) == theirs
    assert store.get("v1", model_hash=BASE_A).base_hash == BASE_A
    assert store.get("tiny-b-safety@v1") == theirs
    with pytest.raises(UsageError, match="of the models tiny-a, tiny-b") as caught:
        store.get("v1")
    assert "--model" in caught.value.hint
    with pytest.raises(PatchNotFound, match="'v2' for tiny-b"):
        store.get("v2", model_hash=BASE_B)
    with pytest.raises(PatchNotFound, match="'v1' for model sha256:dddd") as missing:
        store.get("v1", model_hash="sha256:" + "d" * 64)
    assert "tiny-a, tiny-b" in missing.value.hint
    entry = store.activate("v1", model_hash=BASE_B)
    assert (entry.digest, store.active(BASE_A)) == (theirs.digest, None)


def test_builtin_patches_are_listed_used_and_never_written(store: Store, no_builtin: Path) -> None:
    small_patch("v1").save(no_builtin / "v1.safetensors")
    small_patch("v2", seed=2).save(no_builtin / "v2.safetensors")
    assert [(entry.key, entry.builtin) for entry in store.list()] == [("test@v1", True), ("test@v2", True)]
    assert store.get("v2", model_hash=BASE_A) == small_patch("v2", seed=2)
    assert not store.root.exists()
    with pytest.raises(StoreError, match="read-only"):
        store.remove("v1")
    with pytest.raises(StoreError, match="already"):
        store.add(small_patch("v1", seed=5))
    assert store.add(small_patch("v1")).builtin
    store.activate("v1")
    (no_builtin / "v1.safetensors").unlink()  # an update of the package took it away
    assert store.active_patch(BASE_A) == small_patch("v1")
    assert store.gc() == []


def test_a_broken_index_is_an_error_not_an_empty_store(store: Store) -> None:
    store.add(small_patch("v1"))
    index = store.root / "index.json"
    index.write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        store.list()
    index.write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        store.add(small_patch("v2"))


@pytest.mark.parametrize("damage", ["edit", "drop-first", "drop-middle", "drop-last", "swap", "garbage", "all"])
def test_history_verify_finds_what_was_done_to_it(store: Store, damage: str) -> None:
    for number in (1, 2, 3, 4):
        store.add(small_patch(f"v{number}", seed=number), who="ann")
    path = store.root / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = {
        "edit": [lines[0], lines[1].replace("ann", "bob"), *lines[2:]],
        "drop-first": lines[1:],
        "drop-middle": [lines[0], *lines[2:]],
        "drop-last": lines[:-1],
        "swap": [lines[1], lines[0], *lines[2:]],
        "garbage": [lines[0], "hello\n", *lines[1:]],
        "all": [],
    }[damage]
    assert store.verify_history() == 4
    path.write_text("".join(changed))
    with pytest.raises(StoreError, match="line "):
        store.verify_history()
    store.add(small_patch("v5", seed=5))  # a damaged history stops nobody from acting, and stays damaged
    with pytest.raises(StoreError):
        store.verify_history()


def test_a_line_torn_by_a_crash_is_taken_up_again(store: Store) -> None:
    store.add(small_patch("v1"))
    store.add(small_patch("v2", seed=2))
    path, index = store.root / "history.jsonl", store.root / "index.json"
    path.write_bytes(path.read_bytes()[:-20])  # killed while the line was written …
    rows = json.loads(index.read_text())
    index.write_text(json.dumps({**rows, "pending": True}))  # … which the index still knew to be owed
    assert [line["version"] for line in store.history()] == ["v1", "v2"]
    assert store.verify_history() == 2
    assert len(path.read_text().splitlines()) == 2


def test_chain_logs_continue_and_verify(tmp_path: Path) -> None:
    log = ChainLog(tmp_path / "deep" / "audit.jsonl")
    assert log.last() is None
    entries_ = [log.append({"what": "x", "number": number, "text": "é" * 40_000}) for number in range(3)]
    assert [entry["seq"] for entry in log.read()] == [1, 2, 3]
    assert log.last() == entries_[-1]
    assert log.verify() == 3
    with pytest.raises(StoreError, match="is missing"):
        log.verify({**entries_[-1], "seq": 4, "hash": "sha256:other"})


SCRIPT = """
import sys
from nest_runtime.store.store import Store
from tests.support.store import small_patch
store, first, count = Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(first, first + count):
    store.add(small_patch(f"v{number}", seed=number % 7))
    store.activate(f"v{number}")
    print(number, flush=True)
"""


def _worker(store: Store, first: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store.root.parent), str(first), str(count)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _start(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    worker.stdin.write("go\n")
    worker.stdin.flush()


def _check_whole(store: Store, acknowledged: int) -> None:
    """Everything acknowledged is there, everything there can be read, and the history tells the same story."""
    versions = [entry.version for entry in store.list()]
    assert len(versions) >= acknowledged
    for version in versions:
        assert store.get(version).version == version
    story = store.history()
    assert [line["version"] for line in story if line["what"] == "add"] == sorted(versions, key=lambda v: int(v[1:]))
    activated = [line["version"] for line in story if line["what"] == "activate"]
    active = store.active(BASE_A)
    assert (active.version if active else None) == (activated[-1] if activated else None)
    assert store.verify_history() == len(story)


def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(store: Store) -> None:
    """SIGKILL at 30 random moments; a process that forks once torch is loaded makes that quick."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    chance, number = random.Random(7), 0
    for _ in range(30):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                for version in range(number + 1, number + 100):
                    store.add(small_patch(f"v{version}", seed=version % 7))
                    store.activate(f"v{version}")
                    os.write(writer, b".")
            finally:
                os._exit(0)
        os.close(writer)
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            acknowledged = number + len(pipe.read())
        known = [int(entry.version[1:]) for entry in store.list()]
        assert max(known, default=0) in range(acknowledged, acknowledged + 2)
        number = max(known, default=0)
    assert number > 3
    _check_whole(store, number)
    store.gc()
    assert not list((store.root / "tmp").iterdir())
    _check_whole(store, number)


def test_processes_at_once_lose_nothing(store: Store) -> None:
    workers = [_worker(store, first, 8) for first in (100, 200)]
    for worker in workers:
        _start(worker)
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    versions = {entry.version for entry in store.list()}
    assert versions == {f"v{first + number}" for first in (100, 200) for number in range(8)}
    assert store.verify_history() == len(store.history()) == 32
