"""The command plot: pictures of what was located, trained and measured (plots/)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import base_hash_of, examples, prompts_named, writable_folder
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, Output
from nest_runtime.errors import UsageError
from nest_runtime.hints import did_you_mean

if TYPE_CHECKING:
    from nest_runtime.plots.scan import Scan
    from nest_runtime.plots.view import NeuronView
    from nest_runtime.prompts.examples import Example

FORMATS = ("png", "svg")


SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE…",
        autocompletion=complete.patches,
        help="Patches, sites files, results of eval --out, comparison.json.",
    ),
]
KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="NAME",
        autocompletion=complete.pictures,
        help="neurons, z, silhouette, norms, silhouette-by-k, clusters, families, tradeoff, parameters; repeat "
        "it. All by default.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the pictures go.")]
FormatOption = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="NAME", autocompletion=complete.formats, help="png or svg; both by default."),
]
HarmfulOption = Annotated[
    str | None,
    typer.Option("--harmful", metavar="FILE", help="With --benign: run prompts, for the pictures that need them."),
]
BenignOption = Annotated[str | None, typer.Option("--benign", metavar="FILE", help="See --harmful.")]
ViewedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=complete.models,
        help="Whose v3 is meant, and what prompts are run on.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "plot",
        rich_help_panel="Look",
        epilog=examples(
            "nest-runtime plot v3 --out pictures",
            "nest-runtime plot sites.json --harmful bad.jsonl --benign good.jsonl",
            "nest-runtime plot base.json v3.json --kind families --format png",
        ),
    )(plot)


def plot(
    ctx: typer.Context,
    sources: SourcesArgument,
    kind: KindOption = None,
    out_folder: OutOption = Path("pictures"),
    formats: FormatOption = None,
    harmful: HarmfulOption = None,
    benign: BenignOption = None,
    model: ViewedModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw neurons, z-scores, clusterings, norms of updates, families of attacks and trade-offs.

    Silhouette by k and cluster profiles need the model's activations: give the prompts with --harmful and --benign;
    for the reference model, `reference` stands for its own training prompts.
    """
    from nest_runtime.plots import draw, read_sources
    from nest_runtime.plots.style import require_matplotlib

    out = Output.of(ctx, as_json)
    chosen = list(dict.fromkeys(formats or FORMATS))
    for name in chosen:
        if name not in FORMATS:
            raise UsageError(
                f"--format {name}: expected png or svg", f"{did_you_mean(name, FORMATS)}leave it out for both"
            )
    if (harmful is None) != (benign is None):
        raise UsageError("--harmful and --benign go together", "give both, or neither")
    require_matplotlib()
    writable_folder(out_folder)
    found = read_sources(sources, model_hash=base_hash_of(model))
    scans: list[Scan] = []
    if harmful is not None and benign is not None:
        scans = _scans(
            out, found.views, prompts_named(harmful, "harmful"), prompts_named(benign, "benign"), model, device, dtype
        )
    drawn = draw(found, out_folder, kinds=kind or (), formats=chosen, scans=scans)
    document = {"files": [{"kind": item.kind, "path": str(item.path)} for item in drawn]}
    out.result(document, lambda: out.table(("PICTURE", "FILE"), [(item.kind, item.path) for item in drawn]))


def _scans(
    out: Output,
    views: tuple[NeuronView, ...],
    harmful: list[Example],
    benign: list[Example],
    model: str | None,
    device: str,
    dtype: str,
) -> list[Scan]:
    """The prompts run on the model that the views are of. Raises BaseMismatch for another model."""
    from nest_runtime.errors import BaseMismatch
    from nest_runtime.model.load import known_base, load_model
    from nest_runtime.plots.scan import scan

    if not views:
        raise UsageError("prompts were given, but no patch or sites file to look at", "name one")
    ref = model or known_base(views[0].base_hash) or views[0].base_model or "reference"
    loaded = load_model(ref, device=device, dtype=dtype)
    for view in views:
        if view.base_hash != loaded.hash:
            raise BaseMismatch(
                f"{view.title} is of model {view.base_hash}, {loaded.name} is {loaded.hash}",
                "name its model with --model",
            )
    with out.bars() as bars:
        return [scan(view, loaded.model, loaded.tokenizer, harmful, benign, progress=bars) for view in views]
