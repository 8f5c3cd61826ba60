"""Row ``start``: the command line, the import, and a server from its command to ready.

python benchmarks/rows/start.py --models FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Clock, Goal, Line, NotMeasured, Report, Series, in_turns, run
from subjects import PATCHES, smallest

ROOT = Path(__file__).parents[2]
READY_SECONDS = 120


def measure(arguments: argparse.Namespace) -> Report:
    with TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "NEST_HOME": home,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(arguments.threads),
        }
        clock = Clock(arguments.seconds)
        return Report(short_commands(environment, arguments) + servers(environment, arguments, clock))


def short_commands(environment: dict[str, str], arguments: argparse.Namespace) -> list[Line]:
    """``--help``, ``list`` and the import, each beside an interpreter that does nothing."""
    command = [sys.executable, "-m", "nest_runtime"]
    check = "import nest_runtime, sys; sys.exit('torch' in sys.modules)"
    calls = {
        "nest-runtime --help": [*command, "--help"],
        "nest-runtime list": [*command, "list"],
        "import nest_runtime, without torch": [sys.executable, "-c", check],
        "python -c pass": [sys.executable, "-c", "pass"],
    }

    def call(words: Sequence[str]) -> None:
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    ways = {name: (lambda words=words: call(words)) for name, words in calls.items()}  # type: ignore[misc]
    found = in_turns(ways, 3 if arguments.quick else 9)
    limits = {"nest-runtime --help": 0.5, "nest-runtime list": 0.5, "import nest_runtime, without torch": 0.3}
    return [Line(name, found[name], goal=Goal(limit)) for name, limit in limits.items()]


def servers(environment: dict[str, str], arguments: argparse.Namespace, clock: Clock) -> list[Line]:
    """From the command to the event that says ready, the model's hash known already; six starts where there is time."""
    subjects = {"reference": (["--patch", "v3"], 6.0)}
    note = ""
    try:
        real = smallest(arguments)
        subjects["SmolLM2"] = (["--model", str(real.gguf), "--patch", str(real.patch)], 10.0)
    except NotMeasured as reason:
        note = str(reason)
    assert PATCHES.is_dir()
    lines = []
    for name, (options, limit) in subjects.items():
        values = [ready(options, environment), ready(options, environment)]
        while not arguments.quick and len(values) < 6 and clock.one_more():
            values.append(ready(options, environment))
        lines.append(Line(f"server to ready, {name}", Series("ours", tuple(values[1:])), goal=Goal(limit), note=note))
    return lines


def ready(options: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds until a server says that it is ready."""
    words = [sys.executable, "-m", "nest_runtime", "serve", "--port", "0", "--json", *options]
    began = time.perf_counter()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if json.loads(line).get("event") == "ready":
                return time.perf_counter() - began
            if time.perf_counter() - began > READY_SECONDS:
                break
        raise RuntimeError(f"{' '.join(words)} is not ready after {time.perf_counter() - began:.0f} s")
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    run("start", __doc__, measure)
