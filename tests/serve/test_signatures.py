"""Signatures on the way to a server: patches of the package, signed copies of them, and references to the Hub."""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nest_runtime.cli.main import main
from nest_runtime.errors import Revoked, SignatureError
from nest_runtime.hub.publish import publish_revocation, set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.model.load import load_model
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.store.entries import builtin_patches_dir
from nest_runtime.store.store import Store
from nest_runtime.trust.check import sign_patch, verify_patch
from nest_runtime.trust.keys import generate_keys
from nest_runtime.trust.policy import policy_for
from tests.support.hub import publish
from tests.support.hub_server import HubServer
from tests.support.patches import make_patch, random_site
from tests.support.serve import serving
from tests.support.store import small_patch

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"
Keys = tuple[Path, Path]


@pytest.fixture
def config(keys: Keys) -> ServeConfig:
    return ServeConfig(
        patch="v3",
        port=0,
        trust=(keys[1],),
        require_signature=True,
        limits=Limits(cache_tokens=2048, batch_tokens=128, drain_seconds=5),
    )


def test_a_patch_of_the_package_is_refused_until_signed(
    config: ServeConfig, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SignatureError, match="is not signed") as refused, serving(config):
        pass
    assert "nest-runtime sign reference-safety@v3" in refused.value.hint
    command = refused.value.hint.rpartition("`nest-runtime ")[2].rstrip("`").split()
    assert main([*command, "--key", str(keys[0])]) == 0
    assert main(["verify", "v3", "--trust", str(keys[1])]) == 0
    assert "good signature on reference-safety@v3" in capsys.readouterr().out
    with serving(config) as server:
        assert server.http("GET", "/ready").json()["patch"] == "v3"
    assert [entry.version for entry in Store().list() if entry.builtin and entry.signed] == ["v3"]
    assert main(["activate", "v2", "--trust", str(keys[1]), "--require-signature"]) == 3  # v3's says nothing of v2
    assert main(["activate", "v3", "--trust", str(keys[1]), "--require-signature"]) == 0
    with serving(replace(config, patch=None)) as server:
        assert server.http("GET", "/ready").json()["patch"] == "v3"


def test_a_signed_copy_of_a_patch_of_the_package(config: ServeConfig, keys: Keys, tmp_path: Path) -> None:
    source = builtin_patches_dir()
    assert source is not None
    copy = tmp_path / "mine.safetensors"
    shutil.copy(source / "v2.safetensors", copy)
    with pytest.raises(SignatureError, match="is not signed"), serving(replace(config, patch=str(copy))):
        pass
    assert main(["sign", str(copy), "--key", str(keys[0])]) == 0
    with serving(replace(config, patch=str(copy))) as server:
        assert server.http("GET", "/ready").json()["patch"] == "v2"
    place = str(tmp_path / "mirror")
    assert main(["push", str(copy), place]) == 0  # with the signature that lies beside it
    stranger = generate_keys(tmp_path / "stranger")[1]
    pull = ["pull", f"{place}@v2", "--require-signature", "--trust"]
    assert main([*pull, str(stranger)]) == 3
    assert main([*pull, str(keys[1])]) == 0


def test_a_server_verifies_a_reference_to_the_hub(
    hub: HubServer, store: Store, config: ServeConfig, keys: Keys, tiny_llama: Path, tmp_path: Path
) -> None:
    loaded = load_model(tiny_llama)
    patches = {n: make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, base_hash=loaded.hash) for n in (1, 2, 3)}
    publish(patches[1], store)
    publish(patches[2], store, generate_keys(tmp_path / "stranger")[:2])
    publish(patches[3], store, keys)
    set_channel(parse_repo(REPO), "stable", "v3", store=store, key=keys[0])
    config = replace(config, model=str(tiny_llama))
    for version, words in (("v1", "is not signed"), ("v2", "was made by the key")):
        with pytest.raises(SignatureError, match=words), serving(replace(config, patch=f"hf://{REPO}@{version}")):
            pass
    for revision in ("v3", "stable"):
        with serving(replace(config, patch=f"hf://{REPO}@{revision}")) as server:
            assert server.http("GET", "/ready").json()["digest"] == patches[3].digest
            entry = next(
                entry for entry in server.server.audit.tail(9) if entry["what"] == "activate" and entry["done"]
            )
            assert entry["signed_by"].startswith("sha256:")
    publish_revocation(patches[3], "answers recipes", parse_repo(REPO), key=keys[0])
    with pytest.raises(Revoked), serving(replace(config, patch=f"hf://{REPO}@v3")):
        pass


def test_verifying_is_quick(keys: Keys, tmp_path: Path) -> None:
    """Under 100 ms beside import, for a megabyte; processor time, so that a busy machine does not fail it."""
    sites = tuple(random_site(f"layers.{i}.mlp.gate_proj", 2048, 1024, neurons=64, clusters=16) for i in range(16))
    path = small_patch("v1").evolve(sites=sites).save(tmp_path / "patch.safetensors")
    assert path.stat().st_size > 1_000_000
    sign_patch(path, keys[0])
    policy = policy_for([keys[1]], require_signature=True)
    assert policy is not None
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        assert verify_patch(path, policy).signed_by
        seconds.append(time.thread_time() - began)
    assert statistics.median(seconds) < 0.1
