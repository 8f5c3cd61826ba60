"""The command plan: what training and serving a model will take, before anything loads (train/plan.py)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli.common import examples, model_flag, prompts_named
from nest_runtime.cli.options import Flags, with_flags
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output, size
from nest_runtime.cli.training import PROMPTS, Borderline, RecipeRef, borderline_of, recipe_of
from nest_runtime.errors import UsageError
from nest_runtime.train.recipe import Recipe

if TYPE_CHECKING:
    from nest_runtime.train.sizes import Load, Speed


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "plan",
        rich_help_panel="Make patches",
        epilog=examples(
            "nest-runtime plan --model meta-llama/Llama-3.1-8B-Instruct",
            "nest-runtime plan --model M --harmful bad.jsonl --benign good.jsonl",
            "nest-runtime plan --model M --tflops 400 --gbps 2000   # another machine",
        ),
    )(with_flags(plan))


def plan(
    ctx: typer.Context,
    *,
    model: ModelOption = "reference",
    harmful: Annotated[
        str | None, typer.Option("--harmful", metavar="FILE", help=f"Prompts to refuse: {PROMPTS} 1,000 by default.")
    ] = None,
    benign: Annotated[
        str | None, typer.Option("--benign", metavar="FILE", help="Prompts to answer as before. 1,000 by default.")
    ] = None,
    borderline: Borderline = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Length of a prompt, without files.")
    ] = 64,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", metavar="X", min=1e-6, help="Speed of the machine; measured on this one by default."),
    ] = None,
    gbps: Annotated[
        float | None, typer.Option("--gbps", metavar="X", min=1e-6, help="Its memory bandwidth, in GB a second.")
    ] = None,
    settings: Annotated[Mapping[str, Any], Flags(Recipe, only=("z", "k_max", "steps"), unset=True)],
    recipe_name: RecipeRef = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, disk and time of training and serving a model, from its configuration alone.

    No weights are read or fetched. Sizes are exact; the rest rests on assumptions, which are printed.
    """
    out = Output.of(ctx, as_json)
    if (harmful is None) != (benign is None):
        raise UsageError("one of --harmful and --benign without the other", "give both, or neither")
    if borderline is not None and benign is None:
        raise UsageError("--borderline is given without --benign", "give both files as `train` takes them")
    if (tflops is None) != (gbps is None):
        raise UsageError("one of --tflops and --gbps without the other", "give both; neither: they are measured")
    from nest_runtime.model.load import gguf_dtype, pick_device, resolve_model, skeleton
    from nest_runtime.train.plan import plan as estimate
    from nest_runtime.train.sizes import shape_of

    recipe = recipe_of(recipe_name, model, **settings)
    place = pick_device(device)
    name, source = resolve_model(model, config_only=True)
    empty = skeleton(source)
    if source.is_file():
        empty.config.dtype = gguf_dtype(place)
    kind, notes = _dtype(empty.config, dtype)
    shape = shape_of(empty, kind, recipe)
    load = _load(harmful, benign, borderline, model, prompt_tokens, recipe)
    ffn = (recipe.step_tokens, shape.hidden, shape.widest)
    found = estimate(shape, recipe, load, _speed(place, kind, ffn, tflops, gbps))
    memory, total = _memory(place)
    document = {"model": name, "dtype": kind, "device": place, **found, "notes": notes}
    peak = found["weights_bytes"] + max(stage["memory_bytes"] for stage in found["stages"].values())
    document |= {"peak_bytes": peak, "device_bytes": total, "free_bytes": memory, "fits": peak <= memory}
    out.result(document, lambda: _render(out, document))
    if not out.json:
        files = f"--harmful {shlex.quote(harmful or 'FILE')} --benign {shlex.quote(benign or 'FILE')}"
        own = f" --borderline {shlex.quote(borderline)}" if borderline else ""
        own += f" --recipe {shlex.quote(recipe_name)}" if recipe_name else ""
        own += "".join(f" --{name.replace('_', '-')} {value}" for name, value in settings.items() if value is not None)
        out.note(f"next: nest-runtime train{model_flag(model)} {files}{own} --out v1.safetensors")


def _dtype(config: Any, asked: str) -> tuple[str, list[str]]:
    """What the weights will be in: as asked, else what the configuration says, else float32; and remarks."""
    notes = []
    if getattr(config, "quantization_config", None):
        notes.append("the checkpoint is quantized: counted as if it were not")
    stored = config.dtype if config.dtype is not None else config.get_text_config().dtype
    if asked == "auto" and stored is None:
        notes.append("the configuration names no dtype: float32 is assumed")
    kind = asked if asked != "auto" else str(stored or "float32").removeprefix("torch.")
    from nest_runtime.train.sizes import SCALES

    if kind not in SCALES:
        raise UsageError(f"dtype {kind!r} is not supported; expected one of {', '.join(SCALES)}", "give --dtype")
    return kind, notes


def _load(
    harmful: str | None, benign: str | None, borderline: str | None, model: str, prompt_tokens: int, recipe: Recipe
) -> Load:
    from nest_runtime.prompts.examples import check_sides
    from nest_runtime.train.sizes import Load, load_of

    if harmful is None or benign is None:
        return Load(prompt_tokens=prompt_tokens, answer_tokens=recipe.answer_tokens)
    bad = prompts_named(harmful, "harmful")
    good = [*prompts_named(benign, "benign"), *borderline_of(borderline, model, recipe)]
    check_sides(bad, good)
    return load_of(bad, good, recipe)


def _speed(device: str, dtype: str, ffn: tuple[int, int, int], tflops: float | None, gbps: float | None) -> Speed:
    from nest_runtime.train.sizes import Speed, measure_speed

    if tflops is None or gbps is None:
        return measure_speed(device, dtype, ffn)
    return Speed(tflops * 1e12, gbps * 1e9)


def _memory(device: str) -> tuple[int, int]:
    """Free and whole memory of the device."""
    import psutil
    import torch

    if device.startswith("cuda"):
        free, whole = torch.cuda.mem_get_info(device)
        return int(free), int(whole)
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _render(out: Output, document: dict[str, Any]) -> None:
    patch = document["patch"]
    out.pairs(
        {
            "model": f"{document['model']}: {document['parameters']:,} parameters, {size(document['weights_bytes'])} "
            f"in {document['dtype']}",
            "sites": f"{document['sites']} in {document['patched_layers']} of {document['layers']} layers",
            "patch": f"{patch['parameters']:,} trained numbers, {patch['neurons']:,} neurons, {size(patch['bytes'])}",
        }
    )
    out.line()
    columns = ("BEYOND THE MODEL", "WITH IT", "DISK", "TIME")
    rows = [
        (name, size(stage["memory_bytes"]), size(stage["memory_bytes"] + document["weights_bytes"]),
         size(stage["disk_bytes"]) if stage["disk_bytes"] else "", _duration(stage["seconds"]))
        for name, stage in document["stages"].items()
    ]  # fmt: skip
    out.table(("STAGE", *columns), rows, right=columns)
    out.line()
    fits = "fits" if document["fits"] else "does not fit"
    out.line(
        f"peak {size(document['peak_bytes'])}: {fits} in the {size(document['free_bytes'])} free of "
        f"{size(document['device_bytes'])} on {document['device']}"
    )
    for note in [*document["notes"], *_assumption_notes(document["assumptions"])]:
        out.line(f"- {note}")


def _assumption_notes(given: dict[str, Any]) -> list[str]:
    """The assumptions, in words."""
    own = "given in the file" if given["answers_given"] else "generated"
    return [
        f"assumes {given['harmful']:,} harmful and {given['benign']:,} benign prompts of at most "
        f"{given['prompt_tokens']} tokens, answers of {given['answer_tokens']} (benign ones {own})",
        f"assumes {100 * given['neurons_kept']:.1f} % of neurons kept (normally distributed probe weights) and "
        f"{given['clusters_per_site']} clusters a site",
        f"assumes {given['flops'] / 1e12:.3g} TFLOP/s, of which a model reaches {100 * given['efficiency']:.0f} %, and "
        f"{given['bandwidth'] / 1e9:,.0f} GB/s ({given['speed']}); {given['probe_passes']} passes of a probe",
        f"assumes {given['steps']} steps of {given['batch_size']} rows, no gradient checkpointing; locating by "
        f"{given['batch_tokens']:,} tokens; serving with {given['served_tokens']:,} tokens in the cache",
    ]


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
