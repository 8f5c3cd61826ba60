"""Push and pull against a local hub, with the unmodified client: transfers, cards, access, races, channels, mirrors."""

from __future__ import annotations

import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from nest_runtime.errors import (
    DigestMismatch,
    Downgrade,
    Expired,
    HubError,
    NestError,
    Revoked,
    SignatureError,
    TrustError,
    UsageError,
)
from nest_runtime.hub.fetch import fetch, pull
from nest_runtime.hub.mirror import MirrorRemote
from nest_runtime.hub.origins import Origins
from nest_runtime.hub.publish import publish_revocation, set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.resolve import load_patch
from nest_runtime.store.store import Store
from nest_runtime.trust.keys import generate_keys
from tests.support.hub import guard_of, publish
from tests.support.hub_server import Blob, HubServer
from tests.support.store import BASE_B, small_patch

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"
Keys = tuple[Path, Path]


@pytest.mark.parametrize("mode", ["lfs", "multipart", "xet"])
def test_round_trip_over_every_transfer(
    hub: HubServer, store: Store, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    hub.state.mode = mode
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", mode != "xet")
    patch = small_patch("v1")
    pushed = publish(patch, store)
    repo = hub.repo(REPO)
    assert repo.tags == {"v1": pushed.revision} == {"v1": repo.heads["main"]}
    assert bool(repo.tree["patch.safetensors"].xet) == (mode == "xet")
    other = Store(tmp_path / "other")
    fetched, entry = pull(f"{REPO}@v1", store=other)
    assert fetched.patch == patch == other.get(patch.digest)
    assert (fetched.revision, entry.digest) == (pushed.revision, patch.digest)
    assert Origins(other.root).find(f"hf://{REPO}", "v1").revision == pushed.revision  # type: ignore[union-attr]
    assert load_patch(f"hf://{REPO}@v1", store=other) == patch


def test_the_token_stays_with_the_hub(hub: HubServer, store: Store, tmp_path: Path) -> None:
    publish(small_patch("v1"), store, private=True)
    pull(f"{REPO}@v1", store=Store(tmp_path / "other"))
    files = [(token, host) for _, path, token, host in hub.faults.log if path.startswith("/_files")]
    assert files
    assert not any(token for token, _ in files)
    assert all(host.startswith("localhost") for _, host in files)


def test_a_push_is_one_commit_and_one_tag(hub: HubServer, store: Store, keys: Keys) -> None:
    publish(small_patch("v1"), store, keys)
    before = len(hub.repo(REPO).log)
    hub.forget_requests()
    second = publish(small_patch("v2", seed=2, parent=small_patch("v1").digest), store, keys)
    assert len(hub.repo(REPO).log) == before + 1
    assert sum("/commit/" in line for line in hub.requests) == sum("/tag/" in line for line in hub.requests) == 1
    assert publish(small_patch("v2", seed=2, parent=small_patch("v1").digest), store, keys).unchanged
    assert hub.repo(REPO).tags["v2"] == second.revision
    assert len(hub.repo(REPO).log) == before + 1


def test_what_is_published_never_changes(hub: HubServer, store: Store) -> None:
    publish(small_patch("v2"), store)
    with pytest.raises(HubError, match="already has v2"):
        publish(small_patch("v2", seed=9), store)
    with pytest.raises(Downgrade, match="serial 2; v1 has 1"):
        publish(small_patch("v1"), store)
    with pytest.raises(HubError, match="base_hash"):
        publish(small_patch("v3", base=BASE_B), store)
    with pytest.raises(HubError, match="patches with name test"):
        publish(small_patch("v3", name="other"), store)
    publish(small_patch("v1"), store, allow_downgrade=True)
    assert set(hub.repo(REPO).tags) == {"v1", "v2"}


def test_of_two_pushers_one_wins(hub: HubServer, store: Store, tmp_path: Path) -> None:
    publish(small_patch("v1"), store)
    results: dict[str, object] = {}
    start = threading.Barrier(2)

    def run(version: str) -> None:
        start.wait()
        try:
            results[version] = publish(small_patch(version, seed=5), Store(tmp_path / version))
        except NestError as error:
            results[version] = error

    threads = [threading.Thread(target=run, args=(version,)) for version in ("v2", "v3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = [result for result in results.values() if isinstance(result, NestError)]
    assert len(lost) <= 1
    for error in lost:
        assert "somebody else changed" in str(error) or isinstance(error, Downgrade)
    repo = hub.repo(REPO)
    assert set(repo.tags) - {"v1"} == {v for v, result in results.items() if not isinstance(result, NestError)}
    assert all(tag in repo.commits for tag in repo.tags.values())


def test_a_push_that_lost_its_tag_is_finished(hub: HubServer, store: Store) -> None:
    first = publish(small_patch("v1"), store)
    del hub.repo(REPO).tags["v1"]
    commits = len(hub.repo(REPO).log)
    assert publish(small_patch("v1"), store).revision == first.revision
    assert len(hub.repo(REPO).log) == commits
    assert hub.repo(REPO).tags == {"v1": first.revision}


def test_the_card(hub: HubServer, store: Store, keys: Keys) -> None:
    metrics = {"validation": {"asr": 0.125, "n": 80, "refusal": {"rate": 0.9}}, "seconds": 3.0}
    first = small_patch("v1", metrics=metrics)
    publish(first, store, license_id="mit")
    repo = hub.repo(REPO)
    written = repo.tree["README.md"].content or b""
    repo.tree["README.md"] = Blob.inline(written.replace(b"---\n\n", b"---\n\nMy words.\n\n", 1))
    publish(small_patch("v2", seed=2, parent=first.digest), store, keys, results={"jailbreak": {"asr": 0.02, "n": 100}})
    content = repo.tree["README.md"].content
    assert content is not None
    card = ModelCard(content.decode())
    data = card.data.to_dict()
    assert data["library_name"] == "nest-runtime"
    assert "base_model" not in data  # a folder of this machine is nothing on the Hub (test_cards.py: --base-model)
    assert (data["base_model_relation"], data["license"]) == ("adapter", "mit")
    assert {"safety", "nest-runtime"} <= set(data["tags"])
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("jailbreak", "attack_success_rate", 0.02)
    ]
    assert "My words." in card.text
    assert f"nest-runtime pull hf://{REPO}@v2" in card.text
    assert "| v2 | 2 | v1 |" in card.text
    assert "| v1 | 1 | the base |" in card.text


def test_private_gated_and_read_only(
    hub: HubServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(small_patch("v1"), store, private=True)
    assert hub.repo(REPO).private
    other = Store(tmp_path / "other")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match="403") as refused:
        publish(small_patch("v2", seed=2), store)
    assert "write" in refused.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(HubError, match="no repository"):
        pull(f"{REPO}@v1", store=other)
    hub.repo(REPO).private, hub.repo(REPO).gated = False, True
    with pytest.raises(HubError, match="gated"):
        pull(f"{REPO}@v1", store=other)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept your token") as wrong:
        pull(f"{REPO}@v1", store=other)
    assert "hf auth login" in wrong.value.hint
    assert other.list() == [e for e in other.list() if e.builtin]


def test_offline_uses_the_cache(
    hub: HubServer, store: Store, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    publish(small_patch("v1"), store, keys)
    publish(small_patch("v2", seed=2), store, keys)
    other = Store(tmp_path / "other")
    pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget_requests()
    fetched, _ = pull(f"{REPO}@v1", store=other, guard=guard_of(other, keys))
    assert fetched.verified is not None
    with pytest.raises(HubError, match="not in the cache"):
        pull(f"{REPO}@v2", store=other)
    assert hub.requests == []


def test_the_cache_is_not_trusted(hub: HubServer, store: Store, tmp_path: Path) -> None:
    publish(small_patch("v1"), store)
    other = Store(tmp_path / "other")
    pull(f"{REPO}@v1", store=other)
    for blob in (tmp_path / "hub-cache").rglob("blobs/*"):
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
    with pytest.raises(DigestMismatch, match="not those that the Hub names"):
        pull(f"{REPO}@v1", store=other)
    assert pull(f"{REPO}@v1", store=other)[0].patch == small_patch("v1")  # the bad bytes are gone


def test_a_moved_tag_is_refused(hub: HubServer, store: Store, tmp_path: Path) -> None:
    publish(small_patch("v1"), store)
    other = Store(tmp_path / "other")
    pull(f"{REPO}@v1", store=other)
    second = publish(small_patch("v2", seed=2), store)
    hub.repo(REPO).tags["v1"] = second.revision
    with pytest.raises(TrustError, match="holds version v2"):
        pull(f"{REPO}@v1", store=other)
    shutil.rmtree(tmp_path / "hub-cache")
    hub.state.repos.clear()
    publish(small_patch("v1", seed=3), Store(tmp_path / "forger"))
    with pytest.raises(TrustError, match="never changes"):
        pull(f"{REPO}@v1", store=other)


def test_signatures(hub: HubServer, store: Store, keys: Keys, tmp_path: Path) -> None:
    publish(small_patch("v1"), store)
    other = Store(tmp_path / "other")
    guard = guard_of(other, keys)
    with pytest.raises(SignatureError, match="not signed"):
        pull(f"{REPO}@v1", store=other, guard=guard)
    stranger = generate_keys(tmp_path / "stranger")[:2]
    publish(small_patch("v2", seed=2), store, stranger)
    with pytest.raises(SignatureError, match="trusted: nest"):
        pull(f"{REPO}@v2", store=other, guard=guard)
    publish(small_patch("v3", seed=3), store, keys)
    fetched, entry = pull(f"{REPO}@v3", store=other, guard=guard)
    assert fetched.verified is not None
    assert fetched.verified.key == "nest"
    assert guard.material(fetched.patch) is not None  # kept for every later activation
    assert [e.version for e in other.list() if not e.builtin] == [entry.version] == ["v3"]


def test_channels_and_revocations(hub: HubServer, store: Store, keys: Keys, tmp_path: Path) -> None:
    ref, other = parse_repo(REPO), Store(tmp_path / "other")
    guard = guard_of(other, keys)
    for n in (1, 2):
        publish(small_patch(f"v{n}", seed=n), store, keys)
    with pytest.raises(HubError, match="no version 'v9'"):
        set_channel(ref, "stable", "v9", store=store, key=keys[0])
    with pytest.raises(HubError, match="no channel 'stable'"):
        pull(f"{REPO}@stable", store=other, guard=guard)
    set_channel(ref, "stable", "v1", store=store, key=keys[0])
    assert pull(f"{REPO}@stable", store=other, guard=guard)[0].patch.version == "v1"
    with pytest.raises(SignatureError, match="is signed"):
        set_channel(ref, "stable", "v2", store=store)
    revocations, _ = publish_revocation(small_patch("v1", seed=1), "answers recipes", ref, key=keys[0])
    assert revocations.serial == 1
    for trusted in (guard, None):
        with pytest.raises(Revoked, match="answers recipes"):
            pull(f"{REPO}@stable", store=other, guard=trusted)
    set_channel(ref, "stable", "v2", store=store, key=keys[0], valid=timedelta(seconds=1))
    time.sleep(1.1)
    with pytest.raises(Expired):
        pull(f"{REPO}@stable", store=other, guard=guard)
    assert publish_revocation(small_patch("v1", seed=1), "again", ref, key=keys[0])[0].serial == 1


def test_an_unsigned_channel_counts_only_without_a_policy(
    hub: HubServer, store: Store, keys: Keys, tmp_path: Path
) -> None:
    publish(small_patch("v1"), store, keys)
    set_channel(parse_repo(REPO), "stable", "v1", store=store)
    other = Store(tmp_path / "other")
    assert pull(f"{REPO}@stable", store=other)[0].patch.version == "v1"
    with pytest.raises(SignatureError, match="not signed"):
        pull(f"{REPO}@stable", store=other, guard=guard_of(other, keys))


def test_endpoint_and_library_name_are_passed_through(hub: HubServer, store: Store) -> None:
    publish(small_patch("v1"), store)
    assert HfApi(endpoint=hub.url, token="hf_alice").model_info(REPO).sha == hub.repo(REPO).heads["main"]
    assert [m.id for m in HfApi(endpoint=hub.url).list_models(author="alice")] == [REPO]


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_mirrors(store: Store, keys: Keys, tmp_path: Path, kind: str) -> None:
    place = str(tmp_path / "mirror") if kind == "folder" else f"memory://mirror-{tmp_path.name}"
    ref, other = parse_repo(place), Store(tmp_path / "other")
    guard = guard_of(other, keys)
    with pytest.raises(HubError, match="no mirror"):
        pull(place, store=other)
    for n in (1, 2):
        publish(small_patch(f"v{n}", seed=n), store, keys, place=place)
    assert publish(small_patch("v2", seed=2), store, keys, place=place).unchanged
    with pytest.raises(HubError, match="already has v2"):
        publish(small_patch("v2", seed=7), store, keys, place=place)
    assert pull(f"{place}@v1", store=other, guard=guard)[0].patch == small_patch("v1", seed=1)
    assert pull(place, store=other, guard=guard)[0].patch.version == "v2"
    set_channel(ref, "canary", "v1", store=store, key=keys[0])
    assert pull(f"{place}@canary", store=other, guard=guard)[0].patch.version == "v1"
    publish_revocation(small_patch("v1", seed=1), "bad", ref, key=keys[0])
    with pytest.raises(Revoked):
        pull(f"{place}@canary", store=other, guard=guard)


def test_a_plain_download_is_a_mirror_of_one_version(hub: HubServer, store: Store, keys: Keys, tmp_path: Path) -> None:
    publish(small_patch("v1"), store, keys)
    HfApi(endpoint=hub.url).snapshot_download(REPO, local_dir=tmp_path / "copy")
    other = Store(tmp_path / "other")
    copy = f"{tmp_path}/copy"
    for ref in (copy, f"{copy}@v1"):
        assert fetch(ref, store=other, guard=guard_of(other, keys)).patch == small_patch("v1")
    (tmp_path / "copy/manifest.json").unlink()
    (tmp_path / "copy/patch.sig").unlink()
    assert fetch(f"{copy}@v1", store=other).patch == small_patch("v1")
    with pytest.raises(TrustError, match="holds version v1"):
        fetch(f"{copy}@v2", store=other)


def test_a_mirror_keeps_pushers_apart(store: Store, tmp_path: Path) -> None:
    publish(small_patch("v1"), store, place=str(tmp_path / "mirror"))
    remote = MirrorRemote(str(tmp_path / "mirror"))
    head = remote.refs().head
    remote.publish({"README.md": b"x"}, "", parent=head)
    with pytest.raises(HubError, match="somebody else changed"):
        remote.publish({"README.md": b"y"}, "", parent=head)
    with pytest.raises(HubError, match="already has a version v1"):
        remote.publish({"patch.safetensors": b"z"}, "", parent=remote.refs().head, tag="v1")


def test_names_of_repositories(tmp_path: Path) -> None:
    assert str(parse_repo("org/name@v3")) == "hf://org/name@v3"
    assert parse_repo("hf://org/name").revision is None
    assert parse_repo("/a/b@stable").place == "/a/b"
    assert parse_repo("./mirror").place == str(Path("mirror").absolute())
    assert parse_repo("s3://bucket/safety@v1") == parse_repo("s3://bucket/safety/@v1")
    assert parse_repo("file:///a/b").place == "/a/b"
    for text in ("name", "hf://name", "a/b/c", ""):
        with pytest.raises(UsageError):
            parse_repo(text)


def test_a_megabyte_is_quick(hub: HubServer, store: Store, tmp_path: Path) -> None:
    from tests.support.patches import random_site

    sites = tuple(
        random_site(f"model.layers.{i}.mlp.gate_proj", 2048, 1024, neurons=64, clusters=16) for i in range(16)
    )
    patch = small_patch("v1").evolve(sites=sites)
    started = time.process_time()
    publish(patch, store)
    pull(f"{REPO}@v1", store=Store(tmp_path / "other"))
    assert time.process_time() - started < 3.0  # the server's own work included
