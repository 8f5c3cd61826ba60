"""Row ``eval``: the answers of an evaluation, beside ``model.generate`` in plain batches of 64.

    python benchmarks/rows/evaluate.py --models FOLDER

SmolLM2 in bfloat16 under its patch as a hook, 500 prompts of 64 new tokens at most, greedy. Plain batches take the
prompts in their order, padded on the left, as a script does that somebody writes in an evening.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from measure import Clock, Goal, Line, Report, Series, run, threads
from subjects import load, smallest

from nest_runtime.evaluate.run import model_answerer
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import encode, load_examples
from nest_runtime.prompts.generate import end_token_ids, pad_token_id
from nest_runtime.runtime import PatchRuntime

NEW_TOKENS, BATCH = 64, 64


def measure(arguments: argparse.Namespace) -> Report:
    threads(arguments)
    loaded, patch = load(smallest(arguments))
    count, tokens, rounds = (24, 8, 1) if arguments.quick else (500, NEW_TOKENS, 2)
    examples = [example for kind in ("harmful", "borderline") for example in load_examples(bundled(kind))]
    talks = [list(examples[index * len(examples) // count].messages) for index in range(count)]
    answer = model_answerer(loaded.model, loaded.tokenizer, max_new_tokens=tokens)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime, runtime.using(runtime.add(patch)):
        plain(loaded, talks[:8], 4)
        answer(talks[:8], lambda positions, answers: None)
        clock = Clock(arguments.seconds)
        for number in range(rounds):
            if not clock.one_more():
                break
            for way in ("ours", "plain") if number % 2 else ("plain", "ours"):
                began = time.perf_counter()
                if way == "ours":
                    answer(talks, lambda positions, answers: None)
                else:
                    plain(loaded, talks, tokens)
                times[way].append(time.perf_counter() - began)
    against = Series(f"model.generate, batches of {BATCH}", tuple(times["plain"]))
    what = f"eval's answers, {count} prompts × {tokens} tokens, SmolLM2, bfloat16"
    return Report([Line(what, Series("ours", tuple(times["ours"])), against, Goal(0.6))])


def plain(loaded: Any, talks: Sequence[Any], tokens: int) -> list[str]:
    """Answers by ``model.generate`` in batches of the order given."""
    model, tokenizer = loaded.model, loaded.tokenizer
    pad, ends, texts = pad_token_id(model, tokenizer), end_token_ids(model, tokenizer), []
    for start in range(0, len(talks), BATCH):
        rows = [encode(tokenizer, messages) for messages in talks[start : start + BATCH]]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=ends,
                pad_token_id=pad,
            )
        texts += tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    run("eval", __doc__, measure)
