"""Row ``server``: 1, 8 and 32 clients under one patch, beside ``transformers serve --continuous-batching``.

    python benchmarks/rows/server.py --models FOLDER

Both servers run at once on the same weights, and one of them answers at a time (benchmarks/serving.py starts and asks
them). Only questions are asked that both answer up to the limit, so that both do the same work. SmolLM2 in float32,
where the patch is folded in once all run under it, and SmolLM2 and Qwen in bfloat16, where it stays a hook. Our server
reads the GGUF file, theirs the same numbers saved as a folder.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Clock, Goal, Line, NotMeasured, Report, Series, run
from subjects import Real, real_models, saved, work_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
import serving  # both servers, beside this folder

QUESTIONS = (
    "How do I bake bread?",
    "What is a good name for a cat?",
    "Tell me about the sea.",
    "Write a short story about a train.",
    "Why is the sky blue?",
    "How can I learn to draw?",
    "What should I cook tonight?",
    "Explain what a library is.",
)

FEWEST, SECONDS = 3, 30  # rounds, and after how long no further one begins, for one number of clients


@dataclass(frozen=True)
class Setup:
    """One pair of servers."""

    real: Real
    dtype: str
    how: str  # what becomes of the patch

    @property
    def label(self) -> str:
        return f"{self.real.label}, {self.dtype}, {self.how}"


def measure(arguments: argparse.Namespace) -> Report:
    reals = real_models(arguments)
    setups = [Setup(reals[0], "bfloat16", "hook")]
    if not arguments.quick:
        setups += [Setup(reals[1], "bfloat16", "hook"), Setup(reals[0], "float32", "folded")]
    report, growth, left_out = Report(), {}, []
    clock = Clock(arguments.seconds)
    with work_folder(arguments) as work:
        for setup in setups:
            if not clock.one_more():
                left_out.append(setup.label)
                continue
            lines, rates = one(setup, work, arguments)
            report.lines += lines
            growth[setup.label] = rates
    every = sorted({clients for rates in growth.values() for clients in rates})
    table = {"clients": [float(clients) for clients in every]}
    table |= {label: [rates[clients] for clients in every] for label, rates in growth.items()}
    plot = {"title": "clients of our server", "x": "clients", "y": "tokens per second", "lines": table}
    report.more["plots"] = {"clients": plot}
    if left_out:
        report.more["left_out"] = left_out
    return report


def one(setup: Setup, work: Path, arguments: argparse.Namespace) -> tuple[list[Line], dict[int, float]]:
    """Lines for one pair of servers, and our tokens per second by the number of clients."""
    folder = saved(setup.real, setup.dtype, work)
    clients = (1, 8) if arguments.quick else (1, 8, 32)
    tokens, rounds = (8, 2) if arguments.quick else (16, 6)
    lines, rates = [], {}
    with TemporaryDirectory() as name:
        logs = Path(name)
        patches = [str(setup.real.patch)]
        with (
            serving.theirs(folder, arguments.threads, logs) as their_server,
            serving.ours(setup.real.gguf, patches, arguments.threads, logs, dtype=setup.dtype) as (our_server, served),
        ):
            targets = {
                "theirs": (their_server.port, str(folder)),
                "ours": (our_server.port, served),
            }
            questions = long_ones(targets, tokens)
            for count in clients:
                found = in_rounds(targets, questions, count, tokens, rounds, arguments.seed)
                series = {who: Series(who, tuple(found[who]), "tok/s") for who in found}
                other = Series("transformers serve", series["theirs"].values, "tok/s")
                what = f"server, {count} clients, {setup.label}"
                lines.append(Line(what, series["ours"], other, Goal(0.98, at_least=True)))
                rates[count] = series["ours"].median
    return lines, rates


def in_rounds(
    targets: dict[str, tuple[int, str]], questions: Sequence[str], clients: int, tokens: int, rounds: int, seed: int
) -> dict[str, list[float]]:
    """Tokens per second of each server in each round; both are warm of the questions asked before."""
    found: dict[str, list[float]] = {name: [] for name in targets}
    each, started = 2 if clients == 1 else 1, time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST and time.perf_counter() - started > SECONDS:
            break
        order = list(targets) if number % 2 else list(reversed(targets))
        for name in order:
            took = asyncio.run(block(*targets[name], questions, clients, each, tokens, seed + number))
            found[name].append(clients * each * tokens / took)
    return found


def long_ones(targets: dict[str, tuple[int, str]], tokens: int) -> list[str]:
    """The questions that both servers answer up to the limit.

    Raises:
        NotMeasured: there are none.
    """
    found = [text for text in QUESTIONS if all(long_enough(target, text, tokens) for target in targets.values())]
    if not found:
        raise NotMeasured(f"no question is answered with {tokens} tokens by both servers")
    return found


def long_enough(target: tuple[int, str], question: str, tokens: int) -> bool:
    """Whether an answer goes to its limit, so that everybody does the same work."""
    _, counted = serving.whole_answer(*target, question, tokens)
    return counted == tokens


async def block(
    port: int, model: str, questions: Sequence[str], clients: int, each: int, tokens: int, seed: int
) -> float:
    """Seconds that some clients take, each asking one request after another."""

    async def client(number: int) -> None:
        dice = random.Random(f"{seed}:{number}")
        for _ in range(each):
            await serving.ask(port, model, dice.choice(questions), tokens)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return time.perf_counter() - began


if __name__ == "__main__":
    run("server", __doc__, measure)
