"""The trust commands, and trust in activate, rollback and add: what people type, and the exit statuses they get."""

from __future__ import annotations

from pathlib import Path

import pytest

from nest_runtime.store import entries
from tests.support.cli import Result, Run
from tests.support.store import small_patch

pytest_plugins = ["tests.support.cli"]


@pytest.fixture(autouse=True)
def no_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "builtin"
    folder.mkdir()
    monkeypatch.setattr(entries, "builtin_patches_dir", lambda: folder)
    monkeypatch.delenv("NEST_KEY_PASSPHRASE", raising=False)


@pytest.fixture
def key(run: Run, tmp_path: Path) -> Path:
    assert run("keygen", tmp_path / "keys").status == 0
    return tmp_path / "keys" / "nest.key"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_suffix(".pub")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {v: small_patch(v, seed=int(v[1])).save(tmp_path / f"{v}.safetensors") for v in ("v1", "v2", "v3")}


def refused(result: Result, status: int, *words: str) -> None:
    lines = result.err.splitlines()
    assert result.status == status, result
    assert [line.partition(":")[0] for line in lines[-2:]] == ["error", "hint"]
    assert result.out == ""
    for word in words:
        assert word in result.err


def test_keygen_sign_verify(run: Run, key: Path, public: Path, files: dict[str, Path]) -> None:
    signed = run("sign", files["v2"], "--key", key, "--json").document
    verified = run("verify", files["v2"], "--trust", public, "--json").document
    assert verified["ok"] is True
    assert (verified["signed_by"], verified["digest"]) == (signed["signed_by"], signed["digest"])
    assert (verified["key"], verified["version"], verified["serial"]) == ("nest", "v2", 2)
    assert [Path(name).name for name in signed["files"]] == ["v2.manifest.json", "v2.sig"]
    assert "good signature on test@v2" in run("verify", files["v2"], "--trust", public).out
    refused(run("keygen", key.parent), 2, "never overwritten")


def test_verify_refuses_with_status_3(
    run: Run, key: Path, public: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    run("keygen", tmp_path / "thief")
    refused(run("verify", files["v1"], "--trust", public), 3, "is not signed")
    run("sign", files["v1"], "--key", tmp_path / "thief" / "nest.key")
    refused(run("verify", files["v1"], "--trust", public, "--json"), 3, "was made by the key")
    run("sign", files["v1"], "--key", key)
    files["v1"].write_bytes(files["v2"].read_bytes())
    refused(run("verify", files["v1"], "--trust", public), 3, "changed after signing")
    refused(run("verify", files["v1"]), 2, "no key is trusted")
    refused(run("verify", "hf://org/repo", "--trust", public), 2, "pull it first")


def test_an_encrypted_key_from_the_environment(
    run: Run, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(run("keygen", tmp_path / "k", "--encrypt"), 2, "no terminal")
    monkeypatch.setenv("NEST_KEY_PASSPHRASE", "secret words")
    assert run("keygen", tmp_path / "k", "--encrypt", "--name", "r", "--json").document["encrypted"] is True
    assert run("sign", files["v1"], "--key", tmp_path / "k" / "r.key").status == 0
    monkeypatch.delenv("NEST_KEY_PASSPHRASE")
    refused(run("sign", files["v1"], "--key", tmp_path / "k" / "r.key"), 2, "passphrase")


def test_add_takes_the_signature_along(run: Run, key: Path, public: Path, files: dict[str, Path]) -> None:
    run("sign", files["v1"], "--key", key)
    assert run("add", files["v1"], "--json").document["signed"] is True
    assert run("add", files["v2"], "--json").document["signed"] is False
    assert [row["signed"] for row in run("list", "--json").document["patches"]] == [True, False]
    assert run("verify", "v1", "--trust", public).status == 0
    refused(run("verify", "v2", "--trust", public), 3, "is not signed")
    run("sign", "v2", "--key", key)  # a stored patch is signed in the store
    assert run("verify", "v2", "--trust", public).status == 0


def test_activation_under_trust(run: Run, key: Path, public: Path, files: dict[str, Path]) -> None:
    trust = ("--trust", public, "--require-signature")
    refused(run("activate", files["v1"], *trust), 3, "is not signed")
    assert run("list", "--json").document["patches"] == []  # nothing was added either
    for path in files.values():
        run("sign", path, "--key", key)
    for version in ("v1", "v3"):
        document = run("activate", files[version], *trust, "--json").document
        assert (document["version"], document["signed"]) == (version, True)
    refused(run("activate", files["v2"], *trust), 3, "serial 2; 3 was already accepted", "--allow-downgrade")
    assert run("activate", files["v2"], *trust, "--allow-downgrade", "--why", "v3 is odd").status == 0
    history = run("history", "--json").document["entries"]
    assert history[-1]["why"] == "v3 is odd (downgrade permitted: serial 3 to 2)"
    assert run("activate", "v3", *trust).status == 0
    assert run("rollback", *trust, "--json").document["version"] == "v2"
    assert run("activate", "v2", *trust).status == 0  # going back was meant, and is remembered


def test_the_policy_file_holds_without_options(
    run: Run, key: Path, public: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "nest-home"
    home.mkdir()
    (home / "trust.toml").write_text(f'[[keys]]\nname = "release"\nfile = "{public}"\nnames = ["test"]\n')
    refused(run("activate", files["v1"]), 3, "is not signed; a signature by release is required")
    run("sign", files["v1"], "--key", key)
    assert run("activate", files["v1"], "--json").document["signed_by"].startswith("sha256:")
    (home / "trust.toml").write_text("[[keys]]\n")
    refused(run("activate", files["v1"]), 2, "keys[0].file is missing")


def test_revocation_from_end_to_end(run: Run, key: Path, public: Path, files: dict[str, Path], tmp_path: Path) -> None:
    trust, mirror = ("--trust", public, "--require-signature"), tmp_path / "mirror"
    for version in ("v1", "v2"):
        run("sign", files[version], "--key", key)
        assert run("activate", files[version], *trust).status == 0
    document = run("revoke", "v2", "--reason", "answers recipes", "--key", key, "--to", mirror, "--json").document
    assert (document["serial"], document["reason"], document["version"]) == (1, "answers recipes", "v2")
    listed = run("revocations", mirror, "--trust", public, "--json").document["revocations"]
    assert [(row["version"], row["revoked_by"]) for row in listed] == [("v2", "nest")]
    assert "answers recipes" in run("revocations", "--trust", public).out
    refused(run("verify", files["v2"], "--trust", public), 3, "was revoked on", "answers recipes")
    refused(run("activate", "v2", *trust), 3, "was revoked on")
    assert run("activate", "v1", *trust).status == 0  # what is revoked does not stand in the way
    refused(run("rollback", *trust), 3, "was revoked on")
