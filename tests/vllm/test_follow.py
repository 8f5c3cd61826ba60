"""``serve --engine vllm --follow``: what a channel names reaches the running engine; a downgrade does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nest_runtime.hub.publish import set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.patch.patch import Patch
from nest_runtime.store.store import Store
from nest_runtime.trust.keys import generate_keys
from tests.support.hub import publish
from tests.support.serve import eventually
from tests.vllm.test_server import vllm_server


def test_a_published_version_reaches_the_engine_under_load(
    folder: Path,
    patches: list[Patch],
    tmp_path: Path,
    prompts: list[list[int]],
    truth: Callable[[str | None, int], list[int]],
    ask: Callable[..., dict[str, Any]],
) -> None:
    private, public, _ = generate_keys(tmp_path / "keys")
    store, mirror = Store(tmp_path / "publisher"), str(tmp_path / "mirror")

    def point(version: str) -> None:
        set_channel(parse_repo(mirror), "stable", version, store=store, key=private)

    publish(patches[0], store, (private, public), place=mirror)
    point("v1")
    options = ["--follow", f"{mirror}@stable", "--every", "1s", "--trust", str(public), "--require-signature"]
    admission = ["--admission-min-refused", "0", "--admission-max-refused", "1"]  # random weights refuse nothing
    seen: list[tuple[str, int, list[int]]] = []
    with vllm_server(folder, tmp_path / "home", *options, *admission) as server:
        stop = threading.Event()

        def client(number: int) -> None:
            while not stop.is_set():
                answer = ask(server, prompts[number])
                seen.append((answer["headers"]["x-nest-patch"], number, answer["choices"][0]["token_ids"]))

        def follow() -> dict[str, Any]:
            return server.http("GET", "/ready").json()["follow"]

        with ThreadPoolExecutor(2) as pool:
            clients = [pool.submit(client, number) for number in (0, 5)]
            try:
                assert eventually(lambda: len(seen) > 3, 60)
                publish(patches[1], store, (private, public), place=mirror)
                point("v2")
                assert eventually(lambda: seen[-1][0] == "v2", 60), follow()
                point("v1")
                assert eventually(lambda: "serial 1" in (follow()["error"] or ""), 30), follow()
                assert follow()["version"] == "v2"
            finally:
                stop.set()
            for done in clients:
                done.result(60)  # not one request failed
        assert ask(server, prompts[1])["choices"][0]["token_ids"] == truth("v2", 1)
        audit = server.admin("GET", "/v1/audit").json()
        assert audit["verified"]
        what = [entry["what"] for entry in audit["entries"]]
        assert "follow: refused" in what
    assert {version for version, _, _ in seen} == {"v1", "v2"}
    for version, number, tokens in seen:
        assert tokens == truth(version, number)
