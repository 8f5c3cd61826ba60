"""Row ``vllm``, run by name: vLLM serving with a patch in its weights, beside the same vLLM without nest-runtime.

    tests/vllm/install.sh DIR       # vLLM's build for CPUs, in an environment of its own
    NEST_VLLM_PYTHON=DIR/bin/python python benchmarks/rows/vllm_server.py --models FOLDER

Both servers run at once on the same folder in bfloat16, compiled as vLLM does by default, and one of them answers at a
time. Only questions are asked that both answer up to the limit. Ours is ``nest-runtime serve --engine vllm`` with one
patch for everybody, which is what an operator runs: its routes, headers and audit are in the figure.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Goal, Line, NotMeasured, Report, Series, run
from server import in_rounds, long_ones
from subjects import Real, load, real_models, saved, work_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
import serving  # servers and a client, beside this folder

from nest_runtime.model.base_rows import rows_digest
from nest_runtime.model.fingerprint import model_hash

PYTHON = "NEST_VLLM_PYTHON"  # names the interpreter of vLLM's environment
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
READY = 400  # seconds; compiling takes minutes
AT_ONCE = "32"  # requests in one batch, of both


def measure(arguments: argparse.Namespace) -> Report:
    python = os.environ.get(PYTHON)
    if not python or not Path(python).is_file():
        raise NotMeasured(f"vLLM needs an environment of its own: ${PYTHON} names its python (tests/vllm/install.sh)")
    os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})
    report = Report()
    with work_folder(arguments) as work:
        for real in real_models(arguments):
            report.lines += one(real, Path(python), work, arguments)
    return report


def one(real: Real, python: Path, work: Path, arguments: argparse.Namespace) -> list[Line]:
    """One model's lines."""
    folder = saved(real, "bfloat16", work)
    lines = []
    with TemporaryDirectory() as name:
        patch = moved(real, folder, Path(name))
        logs, threads = Path(name), arguments.threads
        with bare(python, folder, threads, logs) as theirs, patched(python, folder, patch, threads, logs) as ours:
            targets = {"theirs": theirs, "ours": ours}
            clients = (1, 8) if arguments.quick else (1, 8, 32)
            tokens, rounds = (8, 2) if arguments.quick else (32, 8)
            questions = long_ones(targets, tokens)
            for count in clients:
                found = in_rounds(targets, questions, count, tokens, rounds, arguments.seed)
                mine = Series("ours", tuple(found["ours"]), "tok/s")
                other = Series("vLLM without", tuple(found["theirs"]), "tok/s")
                what = f"vLLM with a patch, {count} clients, {real.label}, bfloat16"
                lines.append(Line(what, mine, other, Goal(0.97, at_least=True)))
    return lines


def moved(real: Real, folder: Path, where: Path) -> Path:
    """The shipped patch as one made on the folder: the same numbers, under another identity."""
    loaded, patch = load(real, "bfloat16")
    neurons = {site.name: site.neurons.tensor() for site in patch.sites}
    here = replace(
        patch, base_hash=model_hash(folder), rows_digest=rows_digest(loaded.model, neurons), claims=None, parent=None
    )
    return here.save(where / "patch.safetensors")


@contextmanager
def bare(python: Path, folder: Path, threads: int, logs: Path) -> Iterator[tuple[int, str]]:
    """The server of vLLM itself, whose build for CPUs has no command that runs; its port and its model's name."""
    port = serving.free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "bare", "--max-num-seqs", AT_ONCE, "--dtype", "bfloat16"]
    command += ["--disable-uvicorn-access-log"]
    with serving.running(command, threads, logs / "bare.log") as process:
        serving.wait(process, f"http://127.0.0.1:{port}/v1/models", logs / "bare.log", READY)
        yield port, "bare"


@contextmanager
def patched(python: Path, folder: Path, patch: Path, threads: int, logs: Path) -> Iterator[tuple[int, str]]:
    """``nest-runtime serve --engine vllm`` under the patch; its port and its model's name."""
    port = serving.free_port()
    command = [str(python), "-m", "nest_runtime.cli.main", "serve", "--engine", "vllm", "--model", str(folder)]
    command += ["--port", str(port), "--patch", str(patch), "--dtype", "bfloat16", "--max-running", AT_ONCE]
    command += ["--audit-file", str(logs / "audit.jsonl")]
    with serving.running(command, threads, logs / "patched.log") as process:
        ready = serving.wait(process, f"http://127.0.0.1:{port}/ready", logs / "patched.log", READY)
        yield port, ready["model"]


if __name__ == "__main__":
    run("vllm", __doc__, measure)
