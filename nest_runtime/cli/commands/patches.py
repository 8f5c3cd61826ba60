"""Commands that look at one or two patches, and at a model: inspect, diff, hash. They change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import base_hash_of, examples
from nest_runtime.cli.output import JsonOption, Output, percent, size
from nest_runtime.escape import short
from nest_runtime.measures import stated_rate

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

PatchArgument = typer.Argument(
    metavar="PATCH", autocompletion=complete.patches, help="v3, name@v3, a file, sha256:HEX, or hf://org/repo@v3."
)
WhoseModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=complete.models,
        help="The model whose v3 is meant, where several models have one.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the looking commands to the app."""
    panel = "Look"
    app.command(
        "inspect",
        rich_help_panel=panel,
        epilog=examples("nest-runtime inspect v3", "nest-runtime inspect p.safetensors --json"),
    )(inspect)
    app.command("diff", rich_help_panel=panel, epilog=examples("nest-runtime diff v2 v3"))(diff)
    app.command(
        "hash",
        rich_help_panel=panel,
        epilog=examples("nest-runtime hash reference", "nest-runtime hash ./my-model --json"),
    )(hash_model)


def inspect(
    ctx: typer.Context, patch: Annotated[str, PatchArgument], model: WhoseModel = None, as_json: JsonOption = False
) -> None:
    """Show what a patch holds: its base, lineage, figures, and the neurons of each site."""
    from nest_runtime.resolve import load_patch

    out = Output.of(ctx, as_json)
    loaded = load_patch(patch, model_hash=base_hash_of(model))
    document = describe(loaded)
    out.result(document, lambda: _render_patch(out, document))


def diff(
    ctx: typer.Context,
    old: Annotated[str, PatchArgument],
    new: Annotated[str, PatchArgument],
    model: WhoseModel = None,
    as_json: JsonOption = False,
) -> None:
    """Show what changed from one patch to another: header fields, and neurons and updates of each site."""
    from nest_runtime.patch.algebra import diff as compare
    from nest_runtime.resolve import load_patch

    out, model_hash = Output.of(ctx, as_json), base_hash_of(model)
    changes = compare(load_patch(old, model_hash=model_hash), load_patch(new, model_hash=model_hash))
    out.result(changes, lambda: _render_diff(out, changes))


def hash_model(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", autocompletion=complete.models, help="reference, a folder, FILE.gguf, or org/name."
        ),
    ] = "reference",
    as_json: JsonOption = False,
) -> None:
    """Print the hash that names a model: the same however its checkpoint is sharded."""
    from nest_runtime.model.fingerprint import hash_report
    from nest_runtime.model.load import resolve_model

    out = Output.of(ctx, as_json)
    with out.bars() as bars:
        report = hash_report(resolve_model(model)[1], progress=bars)

    def render() -> None:
        out.line(report["hash"])
        how = "known already" if report["cached"] else f"{report['seconds']:.2f} s"
        out.note(f"{report['tensors']} tensors, {size(report['bytes'])}, {how}")

    out.result(report, render)


def describe(patch: Patch) -> dict[str, Any]:
    """A patch as the JSON of ``inspect``."""
    from nest_runtime.patch.values import TORCH_NAMES
    from nest_runtime.patch.write import to_bytes

    header = patch.header()
    sites = [
        {
            "site": site.name,
            "d_out": site.d_out,
            "d_in": site.d_in,
            "neurons": site.n_neurons,
            "clusters": site.n_clusters,
            "parameters": site.parameters,
            "dtype": TORCH_NAMES[site.deltas.dtype_name],
            "loadings": site.loadings is not None,
            "stats": stats["stats"],
        }
        for site, stats in zip(patch.sites, header["sites"], strict=True)
    ]
    return {
        **header,
        "digest": patch.digest,
        "sites": sites,
        "neurons": patch.neurons,
        "clusters": patch.clusters,
        "parameters": patch.parameters,
        "bytes": len(to_bytes(patch)),
    }


def _render_patch(out: Output, document: dict[str, Any]) -> None:
    from nest_runtime.patch.claims import Claims

    counts = f"{document['parameters']:,} parameters, {document['neurons']:,} neurons"
    out.pairs(
        {
            "patch": f"{document['name']}@{document['version']}  (serial {document['serial']})",
            "digest": document["digest"],
            "base": document["base_model"] or document["architecture"],
            "  hash": document["base_hash"],
            "parent": document["parent"],
            "created": document["created"],
            "size": f"{counts}, {size(document['bytes'])}",
        }
    )
    if "claims" in document:
        out.line()
        claims = Claims.parse(document["claims"])
        out.line(
            f"claims, measured {claims.date[:10]}, judged by {claims.judge}; `verify --claims` measures them again"
        )
        rows = [(row.suite, row.measure, row.bound, percent(row.value), row.n) for row in claims.rows]
        out.table(("SUITE", "MEASURE", "LIMIT", "MEASURED", "N"), rows, right=("MEASURED", "N"))
    if document["metrics"]:
        out.line()
        out.pairs(_flat(document["metrics"]))
    out.line()
    rows = [
        (s["site"], f"{s['neurons']} / {s['d_out']}", s["clusters"], s["parameters"], s["stats"].get("silhouette"))
        for s in document["sites"]
    ]
    right = ("NEURONS", "CLUSTERS", "PARAMETERS", "SILHOUETTE")
    out.table(("SITE", *right), rows, right=right)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as one level, ``validation.after.asr``; a rate with its interval and count is one of them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict):
            rate = _rate(value)
            flat |= {name: rate} if rate else _flat(value, f"{name}.")
        else:
            flat[name] = f"[{', '.join(map(_figure, value))}]" if isinstance(value, list) else value
    return flat


def _rate(value: dict[str, Any]) -> str | None:
    """``5.2 % [4.1, 6.6], n = 1,300`` of the figures that an evaluation writes; None for anything else."""
    rate = stated_rate(value)
    if rate is None:
        return None
    low, high = (f"{100 * end:.1f}" for end in rate.ci95)
    return f"{percent(rate.value)} [{low}, {high}], n = {rate.n:,}"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _render_diff(out: Output, changes: dict[str, Any]) -> None:
    out.line(f"{short(changes['old'])} -> {short(changes['new'])}{'  (its child)' if changes['is_child'] else ''}")
    if not changes["same_base"]:
        out.line("for different base models")
    simple = {
        key: f"{_brief(value['old'])} -> {_brief(value['new'])}"
        for key, value in changes["header"].items()
        if not isinstance(value["old"], dict | list)
    }
    if simple:
        out.pairs(simple)
    nested = [key for key in changes["header"] if key not in simple]
    if nested:
        out.line(f"also changed: {', '.join(nested)} (all values with --json)")
    if not changes["sites"]:
        out.line("no site differs")
        return
    out.line()
    rows = [
        (
            row["site"],
            f"+{row['added']} -{row['removed']} ={row['kept']}",
            f"{row['clusters']['old']} -> {row['clusters']['new']}",
            row.get("change_norm"),
            row.get("cosine"),
        )
        for row in changes["sites"]
    ]
    out.table(("SITE", "NEURONS", "CLUSTERS", "CHANGE", "COSINE"), rows, right=("CHANGE", "COSINE"))


def _brief(value: Any) -> str:
    text = "-" if value in (None, "") else str(value)
    return short(text) if text.startswith("sha256:") else text
