"""Patch references: files, the store, digests, and the Hub (a small server of its own, the client unmodified)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from nest_runtime.errors import DigestMismatch, HubError, PatchNotFound, TrustError, UsageError
from nest_runtime.resolve import load_patch
from nest_runtime.store import entries
from nest_runtime.store.entries import is_path
from nest_runtime.store.store import Store
from tests.support.hub import quick_tries
from tests.support.store import BASE_A, BASE_B, small_patch


@pytest.fixture(autouse=True)
def no_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "builtin_patches_dir", lambda: tmp_path / "builtin")


def test_a_file_is_read_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = small_patch("v1")
    path = patch.save(tmp_path / "sub" / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ref in (path, str(path), "sub/x.safetensors", "./sub/x.safetensors", "~/sub/x.safetensors"):
        assert load_patch(ref) == patch
    monkeypatch.chdir(tmp_path / "sub")
    assert load_patch("x.safetensors") == patch


def test_a_bare_word_never_means_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_patch("v1", seed=1).save(tmp_path / "v1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PatchNotFound):
        load_patch("v1")
    Store().add(small_patch("v1"))
    assert load_patch("v1") == small_patch("v1")


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("v3", False),
        ("name@v3", False),
        ("sha256:abcd", False),
        ("hf://org/repo@v3", False),
        ("x.safetensors", True),
        ("a/b", True),
        ("./v3", True),
        ("~/v3", True),
        (Path("v3"), True),
    ],
)
def test_what_is_a_path(ref: str | Path, expected: bool) -> None:
    assert is_path(ref) is expected


def test_files_that_are_not_there(tmp_path: Path) -> None:
    small_patch("v1").save(tmp_path / "good.safetensors")
    with pytest.raises(PatchNotFound) as caught:
        load_patch(tmp_path / "goood.safetensors")
    assert "good.safetensors" in caught.value.hint
    with pytest.raises(PatchNotFound, match="is a folder"):
        load_patch(tmp_path)
    with pytest.raises(PatchNotFound):
        load_patch("no/such/folder/x.safetensors")


def test_the_store_is_asked_for_versions_of_the_model_at_hand(tmp_path: Path) -> None:
    store = Store(tmp_path / "elsewhere")
    a, b = small_patch("v1", base=BASE_A), small_patch("v1", base=BASE_B, seed=1)
    store.add(a)
    store.add(b)
    assert load_patch("v1", model_hash=BASE_A, store=store) == a
    assert load_patch("test@v1", model_hash=BASE_B, store=store) == b
    assert load_patch(b.digest, model_hash=BASE_A, store=store) == b  # a digest names one patch: the runtime refuses it
    with pytest.raises(UsageError):
        load_patch("v1", store=store)
    with pytest.raises(PatchNotFound):
        load_patch("v1")


class Hub:
    """A repository ``org/repo`` of commits with one file each, over the routes that the client uses."""

    def __init__(self) -> None:
        self.commits: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                parts = unquote(self.path).strip("/").split("/")
                if parts[:4] == ["api", "models", "org", "repo"]:
                    self.about(parts[4:])
                elif parts[:3] == ["org", "repo", "resolve"]:
                    self.file(parts[3], "/".join(parts[4:]))
                else:
                    self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            def about(self, rest: list[str]) -> None:
                if rest == ["refs"]:
                    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in hub.tags.items()]
                    self.answer(200, json.dumps({"branches": [], "converts": [], "tags": tags}).encode())
                    return
                sha = hub.commit(rest[1] if rest else "main")
                if sha is None:
                    self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                else:
                    self.answer(200, json.dumps({"id": "org/repo", "sha": sha, "siblings": []}).encode())

            def file(self, revision: str, name: str) -> None:
                sha = hub.commit(revision)
                if sha is None or name != "patch.safetensors" or not hub.commits[sha]:
                    code = "EntryNotFound" if sha else "RevisionNotFound"
                    self.answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": sha or ""})
                    return
                data = hub.commits[sha]
                tag = f'"{hashlib.sha256(data).hexdigest()}"'
                self.answer(200, data, {"ETag": tag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})

            def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # 0.5 s by default

    def commit(self, revision: str) -> str | None:
        newest = list(self.commits)[-1] if self.commits else None
        return newest if revision == "main" else self.tags.get(revision, revision if revision in self.commits else None)

    def push(self, tag: str, data: bytes) -> str:
        sha = hashlib.sha1(data + tag.encode()).hexdigest()
        self.commits[sha] = data
        self.tags[tag] = sha
        return sha


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield served
    served.server.shutdown()
    served.server.server_close()


def to_bytes(version: str, **fields: object) -> bytes:
    from nest_runtime.patch.write import to_bytes as write

    return write(small_patch(version, **fields))  # type: ignore[arg-type]


def test_a_tag_of_the_hub_is_resolved_to_a_commit(hub: Hub) -> None:
    first = hub.push("v1", to_bytes("v1"))
    hub.push("v2", to_bytes("v2", seed=2))
    assert load_patch("hf://org/repo@v1") == small_patch("v1")
    assert any(f"/resolve/{first}/" in line for line in hub.requests)
    assert load_patch("hf://org/repo") == small_patch("v2", seed=2)
    assert load_patch(f"hf://org/repo@{first}") == small_patch("v1")


def test_what_the_hub_says_no_to(hub: Hub) -> None:
    hub.push("v1", to_bytes("v1"))
    with pytest.raises(HubError, match="no revision 'v7'") as caught:
        load_patch("hf://org/repo@v7")
    assert "v1" in caught.value.hint
    with pytest.raises(HubError, match="no repository org/other"):
        load_patch("hf://org/other@v1")
    hub.push("v8", b"")
    with pytest.raises(HubError, match="no file"):
        load_patch("hf://org/repo@v8")
    with pytest.raises(UsageError, match="no Hub reference"):
        load_patch("hf://repo")


def test_wrong_bytes_and_moved_tags_are_refused(hub: Hub) -> None:
    data = bytearray(to_bytes("v1"))
    data[-1] ^= 1
    hub.push("v1", bytes(data))
    with pytest.raises(DigestMismatch):
        load_patch("hf://org/repo@v1")
    hub.push("v3", to_bytes("v2"))
    with pytest.raises(TrustError, match="holds version v2"):
        load_patch("hf://org/repo@v3")


def test_the_cache_is_checked_too(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.push("v1", to_bytes("v1"))
    load_patch("hf://org/repo@v1")
    for blob in (tmp_path / "hub-cache").rglob("blobs/*"):
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
    with pytest.raises(DigestMismatch):
        load_patch("hf://org/repo@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the cache"):
        load_patch("hf://org/repo@v9")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    quick_tries(monkeypatch)
    with pytest.raises(HubError, match="org/repo") as caught:
        load_patch("hf://org/repo@v1")
    assert "network" in caught.value.hint
