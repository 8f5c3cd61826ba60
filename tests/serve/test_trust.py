"""Trust on a running server: at its start, at every load and activation over the admin API, and at a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nest_runtime.cli.main import main
from nest_runtime.errors import Downgrade, SignatureError, UsageError
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.store.store import Store
from nest_runtime.trust.check import sign_patch
from nest_runtime.trust.keys import generate_keys, read_public_key
from nest_runtime.trust.policy import policy_for
from nest_runtime.trust.revocations import read_list, revoke
from nest_runtime.trust.state import TrustState
from tests.support.patches import make_patch
from tests.support.serve import Running, serving

TOKEN = "admin-secret"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: generate_keys(folder, name)[0] for name in ("release", "thief")}


@pytest.fixture(scope="module")
def patches(tiny_llama: Path) -> dict[str, Patch]:
    loaded = load_model(tiny_llama)
    return {
        f"v{n}": make_patch(loaded.model, version=f"v{n}", serial=n, seed=n, base_hash=loaded.hash) for n in (1, 2, 3)
    }


@pytest.fixture
def files(patches: dict[str, Patch], keys: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """v1, v2, v3 signed; ``forged`` is v3 by a thief, ``plain`` unsigned, ``altered`` v2 under v3's signature."""
    found = {}
    for version, patch in patches.items():
        path = patch.save(tmp_path / f"{version}.safetensors")
        sign_patch(path, keys["release"])
        found[version] = str(path)
    found["forged"] = str(patches["v3"].save(tmp_path / "forged" / "patch.safetensors"))
    sign_patch(tmp_path / "forged", keys["thief"])
    found["plain"] = str(patches["v3"].save(tmp_path / "plain" / "v3.safetensors"))
    found["altered"] = str(patches["v2"].save(tmp_path / "altered" / "v3.safetensors"))
    for suffix in (".sig", ".manifest.json"):
        (tmp_path / "altered" / f"v3{suffix}").write_bytes((tmp_path / f"v3{suffix}").read_bytes())
    return found


@pytest.fixture
def config(tiny_llama: Path, files: dict[str, str], keys: dict[str, Path], tmp_path: Path) -> ServeConfig:
    token_file = tmp_path / "admin-token"
    token_file.write_text(f"{TOKEN}\n")
    token_file.chmod(0o600)
    return ServeConfig(
        model=str(tiny_llama),
        patch=files["v2"],
        port=0,
        admin_token_file=token_file,
        trust=(keys["release"].with_suffix(".pub"),),
        require_signature=True,
        limits=Limits(cache_tokens=2048, batch_tokens=128, drain_seconds=5),
    )


def activate(server: Running, ref: str) -> tuple[int, str]:
    response = server.admin("POST", "/v1/patches/activate", json={"patch": ref})
    return response.status_code, response.text


def active(server: Running) -> str:
    return str(server.admin("GET", "/v1/patches").json()["active"])


def test_only_trusted_patches_become_active_on_a_running_server(
    config: ServeConfig, files: dict[str, str], patches: dict[str, Patch], keys: dict[str, Path], tmp_path: Path
) -> None:
    with serving(config) as server:
        for name, word in (
            ("plain", "is not signed"),
            ("forged", "was made by the key"),
            ("altered", "another patch"),
            ("v1", "serial 1; 2 was already accepted"),
        ):
            status, text = activate(server, files[name])
            assert 400 <= status < 500, (name, text)
            assert word in text
            assert active(server) == "v2"
            assert [row["label"] for row in server.admin("GET", "/v1/patches").json()["patches"]] == ["v2"]
        assert server.admin("POST", "/v1/patches", json={"patch": files["plain"]}).status_code >= 400
        assert activate(server, files["v3"])[0] == 200
        assert active(server) == "v3"
        rolled = server.admin("POST", "/v1/patches/rollback")  # asked for by name: no downgrade unnoticed
        assert rolled.json()["active"] == "v2"
        assert TrustState().history()[-1]["what"] == "downgrade"
        assert activate(server, "v3")[0] == 200

        revoke(patches["v2"], "answers recipes", tmp_path / "mirror", keys["release"])
        policy = policy_for(config.trust)
        assert policy is not None
        TrustState().update_revocations(*read_list(tmp_path / "mirror"), policy)
        refused = server.admin("POST", "/v1/patches/rollback")
        assert refused.status_code >= 400
        assert "was revoked" in refused.text
        assert active(server) == "v3"
        audit = server.admin("GET", "/v1/audit").json()["entries"]
        key_id = read_public_key(config.trust[0]).id
        assert {e["signed_by"] for e in audit if e["what"] == "activate" and e["done"]} == {key_id}
        assert {e["error"] for e in audit if not e.get("done", True) and e["what"] != "intent"} == {
            "SignatureError",
            "Downgrade",
            "Revoked",
        }


def test_a_server_does_not_start_with_what_it_does_not_trust(config: ServeConfig, files: dict[str, str]) -> None:
    for name, error in (("plain", SignatureError), ("forged", SignatureError), ("altered", SignatureError)):
        with pytest.raises(error), serving(replace(config, patch=files[name])):
            pass
    with pytest.raises(UsageError, match="no key is trusted"), serving(replace(config, trust=())):
        pass
    with pytest.raises(SignatureError), serving(replace(config, expose=(files["plain"],))):
        pass


def test_a_restart_checks_the_store_again(
    config: ServeConfig, files: dict[str, str], patches: dict[str, Patch]
) -> None:
    following = replace(config, patch=None)
    with serving(replace(config, patch=files["v1"])) as server:
        assert active(server) == "v1"
    Store().add(files["v2"])
    Store().activate("v2", model_hash=patches["v2"].base_hash)
    with pytest.raises(SignatureError, match="is not signed"), serving(following):  # its signature was not added
        pass
    with serving(replace(config, patch=files["v2"])):  # now the store has it
        pass
    with serving(following) as server:
        assert active(server) == "v2"
        assert activate(server, files["v3"])[0] == 200
    with serving(following) as server:
        assert active(server) == "v3"
    with pytest.raises(Downgrade), serving(replace(config, patch=files["v2"])):
        pass
    with serving(replace(config, patch=files["v2"], allow_downgrade=True, expose=(files["v1"],))) as server:
        assert active(server) == "v2"
    for signature in (Store().root / "signatures").rglob("*.sig"):
        signature.write_bytes(b"{}")
    with pytest.raises(SignatureError, match="no signature that can be read"), serving(following):
        pass


def test_the_command_ends_with_status_3(
    tiny_llama: Path, keys: dict[str, Path], files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trust", str(keys["release"].with_suffix(".pub")), "--require-signature", "--patch", files["forged"]]
    assert main(["serve", "--model", str(tiny_llama), "--port", "0", *options]) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == ["error", "hint"]
    assert "was made by the key" in said[-2]
