"""What it costs to see that the values of each pass are finite.

    python benchmarks/finite_check.py                     # the reference model
    python benchmarks/finite_check.py --model org/name --tokens 1 64 512 --json

The engine looks at the hidden states that a pass ends with, by one sum, and at the best logit of each row, which
choosing a token needs anyway (serve/transformers/continuous.py, serve/requests/sampling.py). A round computes one pass
with the look and one without, in turns of changing order, on the same tokens; what is compared is processor time. The
ratio is the median over rounds of each pair's own ratio. It says nothing about GPUs, where a look waits for the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from nest_runtime.model.load import load_model
from nest_runtime.serve.requests.sampling import all_finite


def measure(model: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Passes over ``tokens`` tokens with and without the look, in pairs."""
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens))
    last: list[torch.Tensor] = []
    tap = model.base_model.register_forward_hook(lambda *given: last.append(given[2].last_hidden_state))

    def once(look: bool) -> float:
        began = time.process_time()
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        hidden = last.pop()
        if look:
            assert all_finite(hidden)
        best = logits.max(dim=-1).values
        if look:
            assert all_finite(best)
        return time.process_time() - began

    with torch.inference_mode():
        for _ in range(5):
            once(True)
        pairs = []
        for number in range(rounds):
            first = number % 2 == 0
            times = {first: once(first)}
            times[not first] = once(not first)
            pairs.append((times[True], times[False]))
    tap.remove()
    ratios = sorted(a / b for a, b in pairs)
    return {
        "tokens": tokens,
        "pass_ms": round(1000 * statistics.median(b for _, b in pairs), 4),
        "ratio": round(statistics.median(ratios), 4),
        "middle_half": [round(ratios[rounds // 4], 4), round(ratios[3 * rounds // 4], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512], help="tokens in a pass")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model).model
    rows = [measure(model, tokens, options.rounds) for tokens in options.tokens]
    if options.json:
        print(json.dumps({"model": options.model, "rounds": options.rounds, "rows": rows}))
        return
    print(f"{'tokens':>7} {'pass, ms':>9} {'with / without':>15} {'middle half':>16}")
    for row in rows:
        low, high = row["middle_half"]
        print(f"{row['tokens']:>7} {row['pass_ms']:>9.2f} {row['ratio']:>15.3f} {low:>8.3f}–{high:.3f}")


if __name__ == "__main__":
    main()
