"""SIGKILL before every step that touches the disk: the old state or the new, and nothing stands in the way.

A forked process does one operation and kills itself at its n-th step; then at the next one, until it gets through.
store/test_store.py kills at random moments besides.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.errors import NestError
from nest_runtime.hub.fetch import pull
from nest_runtime.hub.mirror import MirrorRemote
from nest_runtime.hub.origins import Origins
from nest_runtime.hub.repository import parse_repo
from nest_runtime.store.history import ChainLog
from nest_runtime.store.signatures import signature_folder
from nest_runtime.store.store import Store
from nest_runtime.trust.kept import keep_signature
from nest_runtime.trust.keys import generate_keys
from nest_runtime.trust.policy import policy_for
from nest_runtime.trust.revocations import read_list, revoke
from nest_runtime.trust.state import Accepted, TrustState
from tests.support.hub import Pushed, guard_of, publish, signature
from tests.support.store import BASE_A, small_patch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

STEPS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
Keys = tuple[Path, Path]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    private, public, _ = generate_keys(tmp_path_factory.mktemp("keys"))
    return private, public


def killed_at(step: int, operation: Callable[[], object]) -> bool:
    """Run an operation in a child that is killed before its ``step``-th touch of the disk; gives whether it was."""
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def counting(name: str) -> Callable[..., Any]:
                real = getattr(os, name)

                @wraps(real)
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in STEPS:
                setattr(os, name, counting(name))
            operation()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the operation failed by itself"
    return False


def at_every_step(
    home: Path, operation: Callable[[], object], state: Callable[[], object], check: Callable[[], object]
) -> None:
    """From the same beginning each time: kill, look, check, and do what was not done."""
    beginning = home.with_name(f"{home.name}-beginning")
    shutil.copytree(home, beginning)
    old = state()
    operation()
    new = state()
    assert old != new
    seen, step, killed = set(), 0, True
    while killed:
        step += 1
        shutil.rmtree(home)
        shutil.copytree(beginning, home)
        killed = killed_at(step, operation)
        found = state()
        assert found in (old, new), step
        seen.add(found == new)
        check()
        if found == old:
            operation()
        assert state() == new, step
    assert step > 5
    assert seen == {False, True}


@pytest.mark.parametrize("what", ["first add", "add", "activate", "activate a built-in", "rollback", "remove", "gc"])
def test_the_store(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "home")
    store.root.parent.mkdir()
    if what != "first add":
        for number in (1, 2):
            store.add(small_patch(f"v{number}", seed=number))
            store.activate(f"test@v{number}")
        store.add(small_patch("v3", seed=3))
    if what == "gc":
        store.remove("test@v3")
    operations: dict[str, Callable[[], object]] = {
        "first add": lambda: store.add(small_patch("v1")),
        "add": lambda: store.add(small_patch("v4", seed=4)),
        "activate": lambda: store.activate("test@v1"),
        "activate a built-in": lambda: store.activate("reference-safety@v3"),
        "rollback": store.rollback,
        "remove": lambda: store.remove("test@v3"),
        "gc": store.gc,
    }
    story = _objects if what == "gc" else _story
    at_every_step(tmp_path / "home", operations[what], lambda: story(store), lambda: _whole(store))
    if what == "gc":
        assert store.history()[-1]["what"] == "gc"


def _objects(store: Store) -> object:
    return sorted(path.name for path in store.root.glob("objects/*/*/*.safetensors"))


def _story(store: Store) -> tuple[object, ...]:
    """Everything the store says: what there is, what is active, and what has happened."""
    history = [(line["what"], line["version"]) for line in store.history()]
    return store.list(), store.active(BASE_A), history


def _whole(store: Store) -> None:
    for entry in store.list():
        assert store.get(entry.digest).digest == entry.digest
    assert store.verify_history() == len(store.history())


def test_the_memory_of_trust(tmp_path: Path, keys: Keys) -> None:
    state = TrustState(tmp_path / "home")
    state.accept(BASE_A, "test", Accepted(1, small_patch("v1").digest))

    def story() -> object:
        return state.highest(BASE_A, "test")

    def accept() -> None:
        state.accept(BASE_A, "test", Accepted(2, small_patch("v2").digest))

    at_every_step(tmp_path / "home", accept, story, ChainLog(state.root / "history.jsonl").verify)


def test_revocations_taken_in(tmp_path: Path, keys: Keys) -> None:
    state, policy = TrustState(tmp_path / "home"), policy_for([keys[1]])
    assert policy is not None
    lists = []
    for number in (1, 2):
        revoke(small_patch(f"v{number}"), "answers recipes", tmp_path / "list", keys[0])
        lists.append(read_list(tmp_path / "list"))
    state.update_revocations(*lists[0], policy)
    at_every_step(
        tmp_path / "home",
        lambda: state.update_revocations(*lists[1], policy),
        lambda: sorted(entry.version for entry, _ in state.revocations(policy)),
        ChainLog(state.root / "history.jsonl").verify,
    )


def test_signatures_and_origins(tmp_path: Path, keys: Keys) -> None:
    store, patch = Store(tmp_path / "home"), small_patch("v1")
    store.add(patch)
    guard, material = guard_of(store, keys), signature(patch, keys)

    def keep() -> None:
        keep_signature(store.root, patch, material)
        Origins(store.root).record("hf://alice/safety", "v1", "0" * 40, patch.digest, patch.name)

    def story() -> object:
        """Without the second file of a signature there is none; both operations done is the new state."""
        try:
            signed = guard.check(patch).signed_by is not None
        except NestError:
            signed = False
        known = Origins(store.root).find("hf://alice/safety", "v1")
        assert signed or known is None
        return known is not None

    at_every_step(tmp_path / "home", keep, story, lambda: signature_folder(store.root, patch.digest))


def test_a_push_to_a_mirror(tmp_path: Path, keys: Keys) -> None:
    """Whoever reads meanwhile gets the old version, the new one, or a refusal; pushing again mends what was left."""
    place, store = tmp_path / "home", Store(tmp_path / "publisher")
    first, second = small_patch("v1", seed=1), small_patch("v2", seed=2)
    publish(first, store, keys, place=str(place))
    reader = Store(tmp_path / "reader")
    guard = guard_of(reader, keys)

    def push() -> Pushed:
        return publish(second, store, keys, place=str(place))

    def versions() -> object:
        return sorted(MirrorRemote(str(place)).refs().tags)

    def check() -> None:
        ref = parse_repo(str(place))
        for version in MirrorRemote(str(place)).refs().tags:
            assert pull(f"{ref}@{version}", store=reader)[0].patch.version == version
        try:
            newest = pull(str(ref), store=reader, guard=guard)[0].patch
        except NestError:
            push()
            newest = pull(str(ref), store=reader, guard=guard)[0].patch
            assert newest == second
        assert newest in (first, second)
        if "v2" in MirrorRemote(str(place)).refs().tags:
            push()
            assert pull(str(ref), store=reader, guard=guard)[0].patch == second

    at_every_step(place, push, versions, check)
