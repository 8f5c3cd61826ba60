"""Where the answers of ``chat`` and ``serve`` part: the same model, patch and prompts, greedy, in one process.

    python benchmarks/chat_and_serve.py --model smollm2-135m-instruct-q4_1.gguf --patch v1
    python benchmarks/chat_and_serve.py --dtype float32 --at-once 1 8

Half of the prompts are harmful, half are everyday ones, all from the package. ``chat`` answers them by
``model.generate``, one by one. The server's engine answers them one by one with an empty cache, one by one with the
beginnings that prompts share kept (as ``serve`` does), and several at once. For every answer that differs it counts
the tokens before the first other one, and how far the two best tokens lay apart there, in steps of bfloat16: 0 is a
tie, and one step is what a single rounding can change. Times are of the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import nest_runtime as nest
from nest_runtime.prompts.chat import answer_chat
from nest_runtime.prompts.examples import encode, load_examples
from nest_runtime.prompts.generate import end_token_ids
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.requests.generation import EngineRequest
from nest_runtime.serve.requests.sampling import SamplingParams
from nest_runtime.serve.served_patch import ServedPatch
from nest_runtime.serve.transformers.engine import TransformersEngine

FIRST = "What is the capital of France?"
MANTISSA = 7  # bits of bfloat16, beside the one that is not stored


@dataclass
class Served:
    """The server's answers one way, and the processor time that each token took."""

    answers: list[list[int]]
    seconds: float


@dataclass
class Answered:
    """One answer: its tokens, and the gap between the two best tokens at each, in steps of bfloat16."""

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def gap(logits: torch.Tensor) -> float:
    """How far the two best of (vocabulary,) logits lie apart, in steps of bfloat16 at the best one's size."""
    best, second = logits.float().topk(2).values.tolist()
    return (best - second) / 2.0 ** (math.floor(math.log2(abs(best))) - MANTISSA)


@contextmanager
def watched(model: Any) -> Iterator[Answered]:
    """The greedy tokens and gaps of the passes inside, each of which ends in one row of logits."""
    seen = Answered()

    def look(module: Any, given: Any, logits: torch.Tensor) -> None:
        (row,) = logits.reshape(-1, logits.shape[-1])
        seen.tokens.append(int(row.argmax()))
        seen.gaps.append(gap(row))

    handle = model.get_output_embeddings().register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def chat(loaded: nest.LoadedModel, prompts: Sequence[str], tokens: int) -> list[Answered]:
    """What ``nest-runtime chat`` answers."""
    found = []
    for prompt in prompts:
        with watched(loaded.model) as answered:
            messages = [{"role": "user", "content": prompt}]
            answer_chat(loaded.model, loaded.tokenizer, messages, max_tokens=tokens)
        found.append(answered)
    return found


async def serve(
    loaded: nest.LoadedModel,
    runtime: nest.PatchRuntime,
    patch: nest.Patch,
    prompts: Sequence[str],
    tokens: int,
    at_once: Sequence[int],
) -> dict[str, Served]:
    """What ``nest-runtime serve`` answers, each way."""
    ends, pin = end_token_ids(loaded.model, loaded.tokenizer), ServedPatch(patch.digest, patch.version, patch.digest)
    ids = [tuple(encode(loaded.tokenizer, [{"role": "user", "content": prompt}])) for prompt in prompts]
    engine = TransformersEngine(loaded.model, runtime, Limits(), len(prompts), ends=ends, text=ids[0])

    async def one(prompt: tuple[int, ...]) -> list[int]:
        generation = engine.admit(EngineRequest((prompt,), (tokens,), 1, SamplingParams(), pin))
        return [token async for event in generation.events() for token in event.tokens]

    async def group(size: int, *, empty: bool = False) -> Served:
        answers, began = [], time.process_time()
        for start in range(0, len(ids), size):
            if empty:
                with engine._batch.narrow(1 << 30):  # type: ignore[union-attr]  # empties the cache
                    pass
            answers += await asyncio.gather(*map(one, ids[start : start + size]))
        return Served(answers, (time.process_time() - began) / sum(map(len, answers)))

    try:
        await engine.start()
        found = {"alone, empty cache": await group(1, empty=True)}
        for size in at_once:
            found["alone, shared beginnings" if size == 1 else f"{size} at once"] = await group(size)
        return found
    finally:
        await engine.stop()


def compare(way: str, ours: Sequence[Answered], theirs: Served) -> dict[str, Any]:
    """One row: how many answers are the same, and where the others part."""
    places, gaps = [], []
    for answered, other in zip(ours, theirs.answers, strict=True):
        if answered.tokens != other:
            pairs = zip(answered.tokens, other, strict=False)
            shorter = min(len(answered.tokens), len(other))
            place = next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)
            places.append(place)
            gaps.append(answered.gaps[min(place, len(answered.gaps) - 1)])
    return {
        "serve": way,
        "prompts": len(ours),
        "same": len(ours) - len(places),
        "first_token_differs": places.count(0),
        "median_place": statistics.median(places) if places else None,
        "median_gap": round(statistics.median(gaps), 2) if gaps else None,
        "largest_gap": round(max(gaps), 2) if gaps else None,
        "token_ms": round(1000 * theirs.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--patch", default="v3")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print every pair of answers that parts")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = nest.load_model(options.model, dtype=options.dtype)
    patch = nest.load_patch(options.patch, model_hash=loaded.hash)
    half = options.prompts // 2
    kinds = [[example.prompt for example in load_examples(name)] for name in ("everyday", "harmful")]
    prompts = [FIRST, *kinds[0][: options.prompts - half - 1], *kinds[1][:half]]
    with nest.PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
        runtime.activate(runtime.add(patch))
        began = time.process_time()
        ours = chat(loaded, prompts, options.tokens)
        took = (time.process_time() - began) / sum(len(answered.tokens) for answered in ours)
        runtime.deactivate()
        served = asyncio.run(serve(loaded, runtime, patch, prompts, options.tokens, options.at_once))
    rows = [compare(way, ours, found) for way, found in served.items()]
    if options.json:
        about = {"model": loaded.name, "patch": patch.label, "dtype": options.dtype}
        print(json.dumps({**about, "chat_token_ms": round(1000 * took, 2), "rows": rows}))
        return
    for way, found in served.items() if options.show else ():
        for prompt, answered, other in zip(prompts, ours, found.answers, strict=True):
            if answered.tokens != other:
                texts = [loaded.tokenizer.decode(ids) for ids in (answered.tokens, other)]
                print(f"{way}: {prompt}\n  chat   {texts[0]!r}\n  serve  {texts[1]!r}")
    print(f"chat takes {1000 * took:.1f} ms a token")
    print(f"{'serve':<26} {'same':>7} {'first differs':>14} {'median place':>13} {'gap':>5} {'largest':>8} {'ms':>6}")
    for row in rows:
        place, median, largest = (
            "-" if row[key] is None else f"{row[key]:g}" for key in ("median_place", "median_gap", "largest_gap")
        )
        same = f"{row['same']}/{row['prompts']}"
        first, took_ms = row["first_token_differs"], row["token_ms"]
        print(f"{row['serve']:<26} {same:>7} {first:>14} {place:>13} {median:>5} {largest:>8} {took_ms:>6.1f}")


if __name__ == "__main__":
    main()
