"""What a server shows of itself: metrics by patch, and the dashboard that reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nest_runtime.hub.publish import set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.reference.world import cases
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.limits import FollowConfig
from nest_runtime.store.store import Store
from tests.support.hub import publish
from tests.support.hub_server import HubServer
from tests.support.serve import Running, serving

pytest_plugins = ["tests.support.fixtures_serve", "tests.support.hub"]

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "nest-runtime.json"


@pytest.fixture
def observed(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


def families(server: Running) -> dict[str, list[Any]]:
    found = text_string_to_metric_families(server.http("GET", "/metrics").text)
    return {family.name: family.samples for family in found}


def value(samples: list[Any], **labels: str) -> float:
    return sum(s.value for s in samples if not s.name.endswith("_created") and labels.items() <= s.labels.items())


@pytest.fixture(scope="module")
def reference_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("NEST_HOME", str(tmp_path_factory.mktemp("home")))
        with serving(ServeConfig(patch="v3", expose_base=True, port=0)) as server:
            yield server


def test_refusals_are_counted_by_patch(reference_server: Running) -> None:
    client, name = reference_server.client(), reference_server.name
    for model, suite in ((name, "plain"), (f"{name}@base", "over-refusal")):  # harmful prompts, and benign ones
        for messages in [case.messages for case in cases("validation", suite)][:8]:
            client.chat.completions.create(model=model, messages=messages, max_tokens=24)  # type: ignore[arg-type]
    found = families(reference_server)
    answered = {patch: value(found["nest_answers"], patch=patch) for patch in ("v3", "base")}
    refused = {patch: value(found["nest_refusals"], patch=patch) for patch in ("v3", "base")}
    assert answered == {"v3": 8, "base": 8}
    assert refused["v3"] >= 6
    assert refused["base"] <= 2


def test_what_is_measured_is_labeled_with_the_patch(observed: Running, files: dict[str, str]) -> None:
    server = observed
    client = server.client()
    messages: Any = [{"role": "user", "content": "How do I bake bread?"}]
    tokens = []
    for version in ("v2", "v3"):
        said = client.chat.completions.create(model=server.name, messages=messages, max_tokens=5, n=2, temperature=1)
        tokens.append(said.usage.completion_tokens)  # at most 10: an end may be drawn
        server.admin("POST", "/v1/patches/activate", json={"patch": files[version]})
    server.admin("POST", "/v1/patches/activate", json={"patch": "v9"})
    damaged = Path(files["v1"])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    server.admin("POST", "/v1/patches", json={"patch": files["v1"]})
    found = families(server)
    for patch, count in zip(("v1", "v2"), tokens, strict=True):
        assert value(found["nest_tokens"], kind="completion", patch=patch) == count
        assert value(found["nest_answers"], patch=patch) == 2
        counts = [s.value for s in found["nest_time_to_first_token_seconds"] if s.name.endswith("_count")]
        assert counts == [1, 1]
        assert value([s for s in found["nest_time_per_output_token_seconds"] if s.name.endswith("_count")]) == 2
    assert [s.labels["patch"] for s in found["nest_active_patch_info"]] == ["v3"]
    assert value(found["nest_swaps"], what="activate") == 3  # the first at the start
    assert value([s for s in found["nest_swap_seconds"] if s.name.endswith("_count")]) == 3
    assert value(found["nest_patch_failures"], error="PatchNotFound") == 1
    assert value(found["nest_verification_failures"], error="DigestMismatch") == 1
    assert value(found["nest_verification_failures"]) == 1
    assert value(found["nest_queue_capacity"]) == 64 + 256
    assert value(found["process_resident_memory_bytes"]) > 1e8


def test_every_metric_of_the_dashboard_exists(
    hub: HubServer, store: Store, keys: tuple[Path, Path], config: ServeConfig, patches: list[Any]
) -> None:
    publish(patches[0], store, keys)
    set_channel(parse_repo("alice/safety"), "stable", "v1", store=store, key=keys[0])
    follow = FollowConfig("hf://alice/safety@stable", every=30, admission_test=False)
    with serving(replace(config, patch=None, trust=(keys[1],), require_signature=True, follow=follow)) as server:
        exposed = set(re.findall(r"^# TYPE (\S+) ", server.http("GET", "/metrics").text, re.MULTILINE))
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [note["expr"] for note in dashboard["annotations"]["list"]]
    used = {name for query in queries for name in re.findall(r"\b(?:nest|process)_[a-z_]+", query)}
    assert len(used) > 20
    missing = {name for name in used if name not in exposed and re.sub("_(bucket|sum|count)$", "", name) not in exposed}
    assert not missing
    measured = {name for name in exposed if name.startswith("nest_") and not name.endswith("_created")}
    shown = used | {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    assert measured - shown == {"nest_server_info"}  # and nothing that is measured is left out


def test_the_dashboard_has_what_grafana_needs() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        assert {"id", "type", "title", "gridPos"} <= set(panel)
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["targets"]
            assert all('{instance=~"$instance"}' in target["expr"] for target in panel["targets"])
