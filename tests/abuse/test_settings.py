"""Policies, switches and secret files that cannot be read as they are meant: an error, never a weaker setting."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from nest_runtime.demo.server import read_logins
from nest_runtime.demo.start import Source, open_demo
from nest_runtime.errors import UsageError
from nest_runtime.serve.tokens import read_tokens
from nest_runtime.serve.vllm.plugin import config_from
from tests.abuse.conftest import Run, refused
from tests.support.trust import Keys

BOM = b"\xef\xbb\xbf"


def strict(keys: Keys) -> str:
    return f'[[keys]]\nname = "release"\nfile = "{keys.mine.with_suffix(".pub")}"\nnames = ["*"]\n'


def test_a_policy_that_is_a_link_to_nowhere(run: Run, home: Path, files: dict[str, Path]) -> None:
    (home / "trust.toml").symlink_to(home / "elsewhere.toml")
    refused(run("activate", files["v1"]), 2, "trust.toml", "cannot be read")


def test_a_home_that_is_a_link_to_nowhere(
    run: Run, home: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = home.with_name("not-mounted")
    link.symlink_to(home / "missing")
    monkeypatch.setenv("NEST_HOME", str(link))
    refused(run("activate", files["v1"]), 2, "link to nowhere")


@pytest.mark.parametrize("make", ["folder", "pipe", "two", "utf-16", "deep toml", "deep json"])
def test_a_policy_that_cannot_be_understood(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], make: str
) -> None:
    import os

    path = home / "trust.toml"
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "two":
        path.write_text(strict(keys))
        (home / "trust.json").write_text('{"format": 1, "require_signature": false}')
    elif make == "utf-16":
        path.write_bytes(strict(keys).encode("utf-16"))
    elif make == "deep toml":
        path.write_text("a = " + "[" * 50_000 + "]" * 50_000)
    else:
        (home / "trust.json").write_text("[" * 100_000 + "]" * 100_000)
    refused(run("activate", files["v1"]), 2, "trust polic")


def test_a_policy_with_a_byte_order_mark_counts(run: Run, home: Path, keys: Keys, files: dict[str, Path]) -> None:
    (home / "trust.toml").write_bytes(BOM + strict(keys).replace("\n", "\r\n").encode())
    refused(run("activate", files["v1"]), 3, "is not signed")


@pytest.mark.parametrize("document", ["v1.manifest.json", "v1.sig"])
def test_a_document_that_is_nested_beyond_measure(run: Run, keys: Keys, files: dict[str, Path], document: str) -> None:
    assert run("sign", files["v1"], "--key", keys.mine).status == 0
    files["v1"].with_name(document).write_text('{"a":' * 9_000 + "1" + "}" * 9_000)
    # Python 3.13 reads more levels, and what they hold is then no document of ours.
    why = [] if sys.version_info >= (3, 13) else ["nested too deeply"]
    refused(run("verify", files["v1"], "--trust", keys.mine.with_suffix(".pub")), 3, *why)


@pytest.mark.parametrize(("word", "on"), [("true", True), ("yes", True), ("On", True), ("1", True), ("0", False)])
def test_a_switch_in_the_environment(word: str, on: bool) -> None:
    args = Namespace(
        model="m", served_model_name=None, host=None, port=1, trust_remote_code=False, max_num_seqs=1,
        shutdown_timeout=1, revision=None,
    )  # fmt: skip
    made = config_from(args, {"NEST_REQUIRE_SIGNATURE": word, "NEST_EXPOSE_BASE": word})
    assert (made.require_signature, made.expose_base) == (on, on)
    with pytest.raises(UsageError, match="NEST_REQUIRE_SIGNATURE is 'maybe'"):
        config_from(args, {"NEST_REQUIRE_SIGNATURE": "maybe"})


def secret(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_secrets_of_other_systems(tmp_path: Path, mark: bytes, ends: bytes) -> None:
    tokens = secret(tmp_path / "tokens", mark + ends.join((b"first", b"# a comment", b"", b"  second ")))
    assert read_tokens(tokens, "admin token file", secret=True).secrets == ("first", "second")
    logins = secret(tmp_path / "logins", mark + ends.join((b"ann:one", b"bob:two words")))
    assert read_logins(logins) == {"ann": "one", "bob": "two words"}


def test_keys_of_other_systems(run: Run, keys: Keys, files: dict[str, Path], tmp_path: Path) -> None:
    """A byte order mark and other line ends around PEM."""
    for path in (keys.mine, keys.mine.with_suffix(".pub")):
        secret(tmp_path / path.name, BOM + path.read_bytes().replace(b"\n", b"\r\n"))
    assert run("sign", files["v1"], "--key", tmp_path / keys.mine.name).status == 0
    assert run("verify", files["v1"], "--trust", tmp_path / "release.pub").status == 0
    assert run("verify", files["v1"], "--trust", keys.mine.with_suffix(".pub")).status == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_secrets_that_others_may_read(tmp_path: Path, mode: int) -> None:
    tokens = secret(tmp_path / "tokens", b"first\n", mode)
    with pytest.raises(UsageError, match=f"by others \\(mode {mode:o}\\)"):
        read_tokens(tokens, "admin token file", secret=True)
    with pytest.raises(UsageError, match="by others"):
        read_logins(secret(tmp_path / "logins", b"ann:one\n", mode))
    for files in ({"admin_token_file": tokens}, {"api_key_file": tokens}):
        with pytest.raises(UsageError, match="by others"):
            open_demo(Source(url="http://127.0.0.1:9", **files))


def test_a_server_shares_its_api_keys_with_whom_it_likes(tmp_path: Path) -> None:
    assert read_tokens(secret(tmp_path / "keys", b"k\n", 0o644), "API key file").secrets == ("k",)
    with pytest.raises(UsageError, match="can be written by others"):
        read_tokens(secret(tmp_path / "keys", b"k\n", 0o664), "API key file")


@pytest.mark.parametrize("token", ["a\0b", "pässword", "a\x1bb", "a\u200bb", "a\tb", "\ufeffx\ufeff"])
def test_a_token_that_no_request_can_carry(tmp_path: Path, token: str) -> None:
    """It would never match, and nobody would be told."""
    tokens = secret(tmp_path / "tokens", f"good\n{token}\n".encode())
    with pytest.raises(UsageError, match=r"tokens, line 2: .* no request can carry") as caught:
        read_tokens(tokens, "admin token file", secret=True)
    assert token not in str(caught.value)  # it is a secret all the same
