"""Keys and signatures: what is signed, and that anything else is refused. Real keys, real files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nest_runtime.errors import (
    DigestMismatch,
    NestError,
    PatchFormatError,
    SignatureError,
    UsageError,
)
from nest_runtime.hub.channels import channel_for, read_channel, verify_channel
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.write import to_bytes
from nest_runtime.trust.check import check_trust, open_patch, sign_patch, verify_patch
from nest_runtime.trust.keys import generate_keys, read_public_key
from nest_runtime.trust.material import Material, read_material
from nest_runtime.trust.policy import Policy, with_keys
from nest_runtime.trust.revocations import (
    RevocationList,
    read_list,
    revoke,
    sign_list,
    verify_list,
)
from nest_runtime.trust.signing import sign_files, verify_files
from nest_runtime.trust.state import TrustState
from tests.support.store import BASE_A, BASE_B, small_patch
from tests.support.trust import Keys, make_keys, only, signed

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def policy(keys: Keys) -> Policy:
    return only(keys.public)


@pytest.fixture
def state(tmp_path: Path) -> TrustState:
    return TrustState(tmp_path / "home")


# Keys


def test_keys_are_made_for_their_owner_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    private, public_path, public = generate_keys(folder)
    assert (private.name, public_path.name) == ("nest.key", "nest.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert read_public_key(public_path) == public
    before = private.read_bytes(), public_path.read_bytes()
    with pytest.raises(UsageError, match="never overwritten"):
        generate_keys(folder)
    public_path.unlink()
    with pytest.raises(UsageError, match=r"nest\.key exists"):
        generate_keys(folder)
    assert (private.read_bytes(), public.pem) == before


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_private_key_that_others_may_read_is_refused(keys: Keys, tmp_path: Path, mode: int) -> None:
    path = small_patch().save(tmp_path / "p.safetensors")
    key = tmp_path / "open.key"
    key.write_bytes(keys.mine.read_bytes())
    key.chmod(mode)
    with pytest.raises(UsageError, match=f"mode {mode:o}") as caught:
        sign_patch(path, key)
    assert "chmod 600" in caught.value.hint
    assert not path.with_suffix(".sig").exists()


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    private, _, public = generate_keys(tmp_path / "k", passphrase="open sesame")
    assert b"ENCRYPTED" in private.read_bytes()
    path = small_patch().save(tmp_path / "p.safetensors")
    for passphrase, message in (("", "needs its passphrase"), ("wrong", "this passphrase")):
        with pytest.raises(UsageError, match=message):
            sign_patch(path, private, passphrase)
    sign_patch(path, private, "open sesame")
    assert verify_patch(path, only(public)).signed_by == public.id


def test_what_is_no_key_is_named(keys: Keys, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ed25519

    edwards = tmp_path / "edwards.pub"
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    edwards.write_bytes(key.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "text").write_text("hello")
    for path, message in (
        (edwards, "kind Ed25519PublicKey"),
        (tmp_path / "text", "no public key in PEM form"),
        (tmp_path / "absent", "cannot be read"),
        (keys.mine, "holds a private key"),
    ):
        with pytest.raises(UsageError, match=message):
            read_public_key(path)


# Signatures


def test_a_signed_file_verifies_in_both_layouts(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    patch = small_patch("v2")
    loose = patch.save(tmp_path / "v2.safetensors")
    result, manifest, signature = sign_patch(loose, keys.mine)
    assert (manifest.name, signature.name) == ("v2.manifest.json", "v2.sig")
    assert json.loads(manifest.read_text()) == {
        "kind": "nest-runtime-patch",
        "format": 1,
        "name": "test",
        "version": "v2",
        "serial": 2,
        "base_hash": BASE_A,
        "digest": patch.digest,
        "sha256": result.manifest.sha256,
        "bytes": loose.stat().st_size,
    }
    verified = verify_patch(loose, policy)
    assert (verified.signed_by, verified.key, verified.digest, verified.serial) == (
        keys.public.id,
        "release",
        patch.digest,
        2,
    )
    repo = tmp_path / "repo"
    repo.mkdir()
    for source, name in ((loose, "patch.safetensors"), (manifest, "manifest.json"), (signature, "patch.sig")):
        (repo / name).write_bytes(source.read_bytes())
    (repo / "README.md").write_text("changes on the Hub")
    assert verify_patch(repo, policy) == verify_patch(repo / "patch.safetensors", policy) == verified


def test_the_standard_tool_verifies_a_repository_too(keys: Keys, tmp_path: Path) -> None:
    from model_signing import verifying

    repo = tmp_path / "repo"
    small_patch().save(repo / "patch.safetensors")
    sign_patch(repo, keys.mine)
    (repo / "README.md").write_text("not signed")
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.mine.with_suffix(".pub"))
    config.set_ignore_unsigned_files(True).verify(repo, repo / "patch.sig")


def test_a_signature_by_the_standard_tool_counts_too(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    """So that a hardware key can sign: its owner runs the tool where the key is."""
    from model_signing import hashing, signing

    repo = tmp_path / "repo"
    small_patch().save(repo / "patch.safetensors")
    sign_patch(repo, keys.other)
    (repo / "patch.sig").unlink()
    (repo / "README.md").write_text("not signed")
    config = signing.Config().use_elliptic_key_signer(private_key=keys.mine)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[repo / "README.md"]))
    config.sign(repo, repo / "patch.sig")
    assert verify_patch(repo, policy).signed_by == keys.public.id


def test_what_was_signed_once_verifies_for_ever(state: TrustState, tmp_path: Path) -> None:
    """Files of the first release, made by model-signing 1.1.1."""
    golden, repo = ROOT / "tests" / "data" / "golden_trust_v1", tmp_path / "repo"
    shutil.copytree(golden, repo)
    shutil.copy(ROOT / "tests" / "data" / "golden_v1.safetensors", repo / "patch.safetensors")
    policy = only(read_public_key(repo / "golden.pub"))
    verified = verify_patch(repo, policy)
    assert verified.signed_by == "sha256:" + hashlib.sha256((golden / "golden.pub").read_bytes()).hexdigest()
    assert (verified.name, verified.version, verified.serial) == ("golden", "v1", 7)
    channel = verify_channel(*read_channel(repo, "stable"), policy, "stable")
    channel.check_patch(read_patch(repo / "patch.safetensors"))
    assert state.update_revocations(*read_list(repo), policy).revoked[0].digest == verified.digest


def test_a_forged_signature_is_refused(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    path = small_patch().save(tmp_path / "p.safetensors")
    sign_patch(path, keys.other)
    with pytest.raises(SignatureError, match="was made by the key") as caught:
        verify_patch(path, policy)
    assert keys.public.id[:19] in caught.value.message
    assert caught.value.exit_status == 3
    signature = path.with_suffix(".sig")  # now it claims to be by the trusted key
    signature.write_text(signature.read_text().replace(keys.other_public.id[7:], keys.public.id[7:]))
    with pytest.raises(SignatureError, match="is false"):
        verify_patch(path, policy)


def test_an_altered_patch_is_refused_before_it_is_parsed(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    path = small_patch().save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    small_patch("v1", seed=9).save(path)  # a valid patch, but not the one that was signed
    with pytest.raises(SignatureError, match=r"patch\.safetensors was changed after signing"):
        verify_patch(path, policy)
    path.write_bytes(b"no patch at all")
    with pytest.raises(SignatureError, match="changed after signing"):
        verify_patch(path, policy)


def test_an_altered_manifest_is_refused(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    path = small_patch("v1").save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    manifest = path.with_suffix(".manifest.json")
    manifest.write_text(manifest.read_text().replace('"serial":1', '"serial":7'))
    with pytest.raises(SignatureError, match=r"manifest\.json was changed"):
        verify_patch(path, policy)
    material = read_material(path)
    with pytest.raises(SignatureError, match="another patch: it says serial 7, test@v1 has 1"):
        check_trust(read_patch(path), material, policy)


def test_another_versions_manifest_and_signature_do_not_fit(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    old, new = small_patch("v1"), small_patch("v2", seed=2)
    for replayed in (signed(old, keys.mine), replace(signed(old, keys.mine), manifest=signed(new, keys.mine).manifest)):
        with pytest.raises(SignatureError):
            check_trust(new, replayed, policy)
    with pytest.raises(SignatureError, match="it says version v1, test@v2 has v2"):
        check_trust(new, signed(old, keys.mine), policy)
    other_base = small_patch("v1", base=BASE_B)
    with pytest.raises(SignatureError, match="base_hash"):
        check_trust(other_base, signed(old, keys.mine), policy)


def test_a_signature_over_something_else_is_not_one_over_a_patch(keys: Keys, policy: Policy) -> None:
    patch = small_patch()
    data, manifest = to_bytes(patch), signed(patch, keys.mine).manifest
    for files in (
        {"patch.safetensors": data},
        {"manifest.json": manifest},
        {"patch.safetensors": data, "manifest.json": manifest, "README.md": b"x"},
        {"a": data, "b": manifest},
    ):
        signature = sign_files(files, keys.mine)[0]
        with pytest.raises(SignatureError, match="expected exactly"):
            check_trust(patch, Material(manifest, signature), policy)


def test_an_unsigned_patch(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    patch = small_patch()
    path = patch.save(tmp_path / "p.safetensors")
    with pytest.raises(SignatureError, match="is not signed"):
        verify_patch(path, policy)
    lax = with_keys(Policy(require_signature=False), [keys.public], require_signature=False)
    assert verify_patch(path, lax).signed_by is None
    sign_patch(path, keys.other)  # unsigned may pass, falsely signed may not
    with pytest.raises(SignatureError):
        verify_patch(path, lax)
    path.with_suffix(".sig").unlink()
    with pytest.raises(SignatureError, match="is missing"):
        verify_patch(path, lax)


def test_only_files_as_written_here_are_signed(keys: Keys, tmp_path: Path) -> None:
    path = small_patch().save(tmp_path / "p.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
    read_patch(path)  # valid
    with pytest.raises(PatchFormatError, match="not laid out"):
        sign_patch(path, keys.mine)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DigestMismatch):
        sign_patch(path, keys.mine)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"tlogEntries":[]', '"tlogEntries":[{}]'),
        lambda text: text.replace('"keyid":""', '"keyid":"x"'),
        lambda text: text.replace('{"mediaType"', '{"extra":1,"mediaType"'),
        lambda text: text.replace(":{", ": {"),
        lambda text: text[:-1],
        lambda text: text + "\n",
        lambda text: "[]",
        lambda text: "",
        lambda text: json.dumps({**json.loads(text), "dsseEnvelope": None}, separators=(",", ":")),
        lambda text: " " * 70_000,
    ],
)
def test_a_malformed_signature_is_named_as_such(keys: Keys, policy: Policy, change: Any) -> None:
    patch = small_patch()
    good = signed(patch, keys.mine)
    with pytest.raises(SignatureError, match="no signature that can be read"):
        check_trust(patch, replace(good, signature=change(good.signature.decode()).encode()), policy)


QUIET = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@QUIET
@given(
    which=st.sampled_from(["patch", "manifest", "signature"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_of_a_signed_patch_is_refused(
    keys: Keys, policy: Policy, which: str, place: float, bit: int
) -> None:
    patch = small_patch()
    parts = flip({"patch": to_bytes(patch), **vars_of(SIGNED(patch, keys.mine))}, which, place, bit)
    with pytest.raises(SignatureError):
        open_patch(parts["patch"], Material(parts["manifest"], parts["signature"]), policy)


@QUIET
@given(which=st.sampled_from(["data", "signature"]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_revocation_list_or_channel_is_refused(
    keys: Keys, policy: Policy, which: str, place: float, bit: int
) -> None:
    for document, verify in (
        (SIGNED_LIST(keys.mine), lambda d, s: verify_list(d, s, policy)),
        (SIGNED_CHANNEL(keys.mine), lambda d, s: verify_channel(d, s, policy, "stable")),
    ):
        parts = flip(dict(zip(("data", "signature"), document, strict=True)), which, place, bit)
        with pytest.raises(SignatureError):
            verify(parts["data"], parts["signature"])


def flip(parts: dict[str, bytes], which: str, place: float, bit: int) -> dict[str, bytes]:
    data = bytearray(parts[which])
    data[int(place * len(data))] ^= 1 << bit
    return {**parts, which: bytes(data)}


def vars_of(material: Material) -> dict[str, bytes]:
    return {"manifest": material.manifest, "signature": material.signature}


class Once:
    """A function whose first result is kept: one signature serves all examples of a property."""

    def __init__(self, function: Any) -> None:
        self.function, self.result = function, None

    def __call__(self, *arguments: Any) -> Any:
        if self.result is None:
            self.result = self.function(*arguments)
        return self.result


SIGNED = Once(signed)
SIGNED_LIST = Once(lambda key: sign_list(RevocationList(serial=1, updated="2026-07-01T00:00:00Z", revoked=()), key))


def _signed_channel(key: Path) -> tuple[bytes, bytes]:
    from nest_runtime.hub.channels import sign_channel

    return sign_channel(channel_for(small_patch(), "stable", timedelta(days=7), now=NOON), key)


SIGNED_CHANNEL = Once(_signed_channel)


def test_every_byte_of_a_signature_counts(keys: Keys) -> None:
    """Exhaustive where it is cheap: whatever passes the strict reader must fail the cryptography."""
    patch = small_patch()
    good = signed(patch, keys.mine)
    files = good.signed_files(to_bytes(patch))
    from nest_runtime.trust import signing

    survivors = []
    for place in range(len(good.signature)):
        changed = bytearray(good.signature)
        changed[place] ^= 1
        try:
            bundle = signing.read_bundle(bytes(changed), "it")
            signing.check_resources(bundle, files, "it")
        except SignatureError:
            continue
        if bundle.key_id == keys.public.id:
            survivors.append(bytes(changed))
    assert survivors  # bytes of the payload's layout and of the signature itself
    for changed_signature in survivors[:: max(1, len(survivors) // 25)]:
        with pytest.raises(SignatureError, match="is false"):
            verify_files(files, changed_signature, [keys.public], "it")


def test_verifying_takes_less_than_a_tenth_of_a_second(
    keys: Keys, policy: Policy, state: TrustState, tmp_path: Path
) -> None:
    patch = small_patch("v1")
    material = signed(patch, keys.mine)
    folder = tmp_path / "list"
    revoke(small_patch("v9"), "bad", folder, keys.mine)
    state.update_revocations(*read_list(folder), policy)
    times = []
    for _ in range(7):
        started = time.process_time()
        check_trust(patch, material, policy, state)
        times.append(time.process_time() - started)
    assert min(times) < 0.1


def test_without_the_extra_the_error_says_what_to_install(
    keys: Keys, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_patch().save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: sign_patch(path, keys.mine), lambda: verify_patch(path, policy)):
        with pytest.raises(NestError, match="not installed") as caught:
            call()
        assert "model-signing" in caught.value.hint
