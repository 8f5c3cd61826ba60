"""A trusted activation in which one step fails: everyone who activates has the whole of it, or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nest_runtime.errors import NestError
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.switching.durable import Durable
from nest_runtime.store.store import Store
from nest_runtime.trust.guard import guard_for
from nest_runtime.trust.state import TrustState
from tests.abuse.conftest import Run, refused
from tests.support.patches import make_patch
from tests.support.trust import Keys

Act = Callable[[str], None]  # "v3" activates it, "rollback" goes back; raises, or ends with an error


@dataclass
class Place:
    """A home with v1 and v2 signed and activated in turn, and v3 signed beside."""

    home: Path
    files: dict[str, Path]
    patches: dict[str, Patch]

    def state(self) -> tuple[object, ...]:
        """What must not change where a step fails."""
        store, base = Store(self.home), self.patches["v1"].base_hash
        active, previous = store.active(base), store.previous(base)
        accepted = TrustState(self.home).highest(base, "test")
        names = [entry.key for entry in store.list()]
        return active and active.key, previous and previous.key, accepted, names


@contextmanager
def in_the_way(path: Path, *, folder: bool) -> Iterator[None]:
    """Something stands where a step writes; a real disk's refusal, whoever asks."""
    kept = path.with_name(path.name + ".kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(kept)
    if folder:
        path.mkdir()
    else:
        path.write_text("in the way")
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kept.exists():
            kept.rename(path)


STEPS = {
    "add": ("store/objects", False),
    "activate": ("store/history.jsonl", True),
    "keep": ("store/signatures", False),
    "accept": ("trust/history.jsonl", True),
}


@pytest.fixture(scope="module")
def patches(tiny_llama: Path) -> dict[str, Patch]:
    loaded = load_model(tiny_llama)
    return {
        f"v{n}": make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, base_hash=loaded.hash) for n in (1, 2, 3)
    }


@pytest.fixture
def place(run: Run, home: Path, keys: Keys, patches: dict[str, Patch], tmp_path: Path) -> Place:
    files = {version: patch.save(tmp_path / f"{version}.safetensors") for version, patch in patches.items()}
    public = keys.mine.with_suffix(".pub")
    (home / "trust.toml").write_text(f'[[keys]]\nname = "release"\nfile = "{public}"\nnames = ["*"]\n')
    for version, file in files.items():
        assert run("sign", file, "--key", keys.mine).status == 0
        if version != "v3":
            assert run("activate", file).status == 0
    return Place(home, files, patches)


@pytest.fixture(params=["command", "demo", "server"])
def act(request: pytest.FixtureRequest, run: Run, place: Place, tiny_llama: Path) -> Act:
    """Everyone who activates: the command line, the demo, and the durable half of a server's switch."""
    if request.param == "command":

        def by_command(what: str) -> None:
            result = run("rollback") if what == "rollback" else run("activate", place.files[what])
            if result.status:
                refused(result, result.status)
                raise NestError(result.err)

        return by_command
    store = Store(place.home)
    guard = guard_for(store)
    assert guard is not None
    if request.param == "server":
        durable = Durable(store, "tiny", place.patches["v1"].base_hash, follows_store=True, guard=guard)

        def by_server(what: str) -> None:
            on = durable.active()
            serving = None if on is None else on.digest
            if what == "rollback":
                durable.write("rollback", place.patches["v1"], "tester", serving)
            else:
                guard.check(place.patches[what], place.files[what])
                durable.write("activate", place.patches[what], "tester", serving)

        return by_server
    from nest_runtime.demo.local import LocalBackend

    backend = LocalBackend(load_model(tiny_llama), store)

    def by_demo(what: str) -> None:
        if what == "rollback":
            backend.rollback()
        else:
            run("add", place.files[what])
            backend.activate(store.find(what))

    return by_demo


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("what", ["v3", "rollback"])
def test_a_step_that_fails_leaves_all_as_it_was(act: Act, place: Place, run: Run, step: str, what: str) -> None:
    if what == "rollback" and step in ("add", "keep"):
        pytest.skip("going back adds nothing; its signature is there, and is written again")
    if what == "v3":
        run("add", place.files["v3"])  # for the demo, which knows the store alone
    before = place.state()
    if step == "add":
        run("remove", "v3")
        shutil.rmtree(place.home / "store" / "objects" / "sha256" / place.patches["v3"].digest[7:9])
        before = place.state()
    target, folder = STEPS[step]
    with in_the_way(place.home / target, folder=folder), pytest.raises((NestError, OSError)):
        act(what)
    assert place.state() == before
    assert run("history", "--verify").status == 0
    act(what)  # and nothing of it stands in the way of the next try
    assert place.state()[0] == ("test@v1" if what == "rollback" else "test@v3")
    assert run("history", "--verify").status == 0
    if what == "rollback":
        assert run("activate", "v2").status == 0  # the memory has not moved either


def test_a_signature_that_fails_keeps_nothing(act: Act, place: Place, run: Run, keys: Keys) -> None:
    assert run("sign", place.files["v3"], "--key", keys.other).status == 0
    before = place.state()
    with pytest.raises(NestError, match="made by the key"):
        act("v3")
    assert [name for name in place.state()[3] if name != "test@v3"] == [name for name in before[3] if name != "test@v3"]
    assert place.state()[:3] == before[:3]
    assert AuditLog(place.home / "audit.jsonl").kept is False
