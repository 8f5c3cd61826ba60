"""A running server that follows a channel: new versions reach it under load, bad ones do not."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from nest_runtime.errors import NestError, Revoked, SignatureError
from nest_runtime.hub.publish import publish_revocation, set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.limits import FollowConfig
from nest_runtime.store.store import Store
from tests.support.hub import publish
from tests.support.hub_server import HubServer
from tests.support.patches import make_patch
from tests.support.serve import Running, eventually, serving

pytest_plugins = ["tests.support.hub"]

REPO = "alice/safety"
REF = parse_repo(REPO)
Keys = tuple[Path, Path]


@pytest.fixture(scope="module")
def patches(tiny_llama: Path) -> dict[str, Patch]:
    model = load_model(tiny_llama).model
    return {f"v{n}": make_patch(model, version=f"v{n}", serial=n, seed=n) for n in (1, 2, 3)}


def following(tiny_llama: Path, keys: Keys, expose: tuple[str, ...] = (), **options: object) -> ServeConfig:
    options = {"every": 0.3, "admission_test": False, **options}
    return ServeConfig(
        model=str(tiny_llama),
        port=0,
        expose=expose,
        trust=(keys[1],),
        require_signature=True,
        follow=FollowConfig(f"hf://{REPO}@stable", **options),  # type: ignore[arg-type]
    )


def answering(server: Running, suffix: str = "") -> str:
    body = {
        "model": server.name + suffix,
        "messages": [{"role": "user", "content": "How do I bake bread?"}],
        "max_tokens": 4,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    return response.headers["x-nest-patch"] if response.status_code == 200 else str(response.status_code)


def test_a_server_follows_under_load(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch]
) -> None:
    publish(patches["v1"], store, keys)
    set_channel(REF, "stable", "v1", store=store, key=keys[0])
    with serving(following(tiny_llama, keys)) as server:
        assert answering(server) == "v1"
        seen: list[str] = []
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                seen.append(answering(server))

        clients = [threading.Thread(target=load) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            publish(patches["v2"], store, keys)
            set_channel(REF, "stable", "v2", store=store, key=keys[0])
            assert eventually(lambda: "v2" in seen[-3:], 30)
        finally:
            done.set()
            for client in clients:
                client.join()
        assert set(seen) == {"v1", "v2"}  # not one request failed
        follow = server.http("GET", "/ready").json()["follow"]
        assert (follow["version"], follow["stale"], follow["error"]) == ("v2", None, None)
        assert any(event["event"] == "followed" for event in server.events)
        set_channel(REF, "stable", "v1", store=store, key=keys[0])  # a downgrade
        assert eventually(lambda: "serial 1" in (server.http("GET", "/ready").json()["follow"]["error"] or ""), 20)
        assert answering(server) == "v2"
        metrics = server.http("GET", "/metrics").text
        assert "nest_follow_refusing 1.0" in metrics
        assert 'error="Downgrade"' in metrics
        entries = server.server.audit.tail(10)
        assert any(entry["what"] == "follow: refused" and entry["error"] == "Downgrade" for entry in entries)


def test_a_stored_patch_that_is_not_trusted_gives_way_to_the_channels(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch]
) -> None:
    """A server that begins to ask for signatures starts with what the channel names; without a channel it does not."""
    entry = Store().add(patches["v1"])
    Store().activate(entry.digest)
    config = following(tiny_llama, keys)
    with pytest.raises(SignatureError, match="not signed"), serving(replace(config, follow=None)):
        pass
    with pytest.raises(NestError, match="no repository"), serving(config):
        pass
    publish(patches["v2"], store, keys)
    set_channel(REF, "stable", "v2", store=store, key=keys[0])
    with serving(config) as server:
        assert answering(server) == "v2"
        assert Store().active(patches["v2"].base_hash).version == "v2"  # type: ignore[union-attr]
        refused = [entry for entry in server.server.audit.tail(20) if not entry["done"] and entry["what"] != "intent"]
        assert (refused[-1]["what"], refused[-1]["error"]) == ("activate", "SignatureError")
    with pytest.raises(SignatureError, match="not signed"), serving(replace(config, patch=entry.digest)):
        pass


def test_a_revoked_patch_gives_way_to_the_newest_good_one(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch]
) -> None:
    for version in ("v1", "v2"):
        publish(patches[version], store, keys)
    set_channel(REF, "stable", "v1", store=store, key=keys[0])
    with serving(following(tiny_llama, keys)) as server:
        set_channel(REF, "stable", "v2", store=store, key=keys[0])
        assert eventually(lambda: answering(server) == "v2", 20)
        publish_revocation(patches["v2"], "answers recipes", REF, key=keys[0])
        assert eventually(lambda: answering(server) == "v1", 20)
        publish_revocation(patches["v1"], "that too", REF, key=keys[0])
        assert eventually(lambda: answering(server) == "503", 20)  # never the bare base
        assert server.http("GET", "/ready").status_code == 503
        publish(patches["v3"], store, keys)
        set_channel(REF, "stable", "v3", store=store, key=keys[0])
        assert eventually(lambda: answering(server) == "v3", 20)
        assert server.http("GET", "/ready").status_code == 200


def test_by_policy_a_revoked_patch_ends_all_answers(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch], tmp_path: Path
) -> None:
    policy = tmp_path / "trust.toml"
    policy.write_text(f'format = 1\non_revoked = "stop"\n[[keys]]\nname = "k"\nfile = "{keys[1]}"\nnames = ["*"]\n')
    for version in ("v1", "v2"):
        publish(patches[version], store, keys)
    set_channel(REF, "stable", "v2", store=store, key=keys[0])
    config = replace(following(tiny_llama, keys, expose=(f"hf://{REPO}@v1",)), trust=(), trust_policy=policy)
    with serving(config) as server:
        assert [answering(server, suffix) for suffix in ("", "@v1")] == ["v2", "v1"]
        publish_revocation(patches["v2"], "answers recipes", REF, key=keys[0])
        assert eventually(lambda: answering(server) == "503", 20)  # though v1 is at hand
        assert answering(server, "@v1") == "503"
        assert server.http("GET", "/ready").json()["status"] == "stopped: the active patch is revoked"
        publish(patches["v3"], store, keys)
        set_channel(REF, "stable", "v3", store=store, key=keys[0])
        assert eventually(lambda: answering(server) == "v3", 20)


@pytest.mark.parametrize("trusting", [True, False])
def test_an_exposed_version_that_is_revoked_is_withdrawn(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch], trusting: bool
) -> None:
    for version in ("v1", "v2", "v3"):
        publish(patches[version], store, keys)
    set_channel(REF, "stable", "v3", store=store, key=keys[0])
    config = following(tiny_llama, keys, expose=(f"hf://{REPO}@v2", f"hf://{REPO}@v1"))
    if not trusting:  # the list is obeyed all the same: obeying can only refuse
        config = replace(config, trust=(), require_signature=False)
    with serving(config) as server:
        assert [answering(server, suffix) for suffix in ("", "@v1", "@v2")] == ["v3", "v1", "v2"]
        publish_revocation(patches["v2"], "answers recipes", REF, key=keys[0])
        assert eventually(lambda: answering(server, "@v2") == "403", 20)
        assert [answering(server, suffix) for suffix in ("", "@v1")] == ["v3", "v1"]
        asked = {"model": f"{server.name}@v2", "messages": [{"role": "user", "content": "a"}]}
        refused = server.http("POST", "/v1/chat/completions", json=asked)
        assert refused.json()["error"]["code"] == "revoked"
        assert "answers recipes" in refused.json()["error"]["message"]
        assert f"{server.name}@v2" not in [row["id"] for row in server.http("GET", "/v1/models").json()["data"]]
        assert server.http("GET", f"/v1/models/{server.name}@v2").status_code == 403
        assert server.http("GET", "/ready").json()["follow"]["withdrawn"] == ["v2"]
        metrics = server.http("GET", "/metrics").text
        assert "nest_follow_withdrawn 1.0" in metrics
        assert 'nest_patch_failures_total{error="Revoked"} 1.0' in metrics
        entry = next(entry for entry in server.server.audit.tail(10) if entry["what"] == "withdraw")
        assert (entry["version"], entry["error"], entry["done"]) == ("v2", "Revoked", True)
        assert any("exposed no more" in event.get("message", "") for event in server.events)
        publish_revocation(patches["v3"], "that too", REF, key=keys[0])  # the way out must not be v2
        assert eventually(lambda: answering(server) == "v1", 20)
        publish_revocation(patches["v1"], "and that", REF, key=keys[0])
        assert eventually(lambda: answering(server) == "503", 20)
        assert answering(server, "@v1") == "503"
    with pytest.raises(Revoked), serving(config):  # nor does a server start with one
        pass


def test_what_is_revoked_cannot_be_put_on_by_hand(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch], tmp_path: Path
) -> None:
    for version in ("v1", "v2"):
        publish(patches[version], store, keys)
    set_channel(REF, "stable", "v2", store=store, key=keys[0])
    publish_revocation(patches["v1"], "answers recipes", REF, key=keys[0])
    (tmp_path / "token").write_text("admin-secret\n")
    (tmp_path / "token").chmod(0o600)
    config = replace(
        following(tiny_llama, keys), trust=(), require_signature=False, admin_token_file=tmp_path / "token"
    )
    file = patches["v1"].save(tmp_path / "v1.safetensors")
    with serving(config) as server:
        for path in ("/v1/patches", "/v1/patches/activate"):
            response = server.admin("POST", path, json={"patch": str(file)})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "revoked")
        assert answering(server) == "v2"


def test_a_stale_channel_is_reported_everywhere(
    hub: HubServer,
    store: Store,
    keys: Keys,
    tiny_llama: Path,
    patches: dict[str, Patch],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(patches["v1"], store, keys)
    set_channel(REF, "stable", "v1", store=store, key=keys[0], valid=timedelta(seconds=8))

    def reports(server: Running, words: str) -> None:
        assert eventually(lambda: words in (server.http("GET", "/ready").json()["follow"]["stale"] or ""), 30)
        assert "nest_follow_stale 1.0" in server.http("GET", "/metrics").text
        assert eventually(lambda: any(words in record.getMessage() for record in caplog.records), 10)
        assert any(words in event.get("message", "") for event in server.events)
        assert (server.http("GET", "/ready").status_code, answering(server)) == (200, "v1")

    def is_fresh(server: Running) -> bool:
        return (
            server.http("GET", "/ready").json()["follow"]["stale"] is None
            and "nest_follow_stale 0.0" in server.http("GET", "/metrics").text
        )

    with serving(following(tiny_llama, keys, stale_after=2)) as server:
        assert is_fresh(server)
        reports(server, "channel stable expired at")
        set_channel(REF, "stable", "v1", store=store, key=keys[0])
        assert eventually(lambda: is_fresh(server), 20)
        hub.fault("status", "/refs$", status=503)
        reports(server, "has not answered since")
        hub.heal()
        assert eventually(lambda: is_fresh(server), 20)
        repo = hub.repo(REPO)
        repo.commit({path: blob for path, blob in repo.tree.items() if not path.endswith("stable.sig")}, "unsigned")
        reports(server, "had no channel file that counts since")


def test_an_admission_test_keeps_a_useless_patch_out(
    hub: HubServer, store: Store, keys: Keys, tiny_llama: Path, patches: dict[str, Patch]
) -> None:
    publish(patches["v1"], store, keys)
    set_channel(REF, "stable", "v1", store=store, key=keys[0])
    with serving(following(tiny_llama, keys, admission_test=True)) as server:
        publish(patches["v2"], store, keys)
        set_channel(REF, "stable", "v2", store=store, key=keys[0])
        assert eventually(
            lambda: "harmful probes" in (server.http("GET", "/ready").json()["follow"]["error"] or ""), 30
        )
        assert answering(server) == "v1"
        assert [served_patch.label for served_patch in server.server.service.table.loaded()] == ["v1"]


def test_no_patch_no_server(hub: HubServer, keys: Keys, tiny_llama: Path) -> None:
    with pytest.raises(NestError, match="no repository"), serving(following(tiny_llama, keys)):
        pass
