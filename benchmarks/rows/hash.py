"""Row ``hash``: the model hash of a checkpoint, beside SHA-256 over the same bytes with as many threads.

    python benchmarks/rows/hash.py --models FOLDER

A GGUF file and a safetensors folder, both in the page cache; and what a known hash costs.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Goal, Line, Report, Series, in_turns, run, threads
from subjects import real_models, saved, smallest, work_folder

from nest_runtime.model.fingerprint import hash_report
from nest_runtime.model.hashing import hash_threads
from nest_runtime.model.weights import weight_files

PIECES = 64  # that a file's bytes are cut into, so that threads end together


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    report = Report()
    home = os.environ.get("NEST_HOME")
    with TemporaryDirectory() as name, work_folder(arguments) as work:
        os.environ["NEST_HOME"] = name
        try:
            sources = {real.gguf.name: real.gguf for real in real_models(arguments)}
            small = smallest(arguments)
            sources[f"{small.label}, safetensors"] = saved(small, "bfloat16", work)
            for label, source in sources.items():
                report.lines += hashing(label, source, Path(name), arguments)
        finally:
            if home is None:
                del os.environ["NEST_HOME"]
            else:
                os.environ["NEST_HOME"] = home
    return report


def hashing(label: str, source: Path, home: Path, arguments: argparse.Namespace) -> list[Line]:
    """One model: hashed anew, the same bytes by hashlib alone, and from the cache."""
    files = [source] if source.is_file() else weight_files(source)
    size = sum(file.stat().st_size for file in files)

    def forget(way: str) -> None:
        shutil.rmtree(home / "cache", ignore_errors=True)

    ways = {"ours": lambda: hash_report(source), "sha256": lambda: plain(files)}
    found = in_turns(ways, 3 if arguments.quick else 7, before=forget)
    rates = {
        name: Series(name, tuple(size / value / 1e6 for value in series.values), "MB/s")
        for name, series in found.items()
    }
    while time.time() - max(file.stat().st_ctime for file in files) < 2.5:
        time.sleep(0.1)  # a file that has just been written is not remembered
    hash_report(source)
    cached = in_turns({"cached": lambda: hash_report(source)}, 5 if arguments.quick else 30)["cached"]
    against = Series(f"sha256, {hash_threads()} threads", rates["sha256"].values, "MB/s")
    return [
        Line(f"model hash, {label}", rates["ours"], against, Goal(0.9, at_least=True), f"{size / 1e6:,.0f} MB"),
        Line(f"model hash known already, {label}", cached, goal=Goal(10e-3)),
    ]


def plain(files: list[Path]) -> list[bytes]:
    """SHA-256 of the files' bytes in pieces, with as many threads as ours takes."""
    digests: list[bytes] = []
    with ThreadPoolExecutor(hash_threads()) as pool:
        for file in files:
            with (
                file.open("rb") as opened,
                mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as memory,
                memoryview(memory) as view,
            ):
                step = -(-len(view) // PIECES)
                parts = [view[at : at + step] for at in range(0, len(view), step)]
                digests += list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))
                for part in parts:
                    part.release()
    return digests


if __name__ == "__main__":
    run("hash", __doc__, measure)
