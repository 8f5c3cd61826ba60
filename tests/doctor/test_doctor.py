"""The commands doctor and bench: what is wrong is found and said, in bounded time; speed is measured in seconds."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.cli.main import main
from nest_runtime.io import nest_home
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.store.store import Store
from tests.support.hub_server import HubServer
from tests.support.store import small_patch

pytest_plugins = ["tests.support.hub"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(item) for item in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def examined(run: Any, *arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
    status, text, _ = run("doctor", "--json", *arguments)
    document = json.loads(text)
    assert document["ok"] == (status == 0)
    return status, {row["name"]: row for row in document["checks"]}


def test_a_healthy_installation(run: Any) -> None:
    status, found = examined(run)
    assert status == 0
    assert [name for name, row in found.items() if row["status"] == "problem"] == []
    assert "torch 2." in found["packages"]["found"]
    assert "HF_HUB_OFFLINE" in found["hub"]["found"]
    assert found["store"]["status"] == "ok"
    assert not Path(Store().root).exists()  # looking makes nothing
    status, text, errors = run("doctor")
    assert (status, errors) == (0, "")
    assert "all is well" in text
    assert "\x1b" not in text
    assert "\\n" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert all(line == line.rstrip() for line in text.splitlines())


def test_an_active_patch_is_named(run: Any) -> None:
    store = Store()
    store.add(small_patch())
    assert examined(run)[1]["active patches"]["advice"]
    store.activate("test@v1")
    assert examined(run)[1]["active patches"] == {
        "name": "active patches",
        "status": "ok",
        "found": "test@v1 for tiny-a",
        "advice": "",
    }


def test_damaged_bytes_in_the_store_are_a_problem(run: Any) -> None:
    store = Store()
    store.add(small_patch())
    (path,) = (store.root / "objects").glob("*/*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    status, found = examined(run)
    assert status == 1
    assert found["store"]["status"] == "problem"
    assert "test@v1" in found["store"]["found"]
    status, text, errors = run("doctor")
    assert (status, errors) == (1, "")
    assert "1 problem, see above" in text
    assert "-> " in text


def test_an_edited_history_is_a_problem(run: Any) -> None:
    store = Store()
    store.add(small_patch())
    path = store.root / "history.jsonl"
    path.write_text(path.read_text().replace('"add"', '"bad"'))
    assert "was edited" in examined(run)[1]["store"]["found"]


def test_a_policy_that_refuses_what_is_active_is_a_problem(run: Any, tmp_path: Path) -> None:
    home = Path(Store().root).parent
    store = Store()
    store.add(small_patch())
    store.activate("test@v1")
    assert main(["--quiet", "keygen", str(tmp_path / "keys"), "--json"]) == 0
    (public,) = (tmp_path / "keys").glob("*.pub")
    (home / "trust.toml").write_text(f'format = 1\n[[keys]]\nname = "k"\nfile = "{public}"\nnames = ["*"]\n')
    status, found = examined(run)
    assert status == 1
    assert "test@v1 is active, but refused" in found["trust policy"]["found"]
    (home / "trust.toml").write_text("format = 7\n")
    assert "format" in examined(run)[1]["trust policy"]["found"]


def test_a_home_that_cannot_be_written_is_a_problem(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEST_HOME", str(tmp_path / "file" / "home"))
    found = examined(run)[1]["home"]
    assert found["status"] == "problem"
    assert "NEST_HOME" in found["advice"]


def test_a_requirement_that_is_not_met_is_a_problem(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nest_runtime.doctor import machine

    genuine = machine.metadata.version
    old = {"torch": "1.0", "scikit-learn": None}

    def version(name: str) -> str:
        if name not in old:
            return genuine(name)
        if old[name] is None:
            raise machine.metadata.PackageNotFoundError(name)
        return str(old[name])

    monkeypatch.setattr(machine.metadata, "version", version)
    found = examined(run)[1]["packages"]
    assert "torch is 1.0; expected " in found["found"]
    assert "scikit-learn is missing" in found["found"]
    assert found["advice"].startswith("pip install")


def test_the_hub_answers(run: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    status, text, _ = run("doctor", "--json")
    found = {row["name"]: row for row in json.loads(text)["checks"]}
    assert status == 0
    assert found["hub"]["status"] == found["hub token"]["status"] == "ok"
    assert found["hub"]["found"].endswith("as alice")
    assert "hf_alice" not in text
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, found = examined(run)
    assert status == 1
    assert "401" in found["hub"]["found"]
    assert "hf auth login" in found["hub"]["advice"]


def test_a_hub_that_is_out_of_order_or_gone_is_a_note(
    run: Any,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.fault("status", "whoami", status=503)
    status, found = examined(run)
    assert (status, found["hub"]["status"]) == (0, "note")
    assert "503" in found["hub"]["found"]
    with socket.socket() as taken:  # nothing listens here
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        status, found = examined(run)
    assert (status, found["hub"]["status"]) == (0, "note")
    assert "works without it" in found["hub"]["advice"]


def test_a_hub_that_never_answers_is_waited_for_in_bounds(
    run: Any,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        examined(run, "--timeout", 0.1)  # imports
        began = time.monotonic()
        status, found = examined(run, "--timeout", 0.5)
    assert (status, found["hub"]["status"]) == (0, "note")
    assert time.monotonic() - began < 10


def test_an_unexpected_failure_of_one_check_leaves_the_others(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("nest_runtime.model.fingerprint.hash_report", broken)
    status, found = examined(run)
    assert status == 1
    assert "ZeroDivisionError: of all things" in found["reference model"]["found"]
    assert found["store"]["status"] == "ok"


def test_bench_of_a_model_without_patches(run: Any, tiny_llama: Path) -> None:
    status, text, errors = run("bench", "--model", tiny_llama, "--seconds", "0.1", "--prompt-tokens", "9999", "--json")
    assert status == 0, errors
    document = json.loads(text)
    assert [row["mode"] for row in document["rows"]] == ["base", "hook", "fold"]
    assert document["rows"][0]["prefill_vs_base"] == document["rows"][0]["decode_vs_base"] == 1.0
    for row in document["rows"]:
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
    assert set(document["switch_ms"]) == {"hook", "fold"}
    assert document["rounds"] >= 3
    assert document["prompt_tokens"] == 512  # the model's context
    assert document["patch"] == "random@bench"


def test_bench_prints_a_table_and_takes_a_patch(run: Any, tiny_llama: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    from nest_runtime.model.load import load_model
    from tests.support.patches import make_patch

    loaded = load_model(str(tiny_llama))
    path = make_patch(loaded.model, base_hash=loaded.hash).save(tmp_path / "p.safetensors")
    common = ("--seconds", "0.1", "--prompt-tokens", "8", "--batch", "2")
    status, text, errors = run("bench", "--model", tiny_llama, "--patch", path, *common)
    assert status == 0, errors
    assert "test@v1" in text
    assert "ANSWER TOK/S" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    status, _, errors = run("bench", "--model", tiny_qwen, "--patch", path, *common)
    assert status == 3
    assert errors.startswith("error: ")


def test_an_audit_log_that_was_cut_is_a_problem(run: Any) -> None:
    log = AuditLog(nest_home() / "audit.jsonl")
    for number in range(3):
        log.record({"what": "activate", "number": number})
    assert "3 entries" in examined(run)[1]["audit log"]["found"]
    kept = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(kept[:-1]))
    status, found = examined(run)
    assert status == 1
    assert "line" in found["audit log"]["found"]
    assert "missing" in found["audit log"]["found"]
