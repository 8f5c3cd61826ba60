"""Wrong input to the commands of publishing and trust: two lines and a status of its kind; help with an example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nest_runtime.cli.main import main
from nest_runtime.trust.keys import generate_keys
from tests.support.store import BASE_B, small_patch

COMMANDS = (
    "push", "pull", "revoke", "channel set", "channel show", "keygen", "sign", "verify", "revocations",
    "list", "add", "remove", "activate", "rollback", "history", "gc", "serve",
)  # fmt: skip
FAILED, USAGE, TRUST = 1, 2, 3

# {file}: an unsigned patch file; {signed}: a signed one; {mirror}: a mirror with v2, and a signed channel.
WRONG = [
    ("push", USAGE, "missing"),
    ("push {file}", USAGE, "missing"),
    ("push nothing.safetensors {tmp}/m", FAILED, "no patch file"),
    ("push v99 {tmp}/m", FAILED, "no patch 'v99'"),
    ("push {file} a/b/c", USAGE, "names no repository"),
    ("push {file} hf://name", USAGE, "no Hub reference"),
    ("push {file} {tmp}/m@v1", USAGE, "names a revision"),
    ("push {file} {tmp}/m --key {tmp}/none.key", USAGE, "cannot be read"),
    ("push {file} {tmp}/m --key {public}", USAGE, "private key"),
    ("push {file} {tmp}/m --results {file}", FAILED, "results"),
    ("push {file} {tmp}/m --timeout 0", USAGE, "timeout"),
    ("push {file} {tmp}/m --license", USAGE, "license"),
    ("push {other} {mirror}", FAILED, "already has v2"),
    ("push {foreign} {mirror}", FAILED, "holds patches with base_hash"),
    ("push {file} {mirror}", TRUST, "serial"),
    ("pull {tmp}/none", FAILED, "no mirror"),
    ("pull a/b/c", USAGE, "names no repository"),
    ("pull {mirror}@v7", FAILED, "no revision 'v7'"),
    ("pull {mirror}@v2 --trust {tmp}/none.pub", USAGE, "cannot be read"),
    ("pull {mirror}@v2 --trust {private}", USAGE, "private key"),
    ("pull {mirror}@v2 --require-signature", USAGE, "no key is trusted"),
    ("pull {mirror}@v2 --trust {stranger} --require-signature", TRUST, "was made by the key"),
    ("pull {mirror}@v2 --trust-policy {file}", USAGE, "trust policy"),
    ("revoke {file} --reason x", USAGE, "must be signed"),
    ("revoke {file} --key {private}", USAGE, "reason"),
    ("revoke {file} --key {private} --reason x", USAGE, "where is test@v1 published"),
    ("revoke v99 --key {private} --reason x --to {mirror}", FAILED, "no patch 'v99'"),
    ("channel set {mirror} stable v9 --key {private}", FAILED, "no version 'v9'"),
    ("channel set {mirror} stable v2", TRUST, "is signed"),
    ("channel set {mirror} stable v2 --key {private} --valid soon", USAGE, "--valid is 'soon'"),
    ("channel set {mirror} ../stable v2 --key {private}", USAGE, "no channel"),
    ("channel set {mirror} stable", USAGE, "missing"),
    ("channel show {damaged} stable --trust {public}", TRUST, "changed after signing"),
    ("channel show {mirror} canary", FAILED, "no channel 'canary'"),
    ("channel show {mirror} stable --trust {stranger}", TRUST, "was made by the key"),
    ("channel nothing", USAGE, "nothing"),
    ("keygen {keys}", USAGE, "never overwritten"),
    ("keygen {tmp}/k --name a/b", USAGE, "stem of a file"),
    ("sign {file}", USAGE, "key"),
    ("sign {file} --key {public}", USAGE, "private key"),
    ("sign {tmp}/none.safetensors --key {private}", FAILED, "no patch file"),
    ("verify {file}", USAGE, "no key is trusted"),
    ("verify {file} --trust {public}", TRUST, "is not signed"),
    ("verify {signed} --trust {stranger}", TRUST, "was made by the key"),
    ("verify {signed} --trust {file}", USAGE, "no public key"),
    ("verify hf://a/b@v1 --trust {public}", USAGE, "is in a repository"),
    ("verify {mirror}/README.md --trust {public}", TRUST, "is not signed"),
    ("revocations {tmp}/none --trust {public}", TRUST, "no revocation list"),
    ("revocations --trust {tmp}/none.pub", USAGE, "cannot be read"),
    ("activate v99", FAILED, "no patch 'v99'"),
    ("activate {file} --require-signature --trust {public}", TRUST, "is not signed"),
    ("activate {file} --model reference", TRUST, "is for model"),
    ("remove reference-safety@v3", FAILED, "comes with the package"),
    ("rollback", FAILED, "nothing to roll back to"),
    ("add {tmp}/none.safetensors", FAILED, "no patch file"),
    ("add {keys}/nest.pub", FAILED, "nest.pub"),
    ("history --last 0", USAGE, "last"),
    ("serve --follow a/b/c", USAGE, "names no repository"),
    ("serve --follow {tmp}/none", FAILED, "no mirror"),
    ("serve --follow {mirror} --every never", USAGE, "--every is 'never'"),
    ("serve --follow {mirror} --every 0s", USAGE, "--every is '0s'"),
    ("serve --follow {mirror} --admission-min-refused 2", USAGE, "admission-min-refused"),
    ("serve --follow {mirror} --admission-probes {file}", FAILED, "probes"),
    ("serve --follow {mirror} --admission-probes {empty}", FAILED, "hold no prompt"),
    ("serve --follow {mirror} --trust {stranger} --require-signature", TRUST, "was made by the key"),
    ("serve --follow {mirror} --trust {public} --require-signature", TRUST, "for model"),
    ("serve --require-signature", USAGE, "no key is trusted"),
    ("serve --max-queue abc", USAGE, "; found 'abc'"),
    ("serve --swap-policy foo", USAGE, "--swap-policy is 'foo'"),
    ("serve --engine fast", USAGE, "no engine 'fast'"),
    ("serve --device gpu7", USAGE, "'gpu7' cannot be used"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the lines of WRONG name."""
    tmp = tmp_path_factory.mktemp("places")
    private, public, _ = generate_keys(tmp / "keys")
    files = {
        "file": small_patch("v1"),
        "signed": small_patch("v2", seed=2),
        "other": small_patch("v2", seed=3),
        "foreign": small_patch("v3", base=BASE_B),
    }
    found = {name: str(patch.save(tmp / f"{name}.safetensors")) for name, patch in files.items()}
    stranger = generate_keys(tmp / "stranger")[1]
    found |= {"tmp": str(tmp), "keys": str(tmp / "keys"), "private": str(private), "public": str(public)}
    found |= {"stranger": str(stranger)}
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("NEST_HOME", str(tmp / "home"))
        assert main(["sign", found["signed"], "--key", str(private)]) == 0
        for mirror in ("mirror", "damaged"):
            found[mirror] = str(tmp / mirror)
            assert main(["push", found["signed"], found[mirror], "--key", str(private), "--channel", "stable"]) == 0
    (tmp / "damaged" / "channels" / "stable.json").write_text("garbage")
    (tmp / "empty").write_text("{}")
    return found | {"empty": str(tmp / "empty")}


@pytest.mark.parametrize(("line", "status", "words"), WRONG, ids=[line for line, _, _ in WRONG])
def test_wrong_input_is_two_lines(
    places: dict[str, str], line: str, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(line.format(**places).split()) == status
    out, err = capsys.readouterr()
    assert out == ""
    lines = [text for text in err.splitlines() if not text.startswith("loading ")]  # what serve is about to do
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert words in lines[0]
    assert len(lines[1]) > 12
    assert "Traceback" not in err


def test_a_damaged_channel_is_set_again_and_not_signed(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["channel", "show", places["damaged"], "stable", "--trust", places["public"]]) == TRUST
    assert "nest-runtime channel set" in capsys.readouterr().err.splitlines()[-1]


def test_a_push_that_is_refused_leaves_no_signature(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEST_HOME", str(tmp_path))
    assert main(["push", places["file"], places["mirror"], "--key", places["private"]]) == TRUST
    assert "serial" in capsys.readouterr().err
    assert main(["verify", places["file"], "--trust", places["public"]]) == TRUST
    assert "is not signed" in capsys.readouterr().err


def test_who_revokes_obeys(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEST_HOME", str(tmp_path / "home"))
    key, trust = ["--key", places["private"]], ["--trust", places["public"]]
    assert main(["verify", places["signed"], *trust]) == 0
    assert main(["revoke", places["signed"], "--reason", "a leak", "--to", str(tmp_path / "m"), *key]) == 0
    capsys.readouterr()
    assert main(["verify", places["signed"], *trust]) == TRUST
    assert "a leak" in capsys.readouterr().err
    assert main(["revocations", *trust]) == 0
    assert "test@v2" in capsys.readouterr().out
    # Another repository has a list of its own by the same key; this machine goes by one of them, and says so.
    assert main(["revoke", places["file"], "--reason", "worse", "--to", str(tmp_path / "n"), *key]) == 0
    assert "this machine still trusts it" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"nest-runtime {command}" in text.partition("Example")[2]


def test_following_is_among_the_examples_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    assert "--follow hf://" in capsys.readouterr().out.partition("Example")[2]


def test_help_needs_none_of_the_machinery() -> None:
    code = (
        "import sys\nfrom nest_runtime.cli.main import main\nmain(['push', '--help'])\n"
        "print([name for name in ('torch', 'huggingface_hub', 'model_signing', 'fsspec') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True, timeout=60
    )
    assert found.stdout.rstrip().endswith("[]")
