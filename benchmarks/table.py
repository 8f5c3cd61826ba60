"""The table of speed: every row of it, measured beside its peer and its limit, in one command.

    python benchmarks/table.py --models FOLDER --json speed.json              # all rows, about 40 minutes on 2 cores
    python benchmarks/table.py --quick --json /tmp/speed.json                 # shows that every row runs
    python benchmarks/table.py --rows swap,load --merge speed.json            # some rows anew, into an earlier result
    NEST_VLLM_PYTHON=DIR/bin/python python benchmarks/table.py --rows vllm --merge speed.json    # only by name
    python benchmarks/table.py --from speed.json --page docs/guide/performance.md   # writes the page; measures nothing

A row is a script in benchmarks/rows, in a process of its own. One that fails, or takes longer than it may, stands in
the table as failed with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "rows"))
from measure import MODELS, cells  # noqa: E402  (beside this file)

MARGIN = 15  # seconds that a row's script is told less than it may take
PACKAGES = ("torch", "transformers", "peft", "numpy")
HEAD = ("what", "ours", "against", "ratio (middle half of the rounds)", "to reach")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Row:
    """A row: its title, its script, the most seconds that it may take, and what it needs where only --rows names it."""

    title: str
    script: str
    seconds: int
    by_name: str = ""


ROWS = {
    "decode": Row("Decoding under one patch", "decode.py", 310),
    "server": Row("A server under one patch", "server.py", 585),
    "mixed": Row("Many patches in one batch", "mixed.py", 175),
    "swap": Row("Swapping patches", "swap.py", 45),
    "load": Row("From disk to active", "load.py", 40),
    "hash": Row("Hashing a model", "hash.py", 25),
    "locate": Row("Locating", "locate.py", 120),
    "tune": Row("A training step", "tune.py", 300),
    "eval": Row("Answers of an evaluation", "evaluate.py", 480),
    "start": Row("Starting", "start.py", 160),
    "growth": Row("Growth", "growth.py", 160),
    "vllm": Row("vLLM with and without a patch", "vllm_server.py", 1500, "--rows vllm, in an environment of its own"),
}
ELSEWHERE = {"gpu": ("On a GPU: CUDA graphs, many patches, idle cost", "no GPU on this machine")}


def main() -> int:
    """Measure, print, write; 1 where a row failed."""
    arguments = parse()
    if arguments.source and not Path(arguments.source).is_file():
        sys.exit(f"there is no file {arguments.source}: --from takes what --json or --merge wrote")
    if arguments.page and not Path(arguments.page).is_file():
        sys.exit(f"there is no page {arguments.page} to write the table into")
    document, failed = read(arguments.source or arguments.merge), []
    if not arguments.source:
        document, failed = merged(document, measured(arguments))
    if arguments.source is None:
        print(table(document))
    target = arguments.json or arguments.merge
    if target and not arguments.source:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        write_page(Path(arguments.page), document)
    return int(bool(failed) or any("failed" in row for row in document["rows"].values()))


def merged(document: dict[str, Any], rows: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A document with new rows, and the names of those that failed; a row that was measured before is not lost so."""
    earlier = document.get("rows", {})
    failed = [name for name, row in rows.items() if "failed" in row]
    kept = {name for name in failed if "lines" in earlier.get(name, {})}
    for name in sorted(kept):
        print(f"{name}: the earlier result stays", file=sys.stderr)
    return {**document, "rows": {**earlier, **{name: row for name, row in rows.items() if name not in kept}}}, failed


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few rounds and small sizes: shows that every row runs")
    made.add_argument("--rows", help=f"some of {','.join(ROWS)}; by default all but vllm")
    made.add_argument("--json", metavar="FILE", help="write the result here")
    made.add_argument("--merge", metavar="FILE", help="put the rows into an earlier result, in place of its own")
    made.add_argument("--from", dest="source", metavar="FILE", help="measure nothing: take this result")
    made.add_argument("--page", metavar="FILE", help="write the table into this page, between its two marks")
    made.add_argument("--models", default=os.environ.get(MODELS), help=f"folder of the real models (${MODELS})")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    found = made.parse_args()
    unknown = set((found.rows or "").split(",")) - {"", *ROWS}
    if unknown:
        made.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return found


def read(path: str | None) -> dict[str, Any]:
    """An earlier result, or an empty one."""
    if path is None or not Path(path).is_file():
        return {"rows": {}}
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows asked for, one after another."""
    asked = arguments.rows.split(",") if arguments.rows else [name for name, row in ROWS.items() if not row.by_name]
    names = [name for name in ROWS if name in asked]
    rows = {}
    with tempfile.TemporaryDirectory(prefix="nest-speed-") as work:
        for name in names:
            print(f"{name} …", file=sys.stderr, flush=True)
            began = time.perf_counter()
            rows[name] = one(name, arguments, work)
            took = time.perf_counter() - began
            told = rows[name].get("failed") or rows[name].get("not_measured") or f"{len(rows[name]['lines'])} lines"
            print(f"{name}: {told}; {took:.0f} s", file=sys.stderr, flush=True)
    return rows


def one(name: str, arguments: argparse.Namespace, work: str) -> dict[str, Any]:
    """A row's document; with ``failed`` and why where there is no result."""
    row = ROWS[name]
    command = [sys.executable, str(HERE / "rows" / row.script), "--json", "--work", work]
    command += ["--threads", str(arguments.threads), "--seed", str(arguments.seed)]
    command += ["--seconds", str(row.seconds - MARGIN)]
    command += ["--quick"] if arguments.quick else []
    command += ["--models", str(Path(arguments.models).resolve())] if arguments.models else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    stamp = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=row.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the servers that it may have started
        process.communicate()
        return {**stamp, "failed": f"it took longer than {row.seconds} s"}
    last = [line for line in errors.splitlines() if line.strip()][-1:]
    if process.returncode:
        return {**stamp, "failed": last[0] if last else f"it ended with status {process.returncode}"}
    try:
        return {**stamp, **json.loads(out.splitlines()[-1])}
    except (IndexError, ValueError):
        return {**stamp, "failed": "it printed no result"}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        found["processor"] = names[0] if names else "unknown"
        found["bfloat16"] = any("avx512_bf16" in line for line in lines if line.startswith("flags"))
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def table(document: Mapping[str, Any]) -> str:
    """The whole table in Markdown."""
    out = []
    for name, row in ROWS.items():
        found = document["rows"].get(name)
        out += [f"### {row.title}", "", *section(found, row.by_name), ""]
    for title, why in ELSEWHERE.values():
        out += [f"### {title}", "", f"Not measured: {why}.", ""]
    return "\n".join(out).rstrip() + "\n"


def section(found: Mapping[str, Any] | None, by_name: str = "") -> list[str]:
    """One row's lines."""
    if found is None:
        return [f"Not measured: {by_name}." if by_name else "Not measured yet."]
    when = f"{found['date'][:10]}, {told(found['machine'])}, {found.get('threads', '?')} threads"
    for key, word in (("failed", "Failed"), ("not_measured", "Not measured")):
        if key in found:
            return textwrap.wrap(f"{word}: {found[key]} ({when}).", 100)
    rows = [HEAD, tuple("---" for _ in HEAD), *(cells(line) for line in found["lines"])]
    quick = ", quick: few rounds" if found.get("quick") else ""
    without = f"; left out for want of time: {', '.join(found['left_out'])}" if "left_out" in found else ""
    footer = textwrap.wrap(f"{when}, seed {found['seed']}{quick}{without}.", 100)
    return [*(f"| {' | '.join(row)} |" for row in rows), "", *footer]


def told(machine: Mapping[str, Any]) -> str:
    """A machine in a few words."""
    narrow = ", computes in bfloat16" if machine.get("bfloat16") else ""
    return f"{machine.get('processor', machine['system'])}, {machine['cores']} cores{narrow}, torch {machine['torch']}"


def write_page(page: Path, document: Mapping[str, Any]) -> None:
    """The table between the page's marks, with a picture of what grows where matplotlib is there."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    rows = document["rows"].items()
    plots = {f"{row}: {name}": plot for row, found in rows for name, plot in found.get("plots", {}).items()}
    whole = table(document)
    if plots and draw(plots, page.parent.parent / "pictures" / "growth.png"):
        whole += "\n![Costs and speeds by size: each plot's axes are logarithmic](../pictures/growth.png)\n"
    page.write_text(f"{before}{BEGIN}\n\n{whole}\n{END}{after}", encoding="utf-8")


def draw(plots: Mapping[str, Mapping[str, Any]], target: Path) -> bool:
    """All plots of growth in one picture, both axes logarithmic; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("the plots need matplotlib: pip install 'nest-runtime[plot]'", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(plots))
    figure, axes = pyplot.subplots(
        -(-len(plots) // columns), columns, figsize=(4.2 * columns, 3.4 * -(-len(plots) // columns)), squeeze=False
    )
    for axis, plot in zip(axes.flat, plots.values(), strict=False):
        across, *curves = plot["lines"]
        for curve in curves:
            axis.plot(plot["lines"][across], plot["lines"][curve], marker="o", label=curve)
        axis.set(title=plot["title"], xlabel=plot["x"], ylabel=plot["y"], xscale="log", yscale="log")
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(plots) :]:
        axis.set_visible(False)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
