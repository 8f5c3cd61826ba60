"""What patches cost beside ``transformers serve --continuous-batching``, and what a swap costs under load.

    python benchmarks/serve.py                  # the reference model and its three patches
    python benchmarks/serve.py --random         # a random Llama of 40 M parameters, and random patches
    python benchmarks/serve.py --json --clients 8 --rounds 3

Both servers run at once, on the same weights, with the same cache and batch, and one of them answers
at a time. A round sets ours with one patch beside theirs, then ours with the base and three patches mixed beside
theirs; a lone client changes from one to the other every six requests, so that a noisy machine disturbs both
alike. Before that the same clients ask a few requests that do not
count: what is measured is the steady state, in which our server has folded the patch that all are
answered under (it does after 64 steps). Processor seconds of the server are counted beside the clock: other work
on the machine disturbs them much less. Every prompt is chosen so that base and patches answer it with
equally many tokens: all do the same work. Answers of the base must be the same on both. Ratios are
medians over rounds, each round's figure divided by their figure beside it.

The client is a bare socket: what is measured is the servers, not an HTTP library. It says nothing
about what a patch does to answers (``nest-runtime eval`` does), and nothing about GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving import TOKEN, VERSIONS, Ask, Server, ask, ours, random_model, reference, theirs, whole_answer

LONE_TURNS = 4  # few clients change sides so often in a round, asking as much in each turn as many clients do in one


@dataclass(frozen=True)
class Target:
    """One way of being answered: a server, and the model names that requests take turns in."""

    name: str
    server: Server
    models: tuple[str, ...]

    @property
    def port(self) -> int:
        return self.server.port


@dataclass
class Block:
    """What one target did in one round: answered so many requests with so many tokens, in so many seconds."""

    seconds: float
    processor: float
    tokens: int
    asks: list[Ask] = field(default_factory=list)

    def __add__(self, other: Block) -> Block:
        return Block(
            self.seconds + other.seconds,
            self.processor + other.processor,
            self.tokens + other.tokens,
            self.asks + other.asks,
        )

    @property
    def throughput(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def cost(self) -> float:
        """The server's processor seconds for a token."""
        return self.processor / self.tokens

    @property
    def first(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(ask.first for ask in self.asks)


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, patches = random_model(folder, arguments.seed) if arguments.random else reference()
        with (
            theirs(model, arguments.threads, folder) as their_server,
            ours(model, patches, arguments.threads, folder) as (
                our_server,
                served,
            ),
        ):
            targets = [
                Target("transformers serve", their_server, (str(model),)),
                Target("one patch", our_server, (served,)),
                Target("four mixed", our_server, tuple(f"{served}@{label}" for label in ("base", *VERSIONS))),
            ]
            prompts = same_work(targets, arguments)
            rows = [compare(targets, prompts, clients, arguments) for clients in arguments.clients]
            swaps = [swaps_under_load(targets[1], prompts, clients, arguments) for clients in arguments.swap_clients]
    report(rows, swaps, len(prompts), arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="a random Llama of 40 M parameters instead of reference")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests", type=int, default=6, help="a client's requests in a round; four times as many from a lone one"
    )
    parser.add_argument("--settle", type=int, default=5, help="a client's requests before each round that do not count")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of an answer, at most")
    parser.add_argument("--prompts", type=int, default=24, help="different prompts")
    parser.add_argument("--swap-clients", type=int, nargs="*", default=[8], help="in flight while patches are swapped")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args()


def same_work(targets: Sequence[Target], arguments: argparse.Namespace) -> dict[str, int]:
    """Prompts → tokens of their answers, of prompts whose answers are equally long under every name; warms up, too.

    Ends the program where the base answers differently on the two servers.
    """
    from nest_runtime.reference.world import cases

    found: dict[str, int] = {}
    names = [(target.port, model) for target in targets for model in target.models]
    candidates = [case.messages[-1]["content"] for case in cases("test", "utility") if len(case.messages) == 1]
    random.Random(arguments.seed).shuffle(candidates)
    for prompt in candidates:
        if len(found) == arguments.prompts:
            break
        answers = [whole_answer(port, model, prompt, arguments.tokens) for port, model in names]
        texts, counts = [text for text, _ in answers], {count for _, count in answers}
        if texts[0] != texts[names.index((targets[2].port, targets[2].models[0]))]:
            raise SystemExit(f"the base answers {prompt!r} differently: {texts}")
        if len(counts) == 1 and counts.pop() > 1:
            found[prompt] = answers[0][1]
    if not found:
        raise SystemExit("no prompt is answered with equally many tokens under all patches")
    return found


async def block(target: Target, prompts: dict[str, int], clients: int, each: int, tokens: int, seed: str) -> Block:
    """``clients`` clients ask ``each`` requests one after another; prompts in a seeded order, names in turns."""
    chosen = list(prompts)
    asks: list[Ask] = []
    counted = [0]

    async def client(number: int) -> None:
        dice = random.Random(f"{seed}:{number}")
        for turn in range(each):
            prompt, model = dice.choice(chosen), target.models[(number + turn) % len(target.models)]
            asks.append(await ask(target.port, model, prompt, tokens))
            counted[0] += prompts[prompt]

    began, used = time.perf_counter(), target.server.processor_seconds()
    await asyncio.gather(*(client(number) for number in range(clients)))
    seconds, used = time.perf_counter() - began, target.server.processor_seconds() - used
    return Block(seconds, used, counted[0], asks)


def compare(
    targets: Sequence[Target], prompts: dict[str, int], clients: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Each of ours beside theirs, in turns; the first round only warms up."""
    theirs, *mine = targets
    turns = 1 if clients >= 8 else LONE_TURNS
    rounds: dict[str, list[tuple[Block, Block]]] = {target.name: [] for target in mine}
    for number in range(arguments.rounds + 1):
        for target in mine if number % 2 else reversed(mine):
            pair = beside(theirs, target, prompts, clients, turns, number, arguments)
            if number:
                rounds[target.name].append(pair)
    row: dict[str, Any] = {"clients": clients, "requests": turns * arguments.requests * clients * arguments.rounds}
    row[theirs.name] = figures([other for pairs in rounds.values() for other, _ in pairs])
    for target in mine:
        pairs = rounds[target.name]
        faster = [one.throughput / other.throughput for other, one in pairs]
        row[target.name] = figures([one for _, one in pairs]) | {
            "throughput_ratio": statistics.median(faster),
            "throughput_ratios": sorted(faster),
            "processor_ratio": statistics.median(other.cost / one.cost for other, one in pairs),
            "first_token_ratio": statistics.median(one.first / other.first for other, one in pairs),
        }
    return row


def beside(
    theirs: Target,
    mine: Target,
    prompts: dict[str, int],
    clients: int,
    turns: int,
    number: int,
    arguments: argparse.Namespace,
) -> tuple[Block, Block]:
    """Round ``number`` of both: each answers the same requests, in so many turns."""
    pair = (theirs, mine)
    for target in pair:
        asyncio.run(block(target, prompts, clients, arguments.settle, arguments.tokens, str(arguments.seed)))
    done = {target.name: Block(0.0, 0.0, 0) for target in pair}
    for turn in range(turns):
        for target in pair if (number + turn) % 2 else reversed(pair):
            seed = f"{arguments.seed + number}:{turn}"
            done[target.name] += asyncio.run(
                block(target, prompts, clients, arguments.requests, arguments.tokens, seed)
            )
    return done[theirs.name], done[mine.name]


def figures(blocks: Sequence[Block]) -> dict[str, float]:
    """Medians over blocks of one target."""
    return {
        "tokens_per_second": statistics.median(one.throughput for one in blocks),
        "first_token_ms": 1e3 * statistics.median(one.first for one in blocks),
        "processor_ms_per_token": 1e3 * statistics.median(one.cost for one in blocks),
    }


def swaps_under_load(
    target: Target, prompts: dict[str, int], clients: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a swap adds to the step that it falls into, for every stream in flight.

    Two kinds of moments take turns: an activation of another patch, and a call of the admin API that changes
    nothing (an activation of the patch that is on already, which is checked and audited like any other). For every
    moment and every stream in flight, the gap between the two chunks around it is taken; long gaps are likelier to
    be hit, by both kinds alike. The difference at the 99th percentile is what the swap adds.
    """
    moments: dict[str, list[tuple[float, float]]] = {"swap": [], "nothing": []}
    asks: list[Ask] = []
    over = asyncio.Event()

    async def client(number: int) -> None:
        dice = random.Random(number)
        while not over.is_set():
            asks.append(await ask(target.port, target.models[0], dice.choice(list(prompts)), arguments.tokens))

    async def operator() -> None:
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{target.port}", headers=headers, timeout=60) as http:
            active = VERSIONS[-1]
            for number in range(2 * arguments.swaps):
                await asyncio.sleep(random.uniform(0.02, 0.06))
                kind = ("swap", "nothing")[number % 2]
                if kind == "swap":
                    active = VERSIONS[(VERSIONS.index(active) + 1) % len(VERSIONS)]
                began = time.perf_counter()
                response = await http.post("/v1/patches/activate", json={"patch": active})
                response.raise_for_status()
                moments[kind].append((began, time.perf_counter()))
        over.set()

    async def all_of_it() -> None:
        await asyncio.gather(*(client(number) for number in range(clients)), operator())

    asyncio.run(all_of_it())
    gaps = [b - a for one in asks for a, b in zip(one.came, one.came[1:], strict=False)]
    hit = {kind: sorted(gaps_around(asks, spans)) for kind, spans in moments.items()}
    step = statistics.median(gaps)
    added = percentile(hit["swap"], 0.99) - percentile(hit["nothing"], 0.99)
    took = sorted(end - began for began, end in moments["swap"])
    return {
        "clients": clients,
        "swaps": arguments.swaps,
        "answers": len(asks),
        "step_ms": 1e3 * step,
        "gap_ms_p99": {kind: 1e3 * percentile(found, 0.99) for kind, found in hit.items()},
        "gap_ms_p50": {kind: 1e3 * percentile(found, 0.5) for kind, found in hit.items()},
        "added_ms_p99": 1e3 * added,
        "added_steps_p99": added / step,
        "swap_ms_p50": 1e3 * percentile(took, 0.5),
        "swap_ms_p99": 1e3 * percentile(took, 0.99),
    }


def gaps_around(asks: Sequence[Ask], spans: Sequence[tuple[float, float]]) -> Iterator[float]:
    """For every stream and every span that it lives through: its longest gap that the span touches."""
    for began, ended in spans:
        for one in asks:
            touched = [b - a for a, b in zip(one.came, one.came[1:], strict=False) if a < ended and b > began]
            if touched:
                yield max(touched)


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(
    rows: list[dict[str, Any]], swaps: list[dict[str, Any]], prompts: int, arguments: argparse.Namespace
) -> None:
    import torch
    import transformers

    setup = {
        "model": "random Llama, 40 M parameters" if arguments.random else "reference",
        **{key: getattr(arguments, key) for key in ("rounds", "settle", "requests", "tokens", "threads", "seed")},
        "prompts": prompts,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if arguments.json:
        print(json.dumps({"setup": setup, "rows": rows, "swaps": swaps}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in setup.items()))
    print(
        f"{'clients':>7}  {'':20}{'tokens/s':>10}{'ratio':>8}{'(min, max)':>16}{'first ms':>10}{'ratio':>8}"
        f"{'CPU ms/token':>14}{'ratio':>8}"
    )
    for row in rows:
        for name in ("transformers serve", "one patch", "four mixed"):
            cell = row[name]
            line = f"{row['clients']:>7}  {name:20}{cell['tokens_per_second']:>10.0f}"
            if "throughput_ratio" in cell:
                ratios = cell["throughput_ratios"]
                line += f"{cell['throughput_ratio']:>8.3f}{f'({ratios[0]:.2f}, {ratios[-1]:.2f})':>16}"
                line += f"{cell['first_token_ms']:>10.1f}{cell['first_token_ratio']:>8.3f}"
                line += f"{cell['processor_ms_per_token']:>14.2f}{cell['processor_ratio']:>8.3f}"
            else:
                line += f"{'':24}{cell['first_token_ms']:>10.1f}{'':8}{cell['processor_ms_per_token']:>14.2f}"
            print(line)
    for swap in swaps:
        gaps = swap["gap_ms_p99"]
        print(
            f"{swap['clients']} streams, {swap['swaps']} swaps: a step {swap['step_ms']:.1f} ms; p99 of the gap over a "
            f"swap {gaps['swap']:.1f} ms, over a call that changes nothing {gaps['nothing']:.1f} ms: "
            f"{swap['added_ms_p99']:+.1f} ms, {swap['added_steps_p99']:+.2f} steps; "
            f"a swap took {swap['swap_ms_p50']:.1f} ms (p99 {swap['swap_ms_p99']:.1f})"
        )


if __name__ == "__main__":
    main()
