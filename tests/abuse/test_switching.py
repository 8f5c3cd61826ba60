"""Switches over HTTP on a server whose disk is full, or whose last step fails: all of it, or nothing.

Whatever the admin API answers, the answers of clients, the store, the trust memory and the audit log agree with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.store.store import Store
from nest_runtime.trust.check import sign_patch
from nest_runtime.trust.state import TrustState
from tests.support.patches import make_patch
from tests.support.serve import TOKEN, Running, serving
from tests.support.trust import Keys

PAGE = 4096
VERSIONS = ("v1", "v2", "v3", "v4")


@pytest.fixture(scope="module")
def patches(tiny_llama: Path) -> dict[str, Patch]:
    loaded = load_model(tiny_llama)
    return {
        v: make_patch(loaded.model, version=v, serial=n, seed=n, base_hash=loaded.hash)
        for n, v in enumerate(VERSIONS, 1)
    }


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``$NEST_HOME`` on a small disk of its own, for those who may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    (place / "home").mkdir()
    monkeypatch.setenv("NEST_HOME", str(place / "home"))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def config(disk: Path, tiny_llama: Path, patches: dict[str, Patch], keys: Keys, tmp_path: Path) -> ServeConfig:
    """A server that follows its store, with v1 active, under a policy; v2 to v4 are signed files elsewhere."""
    for version, patch in patches.items():
        sign_patch(patch.save(tmp_path / f"{version}.safetensors"), keys.mine)
    policy = disk / "home" / "trust.toml"
    policy.write_text(f'[[keys]]\nname = "k"\nfile = "{keys.mine.with_suffix(".pub")}"\nnames = ["*"]\n')
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    from nest_runtime.cli.main import main

    assert main(["activate", str(tmp_path / "v1.safetensors"), "--quiet"]) == 0
    return ServeConfig(
        model=str(tiny_llama),
        port=0,
        admin_token_file=token,
        limits=Limits(cache_tokens=4096, batch_tokens=128),
    )


@contextlib.contextmanager
def nearly_full(disk: Path, pages: int) -> Iterator[None]:
    """So many pages of the disk are free."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * PAGE) == PAGE:
            pass
    os.truncate(path, max(0, path.stat().st_size // PAGE - pages) * PAGE)
    try:
        yield
    finally:
        path.unlink()


def answering(server: Running) -> str:
    body = {"model": server.name, "messages": [{"role": "user", "content": "Mix"}], "max_tokens": 1}
    answer = server.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-nest-patch"])


def agree(server: Running, disk: Path, base: str, version: str) -> None:
    """All that could say which patch is on says the same."""
    assert answering(server) == version
    rows = server.admin("GET", "/v1/patches").json()["patches"]
    assert [row["version"] for row in rows if row["active"]] == [version]
    active = Store(disk / "home").active(base)
    assert active is not None
    assert active.version == version
    written = [json.loads(line) for line in (disk / "home" / "audit.jsonl").read_text().splitlines() if line]
    intents = [entry.get("version") for entry in written if entry["what"] == "intent"]
    assert version in (*intents, "v1")  # nothing is on that was not written down first


def test_a_disk_that_fills_up_while_the_api_switches(
    config: ServeConfig, disk: Path, patches: dict[str, Patch], tmp_path: Path
) -> None:
    base = patches["v1"].base_hash
    with serving(config) as server:
        on, seen = "v1", set()
        for pages in (0, 1, 2, 3, 4, 5, 6, 8, 12, 200):
            target = VERSIONS[min(VERSIONS.index(on) + 1, 3)]
            with nearly_full(disk, pages):
                answer = server.admin(
                    "POST", "/v1/patches/activate", json={"patch": str(tmp_path / f"{target}.safetensors")}
                )
                seen.add(answer.status_code)
                assert answer.status_code == 200 or "error" in answer.json(), answer.text
                before, on = on, target if answer.status_code == 200 else on
                assert answering(server) == on  # while the disk is still full
            agree(server, disk, base, on)
            highest = TrustState(disk / "home").highest(base, "test")
            assert highest is not None
            assert highest.digest == patches[on].digest, (pages, before, answer.text)
        assert {200, 409} <= seen
        with nearly_full(disk, 0):
            refused = server.admin("POST", "/v1/patches/rollback")
            assert refused.status_code >= 400
            assert answering(server) == on
        agree(server, disk, base, on)
        assert server.admin("POST", "/v1/patches/rollback").status_code == 200
        agree(server, disk, base, VERSIONS[VERSIONS.index(on) - 1])
        assert server.server.audit.verify() > 0
    with serving(config) as again:  # what a restart finds is what was on
        assert answering(again) == VERSIONS[VERSIONS.index(on) - 1]


@pytest.mark.parametrize("step", ["trust/history.jsonl", "store/history.jsonl", "store/signatures"])
def test_a_step_that_fails_while_the_api_switches(
    config: ServeConfig, disk: Path, patches: dict[str, Patch], tmp_path: Path, step: str
) -> None:
    base, target = patches["v1"].base_hash, disk / "home" / step
    file = str(tmp_path / "v2.safetensors")
    with serving(config) as server:
        kept = target.with_name(f"{target.name}.kept")
        target.rename(kept)
        if step.endswith(".jsonl"):
            target.mkdir()
        else:
            target.write_text("in the way")
        answer = server.admin("POST", "/v1/patches/activate", json={"patch": file})
        assert answer.status_code >= 400
        assert "error" in answer.json()
        assert answering(server) == "v1"
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        kept.rename(target)
        agree(server, disk, base, "v1")
        highest = TrustState(disk / "home").highest(base, "test")
        assert highest is not None
        assert highest.digest == patches["v1"].digest
        last = [entry for entry in server.server.audit.tail(10) if entry["what"] == "activate"][-1]
        assert (last["done"], last["version"]) == (False, "v2")
        assert server.admin("POST", "/v1/patches/activate", json={"patch": file}).status_code == 200
        agree(server, disk, base, "v2")
