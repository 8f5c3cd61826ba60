"""What a patch costs while it is on, and what a switch takes. Side by side, seeded, medians.

    python benchmarks/runtime.py                      # a random Llama of 40 M parameters
    python benchmarks/runtime.py --model FOLDER --dtype bfloat16 --device cuda

The base is a second copy of the model that no runtime ever touched; its passes and the patched
ones take turns, so that a noisy machine disturbs both alike. A patch here has 40 neurons and 2
clusters in every projection, about what NeST keeps on real models. It says nothing about safety.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nest_runtime.model.anatomy import find_projections
from nest_runtime.model.base_rows import rows_digest
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.runtime import PatchRuntime

NEURONS, CLUSTERS = 40, 2


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    base = load(arguments)
    model = copy.deepcopy(base)
    patches = [random_patch(base, f"v{i}", arguments.seed + i) for i in (1, 2)]
    runtime = PatchRuntime(model, base_hash=patches[0].base_hash)
    added = [seconds(lambda p=patch: runtime.add(p), arguments.device) for patch in patches]  # type: ignore[misc]
    rows = [*forward_rows(base, runtime, arguments), *switch_rows(runtime, arguments)]
    rows.append({"what": "add (checks, hooks, buffers)", "ms": 1e3 * statistics.median(added)})
    report(base, rows, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint; a random Llama without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="tokens in a pass")
    parser.add_argument("--rows", type=int, default=4, help="batch size")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def load(arguments: argparse.Namespace) -> Any:
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    else:
        config = LlamaConfig(
            vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
        )
        model = LlamaForCausalLM(config).to(dtype)
    return model.eval().to(arguments.device)


def random_patch(model: Any, version: str, seed: int) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for p in find_projections(model):
        neurons = torch.randperm(p.d_out, generator=generator)[:NEURONS].sort().values.int()
        deltas = 0.01 * torch.randn(CLUSTERS, p.d_in, generator=generator)
        clusters = (torch.arange(len(neurons)) % CLUSTERS).int()
        sites.append(Site(p.name, p.d_out, deltas, neurons, clusters))  # type: ignore[arg-type]
    return Patch(
        name="benchmark",
        version=version,
        base_hash=model_hash(model),
        rows_digest=rows_digest(model, {site.name: site.neurons.tensor() for site in sites}),
        architecture=type(model).__name__,
        sites=tuple(sites),
    )


def forward_rows(base: Any, runtime: PatchRuntime, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for tokens in arguments.tokens:
        ids = torch.randint(0, base.config.vocab_size, (arguments.rows, tokens), device=arguments.device)
        mixed = [("v1", "v2", None)[i % 3] for i in range(arguments.rows)]
        ways: dict[str, tuple[str | None, Any]] = {
            "runtime there, nothing on": (None, nullcontext),
            "hook": ("hook", nullcontext),
            "fold": ("fold", nullcontext),
            "fold v1, using v2": ("fold", lambda: runtime.using("v2")),
            "rows under v1, v2, base": (None, lambda mixed=mixed: runtime.using_rows(mixed)),
        }
        for name, (mode, context) in ways.items():
            runtime.deactivate()
            if mode:
                runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            with torch.inference_mode(), context():
                plain, patched = side_by_side(
                    lambda: base(ids, use_cache=False),  # noqa: B023
                    lambda: runtime.model(ids, use_cache=False),  # noqa: B023
                    arguments,
                )
            ratio = statistics.median(b / a for a, b in zip(plain, patched, strict=True))
            milliseconds = 1e3 * statistics.median(patched)
            rows.append({"what": name, "batch": f"{arguments.rows}x{tokens}", "ms": milliseconds, "ratio": ratio})
    runtime.deactivate()
    return rows


def switch_rows(runtime: PatchRuntime, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for mode in ("hook", "fold"):
        times = []
        for i in range(arguments.repeats):
            switch = lambda: runtime.activate(f"v{1 + i % 2}", mode=mode)  # noqa: B023, E731
            times.append(seconds(switch, arguments.device))
        runtime.deactivate()
        rows.append({"what": f"switch v1 <-> v2, {mode}", "ms": 1e3 * statistics.median(times[1:])})
    return rows


def side_by_side(
    first: Callable[[], Any], second: Callable[[], Any], arguments: argparse.Namespace
) -> tuple[list[float], list[float]]:
    for warm_up in (first, second, first, second):
        warm_up()
    pairs = [
        (seconds(first, arguments.device), seconds(second, arguments.device))
        if i % 2
        else (seconds(second, arguments.device), seconds(first, arguments.device))[::-1]
        for i in range(arguments.repeats)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def seconds(action: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def report(base: Any, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    setup = {
        "model": arguments.model or "random Llama",
        "parameters": sum(p.numel() for p in base.parameters()),
        "sites": len(find_projections(base)),
        **{key: getattr(arguments, key) for key in ("device", "dtype", "threads", "repeats", "seed")},
        "torch": torch.__version__,
    }
    if arguments.json:
        print(json.dumps({"setup": setup, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in setup.items()))
    print(f"{'':32}{'batch':>8}{'ms':>10}{'x base':>9}")
    for row in rows:
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        print(f"{row['what']:32}{row.get('batch', ''):>8}{row['ms']:>10.3f}{ratio:>9}")


if __name__ == "__main__":
    main()
