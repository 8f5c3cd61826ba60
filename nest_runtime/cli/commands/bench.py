"""The command bench: what this machine and model can do, and what a patch costs on them, in seconds.

Side by side: every round measures the base, the patch as a hook and the patch folded, in turn, so that a noisy
machine disturbs all alike; figures are medians, and the ratios are those of the rounds. What a patch contains does
not matter to its speed, so a random one of the usual size stands in where the model has none. More thorough, and for
developers: benchmarks/runtime.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import examples, model_for
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output
from nest_runtime.errors import ModelError
from nest_runtime.escape import short

if TYPE_CHECKING:
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.progress import Progress
    from nest_runtime.runtime import PatchRuntime

BASE, HOOK, FOLD = "base", "hook", "fold"
LEAST_ROUNDS = 3
SWITCHES = 20
NEURON_SHARE, CLUSTERS = 0.005, 2  # of the random patch, about what NeST keeps
_ROUNDS_WANTED = 8


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "bench",
        rich_help_panel="Measure",
        epilog=examples(
            "nest-runtime bench", "nest-runtime bench --model ./my-model --patch v1 --batch 8 --seconds 30"
        ),
    )(bench)


def bench(
    ctx: typer.Context,
    model: ModelOption = "reference",
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch",
            metavar="PATCH",
            autocompletion=complete.patches,
            help="The active one, else a random one, by default.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Prompts at a time.")] = 1,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Tokens of each prompt.")
    ] = 128,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.1, help="About how long to measure.")
    ] = 10.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure speed: tokens per second of the base, and what a patch costs as a hook and folded in.

    Read the ratios: they hold on a busy machine too. Answers are not looked at, so this says nothing about safety.
    """
    out = Output.of(ctx, as_json)
    from nest_runtime.model.load import load_model
    from nest_runtime.runtime import PatchRuntime

    began = time.perf_counter()
    model = model_for(ctx, out, model, patch)
    loaded = load_model(model, device=device, dtype=dtype)
    chosen = _patch_for(loaded, patch)
    load_seconds = time.perf_counter() - began
    length = _prompt_length(loaded, prompt_tokens)
    if length < prompt_tokens:
        out.note(f"{loaded.name} reads at most {length:,} tokens: prompts have so many, not {prompt_tokens:,}")
    with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime, out.bars() as bars:
        key = runtime.add(chosen)
        run = Bench(loaded, runtime, key, batch, length)
        run.measure(seconds, bars)
        document = {**_setup(loaded, chosen, run), "load_seconds": round(load_seconds, 2), **run.report()}
    out.result(document, lambda: _render(out, document))


@dataclass
class Bench:
    """One benchmark: a model, a patch on it, and the seconds that passes took.

    Attributes:
        loaded, runtime, key: the model, its runtime, and the patch in it.
        batch, prompt_tokens: of every pass.
        new_tokens: of a generation; chosen by the model's speed.
        modes: what can be measured here: ``fold`` not on quantized weights.
        times: seconds per round, by (mode, ``prefill`` or ``decode``).
        switches: seconds per switch between the base and the patch, by mode.
    """

    loaded: LoadedModel
    runtime: PatchRuntime
    key: str
    batch: int
    prompt_tokens: int
    new_tokens: int = 32
    modes: list[str] = field(default_factory=lambda: [BASE, HOOK, FOLD])
    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    switches: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, seconds: float, progress: Progress) -> None:
        """Rounds of all modes until the time is over, three at least; then the switches."""
        self._warm_up(seconds)
        began, rounds = time.perf_counter(), 0
        while rounds < LEAST_ROUNDS or time.perf_counter() - began < seconds:
            turn = rounds % len(self.modes)
            for mode in self.modes[turn:] + self.modes[:turn]:
                self._switch(mode)
                self.times.setdefault((mode, "prefill"), []).append(self._seconds(self._prefill))
                self.times.setdefault((mode, "decode"), []).append(self._seconds(self._generate))
            rounds += 1
            progress("measuring", rounds, 0)
        for mode in self.modes:
            if mode != BASE:
                self.switches[mode] = [self._switch_seconds(mode) for _ in range(SWITCHES)]
        self.runtime.deactivate()

    def report(self) -> dict[str, Any]:
        """Tokens per second and ratios to the base, by mode; milliseconds per switch."""
        rows = []
        for mode in self.modes:
            row: dict[str, Any] = {"mode": mode}
            for what, tokens in (("prefill", self.prompt_tokens), ("decode", self.new_tokens)):
                took, base = self.times[mode, what], self.times[BASE, what]
                row[f"{what}_tokens_per_second"] = round(self.batch * tokens / statistics.median(took), 1)
                ratios = [b / t for b, t in zip(base, took, strict=True)]
                row[f"{what}_vs_base"] = round(statistics.median(ratios), 3)
            rows.append(row)
        switch = {mode: round(1e3 * statistics.median(took), 3) for mode, took in self.switches.items()}
        return {"rows": rows, "switch_ms": switch, "rounds": len(self.times[BASE, "decode"])}

    def _warm_up(self, seconds: float) -> None:
        """First passes, which are slow everywhere; and as many new tokens as leave time for several rounds."""
        for mode in list(self.modes):
            try:
                self._switch(mode)
            except ModelError:  # fold on quantized weights
                self.modes.remove(mode)
                continue
            self._prefill()
        self.new_tokens = 4
        once = max(self._seconds(self._generate), 1e-6)
        room = seconds / _ROUNDS_WANTED / len(self.modes) / once
        self.new_tokens = max(4, min(64, int(4 * room)))

    def _switch(self, mode: str) -> None:
        if mode == BASE:
            self.runtime.deactivate()
        else:
            self.runtime.activate(self.key, mode=mode)  # type: ignore[arg-type]

    def _switch_seconds(self, mode: str) -> float:
        """Seconds from the base to the patch."""
        self.runtime.deactivate()
        return self._seconds(lambda: self._switch(mode))

    def _prefill(self) -> None:
        import torch

        from nest_runtime.prompts.decoding import last_logits

        with torch.inference_mode():
            self.loaded.model(self._prompt(), use_cache=False, **last_logits(self.loaded.model))

    def _generate(self) -> None:
        """Exactly ``new_tokens`` greedy tokens after a prompt of one token, so that decoding is what is measured."""
        import torch
        from transformers import GenerationConfig

        from nest_runtime.prompts.generate import pad_token_id

        config = GenerationConfig(
            do_sample=False,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            pad_token_id=pad_token_id(self.loaded.model, self.loaded.tokenizer),
        )
        ids = self._prompt()[:, :1]
        with torch.inference_mode():
            self.loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def _prompt(self) -> Any:
        """Token ids (batch, prompt_tokens); which ones makes no difference to the speed."""
        import torch

        generator = torch.Generator().manual_seed(0)
        highest = int(self.loaded.model.config.get_text_config().vocab_size)
        ids = torch.randint(0, highest, (self.batch, self.prompt_tokens), generator=generator)
        return ids.to(self.loaded.device)

    def _seconds(self, action: Callable[[], None]) -> float:
        self._settle()
        began = time.perf_counter()
        action()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        """Wait for what the device still does."""
        import torch

        if self.loaded.device.startswith("cuda"):
            torch.cuda.synchronize()
        elif self.loaded.device.startswith("mps"):
            torch.mps.synchronize()


def random_patch(loaded: LoadedModel) -> Patch:
    """A patch of the usual size and random numbers, for measuring and nothing else."""
    import torch

    from nest_runtime.model.anatomy import find_projections, unwrap
    from nest_runtime.model.base_rows import rows_digest
    from nest_runtime.patch.patch import Patch, Site

    generator = torch.Generator().manual_seed(0)
    sites = []
    for projection in find_projections(loaded.model):
        count = max(CLUSTERS, round(NEURON_SHARE * projection.d_out))
        neurons = torch.randperm(projection.d_out, generator=generator)[:count].sort().values.int()
        deltas = 0.01 * torch.randn(CLUSTERS, projection.d_in, generator=generator)
        clusters = (torch.arange(count) % CLUSTERS).int()
        sites.append(Site(projection.name, projection.d_out, deltas, neurons, clusters))  # type: ignore[arg-type]
    return Patch(
        name="random",
        version="bench",
        base_hash=loaded.hash,
        rows_digest=rows_digest(loaded.model, {site.name: site.neurons.tensor() for site in sites}),
        architecture=type(unwrap(loaded.model)).__name__,
        sites=tuple(sites),
    )


def _patch_for(loaded: LoadedModel, ref: str | None) -> Patch:
    """The patch named, else the active one, else the newest of the model, else a random one."""
    from nest_runtime.resolve import load_patch
    from nest_runtime.store.store import Store

    if ref is not None:
        return load_patch(ref, model_hash=loaded.hash)
    store = Store()
    known = store.active(loaded.hash) or max(store.list(loaded.hash), key=lambda entry: entry.serial, default=None)
    return random_patch(loaded) if known is None else store.get(known.digest)


def _prompt_length(loaded: LoadedModel, wanted: int) -> int:
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    return min(wanted, limit) if isinstance(limit, int) else wanted


def _setup(loaded: LoadedModel, patch: Patch, run: Bench) -> dict[str, Any]:
    import torch

    return {
        "model": loaded.name,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "device": loaded.device,
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "patch": patch.label,
        "digest": patch.digest,
        "patch_parameters": patch.parameters,
        "batch": run.batch,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": run.new_tokens,
    }


def _render(out: Output, document: dict[str, Any]) -> None:
    out.line(
        f"{document['model']}: {document['parameters']:,} parameters, {document['dtype']} on {document['device']}, "
        f"{document['threads']} threads"
    )
    out.line(f"{document['patch']} ({short(document['digest'])}): {document['patch_parameters']:,} parameters")
    out.line()
    right = ("PROMPT TOK/S", "× BASE", "ANSWER TOK/S", "× BASE", "SWITCH MS")
    rows = [
        (
            row["mode"],
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['prefill_vs_base']:.2f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            f"{row['decode_vs_base']:.2f}",
            document["switch_ms"].get(row["mode"]),
        )
        for row in document["rows"]
    ]
    out.table(("", *right), rows, right=right)
    out.note(
        f"medians of {document['rounds']} rounds, {document['batch']} x {document['prompt_tokens']} prompt tokens and "
        f"{document['new_tokens']} new ones; × is the median of the rounds' own ratios to the base"
    )
