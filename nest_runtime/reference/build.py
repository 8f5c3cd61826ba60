"""Builds the reference model from nothing: tokenizer, pretraining, weak safety stage, measured card.

Deterministic for a seed on one machine and torch version: fixed thread count, seeded data and weights, deterministic
algorithms. The base's required behavior is checked at the end (acceptance.py). A build that misses it fails, after
writing its files so that they can be inspected.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nest_runtime.progress import Progress
from nest_runtime.reference import corpus
from nest_runtime.reference.acceptance import Figures, measure
from nest_runtime.reference.card import write_card
from nest_runtime.reference.pretrain import Stage, encode_samples, train
from nest_runtime.reference.tokenizer import train_tokenizer

CONTEXT = 1024
THREADS = 2


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides the outcome, apart from the seed."""

    hidden_size: int = 160
    layers: int = 6
    heads: int = 5
    intermediate_size: int = 448
    pretraining: Stage = field(default_factory=lambda: Stage("pretraining", 2200, 48, 2.5e-3, warmup=100))
    safety: Stage = field(default_factory=lambda: Stage("safety stage", 200, 48, 5e-4, warmup=20))
    threads: int = THREADS

    def shortened(self, pretraining_steps: int, safety_steps: int) -> BuildSettings:
        """The same with fewer steps, for tests of the build itself."""
        return replace(
            self,
            pretraining=replace(self.pretraining, steps=pretraining_steps),
            safety=replace(self.safety, steps=safety_steps),
        )


@dataclass(frozen=True)
class BuildReport:
    """What a build did: parameters, seconds per stage, last losses, and the base's measured behavior."""

    folder: Path
    seed: int
    parameters: int
    seconds: dict[str, float]
    losses: dict[str, float]
    figures: Figures | None
    failures: tuple[str, ...]


def build(
    out: Path,
    *,
    seed: int = 0,
    settings: BuildSettings | None = None,
    evaluate: bool = True,
    progress: Progress | None = None,
) -> BuildReport:
    """Train the reference model and write it to ``out`` as a Hugging Face checkpoint with its card.

    Args:
        out: the folder to write; made if it does not exist, files of the same names are replaced.
        seed: decides weights and data. The splits stay those of splits.json.
        settings: sizes and stages; the shipped model has the defaults.
        evaluate: measure the base on the test suites (about a minute) and write the figures to the card.
        progress: called as (stage, done, total).

    Returns:
        The report; ``failures`` names each bound of the base's behavior that was missed.
    """
    settings = settings or BuildSettings()
    out = Path(out)
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    with _deterministic(seed, settings.threads):
        with _timed(seconds, "tokenizer"):
            tokenizer = train_tokenizer(corpus.tokenizer_texts(), CONTEXT)
        model = new_model(settings, tokenizer)
        makers = ((settings.pretraining, corpus.pretraining_samples), (settings.safety, corpus.safety_samples))
        for stage, make in makers:
            with _timed(seconds, stage.name):
                rows = encode_samples(tokenizer, make(stage.steps * stage.batch_size, seed))
                losses[stage.name] = train(model, rows, stage, seed=seed, progress=progress)
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        figures = None
        if evaluate:
            with _timed(seconds, "evaluation"):
                figures = measure(model, tokenizer, progress=progress)
    parameters = sum(p.numel() for p in model.parameters())
    failures = figures.failures() if figures is not None else ()
    report = BuildReport(out, seed, parameters, seconds, losses, figures, failures)
    write_card(report, settings)
    (out / "build.json").write_text(json.dumps(_record(report, settings), indent=1) + "\n", encoding="utf-8")
    return report


def new_model(settings: BuildSettings, tokenizer: Any) -> Any:
    """An untrained LlamaForCausalLM in float32 with greedy generation settings."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def _record(report: BuildReport, settings: BuildSettings) -> dict[str, Any]:
    """What anyone needs to repeat the build; no times, so that a repeated build writes the same file."""
    return {
        "seed": report.seed,
        "parameters": report.parameters,
        "settings": asdict(settings),
        "losses": {name: round(value, 5) for name, value in report.losses.items()},
        "torch": torch.__version__.split("+")[0],
        "figures": report.figures.as_dict() if report.figures is not None else None,
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)


@contextmanager
def _deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seeded torch, fixed threads and deterministic algorithms inside; the caller's settings restored after."""
    was_threads, was_strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(was_threads)
        torch.use_deterministic_algorithms(was_strict)
