"""The verifier of one file: against the package, against ``cryptography``, and alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import nest_verify
from nest_runtime.errors import NestError
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.trust.check import sign_patch, verify_patch
from nest_runtime.trust.keys import read_public_key
from tests.patch.test_claims import claimed
from tests.support.store import BASE_A, BASE_B, small_patch
from tests.support.trust import Keys, make_keys, only

SCRIPT = Path(nest_verify.__file__)
GOLDEN = Path(__file__).parents[1] / "data" / "golden_trust_v1"
HASHES = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}
EC = {"secp256r1": ec.SECP256R1(), "secp384r1": ec.SECP384R1(), "secp521r1": ec.SECP521R1()}
Said = tuple[int, str]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tmp_path: Path, keys: Keys) -> Path:
    path = small_patch("v3").save(tmp_path / "v3.safetensors")
    sign_patch(path, keys.mine)
    return path


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], keys: Keys) -> Callable[..., Said]:
    """The script's exit status and its one line, with the publisher's key and no base unless others are given."""

    def call(path: Path, *words: object, key: bool = True, base: bool = False) -> Said:
        capsys.readouterr()
        more = [*(["--key", keys.mine.with_suffix(".pub")] if key else []), *([] if base else ["--no-base"])]
        status = nest_verify.main([str(word) for word in (path, *more, *words)])
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1
        return status, out

    return call


def test_a_good_patch_passes(signed: Path, check: Callable[..., Said], keys: Keys) -> None:
    status, line = check(signed, "--base-hash", BASE_A, "--name", "test", "--min-serial", 3, "--json", base=True)
    assert status == 0
    assert json.loads(line) == {
        "ok": True,
        "name": "test",
        "version": "v3",
        "serial": 3,
        "digest": small_patch("v3").digest,
        "base_hash": BASE_A,
        "signed_by": keys.public.id,
        "base_checked": True,
    }
    assert check(signed)[1].startswith("good: test@v3 sha256:")


def test_a_folder_as_repositories_have_it(tmp_path: Path, keys: Keys, check: Callable[..., Said]) -> None:
    folder = tmp_path / "repo"
    small_patch("v3").save(folder / "patch.safetensors")
    sign_patch(folder, keys.mine)
    assert check(folder)[0] == 0
    (folder / "patch.sig").unlink()
    assert check(folder) == (3, f"refused: the patch is not signed: there is no '{folder}/patch.sig'\n")


def test_what_an_earlier_release_signed_passes() -> None:
    words = ["--key", str(GOLDEN / "golden.pub"), "--base-hash", "sha256:" + "0" * 64]
    golden = GOLDEN.parent / "golden_v1.safetensors"
    assert nest_verify.read_patch(str(golden))[0]["name"] == "golden"
    files = {"patch.safetensors": golden, "manifest.json": GOLDEN / "manifest.json", "patch.sig": GOLDEN / "patch.sig"}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            shutil.copy(path, Path(folder) / name)
        assert nest_verify.main([folder, *words]) == 0


def test_a_patch_with_claims_passes(tmp_path: Path, keys: Keys, check: Callable[..., Said]) -> None:
    path = claimed().save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    assert check(path)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base-hash", BASE_B), "is for base"),
        (("--no-base", "--name", "other"), "expected one called other"),
        (("--no-base", "--min-serial", "4"), "has serial 3; expected 4 or more"),
        (("--no-base", "--digest", BASE_A), "expected sha256:aaaa"),
    ],
)
def test_what_was_not_asked_for_is_refused(
    signed: Path, check: Callable[..., Said], words: tuple[str, ...], said: str
) -> None:
    status, line = check(signed, *words, base=True)
    assert (status, said in line) == (3, True)


def test_signatures_that_do_not_count(tmp_path: Path, signed: Path, keys: Keys, check: Callable[..., Said]) -> None:
    stranger = tmp_path / "stranger.safetensors"
    shutil.copy(signed, stranger)
    sign_patch(stranger, keys.other)
    assert check(stranger)[0] == 3
    assert "none of those given" in check(stranger)[1]
    assert check(stranger, "--key", keys.other.with_suffix(".pub"))[0] == 0
    other = small_patch("v3", seed=9).save(tmp_path / "other.safetensors")
    for suffix in (".sig", ".manifest.json"):
        shutil.copy(signed.with_suffix(suffix), other.with_suffix(suffix))
    assert check(other) == (3, check(other)[1])
    assert "the manifest is of another patch" in check(other)[1]
    sign_patch(other, keys.mine)
    shutil.copy(signed.with_suffix(".sig"), other.with_suffix(".sig"))  # a true signature, over another patch
    assert "over other files" in check(other)[1]
    forged = (
        signed.with_suffix(".sig").read_bytes().replace(keys.public.id[7:].encode(), keys.other_public.id[7:].encode())
    )
    signed.with_suffix(".sig").write_bytes(forged)
    status, line = check(signed, "--key", keys.other.with_suffix(".pub"))
    assert (status, "false" in line) == (3, True)
    bare = small_patch("v1").save(tmp_path / "bare.safetensors")
    assert check(bare)[0] == 3
    assert check(bare, "--unsigned", key=False)[0] == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    path = small_patch("v3").save(tmp_path_factory.mktemp("whole") / "p.safetensors")
    sign_patch(path, keys.mine)
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_bit_of_the_three_files_can_change(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, keys: Keys, data: st.DataObject
) -> None:
    path = Path(shutil.copytree(whole.parent, tmp_path_factory.mktemp("flip") / "x")) / whole.name
    victim = data.draw(st.sampled_from([path, path.with_suffix(".manifest.json"), path.with_suffix(".sig")]))
    content = bytearray(victim.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += data.draw(st.binary(min_size=1, max_size=9))
    victim.write_bytes(bytes(content))
    words = [str(path), "--key", str(keys.mine.with_suffix(".pub")), "--no-base"]
    assert nest_verify.main(words) in (1, 3)
    with pytest.raises(NestError):
        verify_patch(path, only(keys.public))


# The base.


def test_the_base_is_hashed_as_the_package_does(tmp_path: Path, tiny_llama: Path) -> None:
    from nest_runtime.reference import MODEL_FOLDER

    assert nest_verify.model_hash(str(tiny_llama)) == model_hash(tiny_llama)
    assert nest_verify.model_hash(str(MODEL_FOLDER)) == model_hash(MODEL_FOLDER)
    embedding = torch.randn(8, 4)
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.1.attn.bias": torch.ones(4),
        "model.ü.weight": torch.randn(3, 3).to(torch.bfloat16),
        "b": torch.zeros(0, 4),
    }
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    save_file(tensors, one / "model.safetensors", {"format": "pt"})
    names = list(tensors)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, two / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    found = {nest_verify.model_hash(str(folder)) for folder in (one, two)}
    assert found == {model_hash(one)} == {model_hash(two)}
    shutil.copy(one / "model.safetensors", one / "named.safetensors")
    (one / "config.json").write_text(json.dumps({"transformers_weights": "named.safetensors"}), encoding="utf-8")
    (one / "model.safetensors").unlink()
    assert {nest_verify.model_hash(str(one))} == found


def test_a_base_that_was_changed_is_refused(
    tmp_path: Path, tiny_llama: Path, keys: Keys, check: Callable[..., Said]
) -> None:
    path = small_patch("v1", base=model_hash(tiny_llama)).save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    assert check(path, "--base", base, base=True)[0] == 0
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert check(path, "--base", base, base=True)[0] == 3
    weights.write_bytes(bytes(content[:-1]))
    assert check(path, "--base", base, base=True)[0] == 1
    weights.unlink()
    assert check(path, "--base", base, base=True)[0] == 1


# ECDSA.


@pytest.mark.parametrize("name", EC)
def test_signatures_are_judged_as_cryptography_does(name: str, tmp_path: Path) -> None:
    """True ones of many keys; false ones in their numbers, their form, their message and their key."""
    curve = nest_verify.CURVES[list(EC).index(name)]
    stranger = ec.generate_private_key(EC[name])
    for number in range(6 if name == "secp256r1" else 2):
        key = ec.generate_private_key(EC[name])
        pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / "k.pub").write_bytes(pem)
        key_id, found, point = nest_verify.read_key(str(tmp_path / "k.pub"))
        assert found is curve
        assert f"sha256:{key_id}" == read_public_key(tmp_path / "k.pub").id
        message = os.urandom(number * 17)
        signature = key.sign(message, ec.ECDSA(HASHES[name]))
        assert curve.verify(point, message, signature)
        assert not curve.verify(point, message + b"x", signature)
        assert not curve.verify(point, message, stranger.sign(message, ec.ECDSA(HASHES[name])))
        r, s = nest_verify.der_pair(signature)
        for pair in (
            (r, curve.n - s),
            (s, r),
            (r, s + curve.n),
            (0, s),
            (r, 0),
            (curve.n, s),
            (r + curve.n, s),
            (1, 1),
        ):
            _agree(curve, key, point, message, _der(*pair), HASHES[name])
        for at in range(number, len(signature), 9):
            changed = bytearray(signature)
            changed[at] ^= 1 << (number % 8)
            _agree(curve, key, point, message, bytes(changed), HASHES[name])
        for odd in (b"", signature + b"\0", signature[:-1], b"\x30\x80" + signature[2:], b"\x30\x00"):
            _agree(curve, key, point, message, odd, HASHES[name])


def _agree(
    curve: nest_verify.Curve,
    key: ec.EllipticCurvePrivateKey,
    point: tuple[int, int],
    message: bytes,
    signature: bytes,
    hashed: hashes.HashAlgorithm,
) -> None:
    try:
        key.public_key().verify(signature, message, ec.ECDSA(hashed))
        expected = True
    except InvalidSignature:
        expected = False
    assert curve.verify(point, message, signature) == expected, signature.hex()


def _der(r: int, s: int) -> bytes:
    def whole(value: int) -> bytes:
        data = value.to_bytes(value.bit_length() // 8 + 1, "big")
        return b"\x02" + bytes([len(data)]) + data

    body = whole(r) + whole(s)
    return b"\x30" + (bytes([len(body)]) if len(body) < 128 else b"\x81" + bytes([len(body)])) + body


def test_keys_that_are_none(tmp_path: Path, signed: Path, check: Callable[..., Said], keys: Keys) -> None:
    pem = keys.public.pem
    broken = bytearray(pem)
    broken[60] = ord("A") if broken[60] != ord("A") else ord("B")
    for content in (
        b"",
        b"hello",
        keys.mine.read_bytes(),
        pem + pem,
        bytes(broken),
        pem.replace(b"PUBLIC", b"PRIVATE"),
    ):
        path = tmp_path / "odd.pub"
        path.write_bytes(content)
        assert check(signed, "--key", path, key=False)[0] == 1
    for content in (b"\xef\xbb\xbf" + pem, pem.replace(b"\n", b"\r\n")):  # as editors leave them
        path.write_bytes(content)
        assert check(signed, "--key", path, key=False)[0] == 0


# Files that are no files, and how it is run.


def test_special_files_neither_hang_nor_grow(
    tmp_path: Path, signed: Path, keys: Keys, check: Callable[..., Said]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, tmp_path / "nowhere", Path("a\0b")):
        assert check(path)[0] == 1
    for name in (".sig", ".manifest.json"):
        kept = signed.with_suffix(name).read_bytes()
        for target in ("/dev/zero", str(tmp_path / "pipe")):
            signed.with_suffix(name).unlink()
            signed.with_suffix(name).symlink_to(target)
            assert check(signed)[0] == 1
        signed.with_suffix(name).unlink()
        signed.with_suffix(name).write_bytes(kept)
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "model.safetensors")
    assert check(signed, "--base", tmp_path / "model", base=True)[0] == 1


def test_names_of_others_cannot_write_to_the_terminal(tmp_path: Path, check: Callable[..., Said]) -> None:
    status, line = check(tmp_path / "x\x1b]0;owned\x07\u202e.safetensors")
    assert status == 1
    assert line.isascii()
    assert line.strip().isprintable()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--key", "k.pub"),
        ("--no-base",),
        ("--key", "k.pub", "--unsigned", "--no-base"),
        ("--unsigned", "--no-base", "--base-hash", BASE_A),
        ("--unsigned", "--base-hash", "v3"),
        ("--unsigned", "--no-base", "--digest", "abc"),
    ],
)
def test_what_is_not_asked_for_by_name_is_not_left_out(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        nest_verify.main(["v3.safetensors", *words])
    assert caught.value.code == 2


def test_it_runs_alone(tmp_path: Path, signed: Path, keys: Keys, tiny_llama: Path) -> None:
    """In a process that sees the standard library and nothing else."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(SCRIPT, alone / "nest_verify.py")
    command = [sys.executable, "-I", "-S", str(alone / "nest_verify.py")]
    probe = subprocess.run([*command[:3], "-c", "import nest_runtime"], capture_output=True, check=False, cwd=alone)
    assert probe.returncode == 1
    given = ["--key", str(keys.mine.with_suffix(".pub"))]
    good = subprocess.run(
        [*command, str(signed), *given, "--base-hash", BASE_A], capture_output=True, text=True, check=False
    )
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run(
        [*command, str(signed), *given, "--base", str(tiny_llama)], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 3
    assert bad.stdout.startswith("refused: test@v3 is for base")


def test_it_is_in_the_wheel() -> None:
    project = tomllib.loads((SCRIPT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    targets = project["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["force-include"]["nest_verify.py"] == "nest_verify.py"
    assert "nest_verify.py" in targets["sdist"]["include"]
