"""What publishing, fetching, following and verifying cost, against a Hub on this machine. Medians.

    python benchmarks/ship.py                  # a patch of 1 MB
    python benchmarks/ship.py --megabytes 8 --repeats 9 --json

The Hub is tests/hub_server in a process of its own, so that its work is not counted; transfers are LFS. A command
is the whole process, imports included; the other rows are in a process that has everything imported. On a real
Hub the network comes on top: a push is 8 requests, a pull of a signed version 7, a poll with nothing new 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REPO = "alice/safety"
TARGETS = {  # of the project, in milliseconds
    "push, command": 3000,
    "pull, command": 3000,
    "push": 3000,
    "pull": 3000,
    "poll with nothing new, CPU": 50,
    "verify": 100,
}
HUB = """
import sys
from tests.support.hub_server import HubServer
with HubServer() as hub:
    print(hub.url, flush=True)
    for line in sys.stdin:
        print(len(hub.requests), flush=True)
"""


class Hub:
    """The test Hub in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HUB], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = self._line()

    def requests(self) -> int:
        """How many there were so far."""
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def surroundings() -> Iterator[tuple[Path, Hub]]:
    """A folder, a Hub, and an environment that knows no other."""
    with tempfile.TemporaryDirectory(prefix="nest-ship-") as folder:
        hub = Hub()
        os.environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_alice",
            "HF_HOME": f"{folder}/hf",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NEST_HOME": f"{folder}/nest",
            "PYTHONPATH": str(ROOT),
        }
        try:
            yield Path(folder), hub
        finally:
            hub.process.terminate()
            hub.process.wait()


def main() -> None:
    arguments = parse()
    with surroundings() as (folder, hub):
        rows = list(measure(folder, hub, arguments))
    report(rows, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1.0, help="size of the patch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--polls", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args()


def measure(folder: Path, hub: Hub, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from nest_runtime.hub.fetch import pull
    from nest_runtime.hub.publish import push, set_channel
    from nest_runtime.hub.repository import parse_repo
    from nest_runtime.store.store import Store
    from nest_runtime.trust.check import open_patch, sign_bytes
    from nest_runtime.trust.guard import guard_for
    from nest_runtime.trust.keys import generate_keys

    private, public, _ = generate_keys(folder / "keys")
    count = 2 * arguments.repeats + 2
    files = [folder / f"v{n}.safetensors" for n in range(1, count)]
    patches = [random_patch(n, arguments.megabytes) for n in range(1, count)]
    for file, patch in zip(files, patches, strict=True):
        patch.save(file)
    ref, store = parse_repo(REPO), Store(folder / "publisher")

    def publish(number: int) -> None:
        data = files[number].read_bytes()
        push(patches[number], ref, store=store, material=sign_bytes(data, private).material)

    def fetch(number: int) -> None:
        other = Store(folder / f"reader-{number}")
        guard = guard_for(other, [public], require_signature=True)
        forget_files()
        pull(f"{REPO}@v{number + 1}", store=other, guard=guard)

    publish(0)  # makes the repository, and imports what the rest needs
    half = range(1, arguments.repeats + 1)
    yield row("push", [wall(lambda n=n: publish(n)) for n in half])  # type: ignore[misc]
    yield row("pull", [wall(lambda n=n: fetch(n)) for n in half])  # type: ignore[misc]
    rest = range(arguments.repeats + 1, count - 1)
    key, trust = ("--key", str(private)), ("--trust", str(public), "--require-signature")
    yield commands("push", [("push", str(files[n]), REPO, *key) for n in rest])
    yield commands("pull", [("pull", f"{REPO}@v{n + 1}", *trust) for n in rest])
    set_channel(ref, "stable", "v1", store=store, key=private)
    yield from polls(folder, hub, public, arguments.polls)
    data = files[0].read_bytes()
    material, guard = sign_bytes(data, private).material, guard_for(Store(folder / "verifier"), [public])
    assert guard is not None
    policy = guard.policy
    yield row("verify", [wall(lambda: open_patch(data, material, policy)) for _ in range(4 * arguments.repeats)])


def polls(folder: Path, hub: Hub, public: Path, count: int) -> Iterator[dict[str, Any]]:
    """A follower that is up to date: processor time of all its threads, and requests."""
    from nest_runtime.hub.fetch import Fetched
    from nest_runtime.hub.follow import Follower, FollowHost
    from nest_runtime.store.store import Store
    from nest_runtime.trust.guard import guard_for

    class Host(FollowHost):
        on: str | None = None

        def active_digest(self) -> str | None:
            return self.on

        def switch(self, fetched: Fetched) -> None:
            self.on = fetched.patch.digest

    store = Store(folder / "follower")
    follower = Follower(
        f"hf://{REPO}@stable",
        base_hash=random_patch(1, 0.01).base_hash,
        store=store,
        host=Host(),
        guard=guard_for(store, [public], require_signature=True),
    )
    assert follower.poll().kind == "switched"
    assert follower.poll().kind == "unchanged"
    before, cpu, times = hub.requests(), [], []
    for _ in range(count):
        used, began = time.process_time(), time.perf_counter()
        assert follower.poll().kind == "unchanged"
        cpu.append(1e3 * (time.process_time() - used))
        times.append(1e3 * (time.perf_counter() - began))
    requests = (hub.requests() - before) / count
    yield row("poll with nothing new, CPU", cpu, requests=requests)
    yield row("poll with nothing new", times, requests=requests)


def random_patch(number: int, megabytes: float) -> Any:
    """A patch of about that size for no model; versions v1, v2, …"""
    from tests.support.patches import random_site
    from tests.support.store import small_patch

    width, sites = 1024, 16
    clusters = max(1, round(megabytes * 1e6 / (4 * width * sites)))
    return small_patch(f"v{number}").evolve(
        sites=tuple(
            random_site(
                f"model.layers.{i}.mlp.gate_proj", 4096, width, neurons=4 * clusters, clusters=clusters, seed=number
            )
            for i in range(sites)
        )
    )


def forget_files() -> None:
    """Empty the Hub client's cache, as on another machine."""
    import shutil

    from huggingface_hub import constants

    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def commands(name: str, lines: list[tuple[str, ...]]) -> dict[str, Any]:
    """Whole commands, on another machine as far as caches go: from the start of the process to its end."""
    times, before = [], processor_seconds()
    for words in lines:
        forget_files()
        program = [sys.executable, "-m", "nest_runtime.cli.main", *words]
        times.append(wall(lambda program=program: subprocess.run(program, check=True, capture_output=True)))  # type: ignore[misc]
    return row(f"{name}, command", times, cpu=1e3 * (processor_seconds() - before) / len(lines))


def processor_seconds() -> float:
    """Of all processes that this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wall(call: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def row(what: str, values: list[float], **more: float) -> dict[str, Any]:
    """Median and extremes, and whether the median keeps to the target."""
    median, target = statistics.median(values), TARGETS.get(what)
    found: dict[str, Any] = {
        "what": what,
        "ms": median,
        "min": min(values),
        "max": max(values),
        "n": len(values),
        **more,
    }
    return found if target is None else {**found, "target": target, "met": median <= target}


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"megabytes": arguments.megabytes, "load": os.getloadavg()[0], "rows": rows}, indent=2))
        return
    print(f"{'':32}{'median ms':>10}{'min':>8}{'max':>8}{'target':>8}  n")
    for found in rows:
        target = f"{found['target']:>8}" if "target" in found else " " * 8
        more = f", {found['requests']:g} request each" if "requests" in found else ""
        more += f", {found['cpu']:.0f} ms of processor time each" if "cpu" in found else ""
        numbers = f"{found['ms']:>10.1f}{found['min']:>8.1f}{found['max']:>8.1f}"
        print(f"{found['what']:32}{numbers}{target}  {found['n']}{more}")
    print(f"a patch of {arguments.megabytes:g} MB; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
