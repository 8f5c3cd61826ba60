"""The demo's drawings of a patch: its neurons, their activations and statistics, with words on every mark.

Marks differ by shape as well as by color; activations go from blue through the page's ground to orange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nest_runtime.demo.html import charts
from nest_runtime.demo.html.glossary import term
from nest_runtime.demo.html.markup import scroll, text

if TYPE_CHECKING:
    from nest_runtime.demo.probe import Activations
    from nest_runtime.plots.view import NeuronView, SiteView

MAX_MARKS = 6000  # beyond these the page gets slow: those with the largest updates are drawn
ROW = 34.0  # height of a layer's lane, pixels
CELL = 18.0
BINS = 36


def neuron_maps(view: NeuronView) -> str:
    """Where a patch acts: a drawing for each kind of projection, layers down, neurons across."""
    norms = np.concatenate([np.zeros(1), *(site.norms for site in view.sites if site.norms is not None)])
    least = float(np.sort(norms)[-MAX_MARKS]) if len(norms) > MAX_MARKS else -1.0
    largest = max(float(norms.max()), 1e-12)
    figures = "".join(_map(view, kind, least, largest) for kind in view.kinds)
    clusters = max((site.n_clusters for site in view.sites), default=0)
    keys = charts.key([f"cluster {number}" for number in range(min(clusters, charts.SERIES))])
    return f'<div class="nr-told"><div class="nr-maps">{figures}</div>{keys}{charts.TELL}</div>'


def _map(view: NeuronView, kind: str, least: float, largest: float) -> str:
    sites = view.of(kind)
    total = sum(len(site.neurons) for site in sites)
    there = [site.layer for site in sites if len(site.neurons)]
    span = f" in layers {min(there)} to {max(there)}" if there else ""
    about = f": {total:,} patched neurons{span}"
    widest = max(site.d_out for site in sites)
    lanes = "".join(_lane(site, least, largest) for site in sites if _near(site.layer, there))
    ends = f'<div class="nr-ends"><span>neuron 0</span><span>{widest - 1:,}</span></div>'
    lines = f'<div class="nr-lane"><span>layer</span></div>{lanes}<div class="nr-lane"><span></span>{ends}</div>'
    return (
        f"<figure><figcaption>{term(f'{kind}_proj')}{text(about)}</figcaption>"
        f'<div role="img" aria-label="{text(kind + "_proj" + about)}">{lines}</div></figure>'
    )


def _near(layer: int, there: list[int]) -> bool:
    """Whether a layer is drawn: those with patched neurons, and two on either side; all if there is none."""
    return not there or min(there) - 2 <= layer <= max(there) + 2


def _lane(site: SiteView, least: float, largest: float) -> str:
    rows = np.linspace(9, ROW - 9, site.n_clusters) if site.n_clusters > 1 else [ROW / 2]
    marks = []
    for index, neuron in enumerate(site.neurons):
        norm = None if site.norms is None else float(site.norms[index])
        if norm is not None and norm < least:
            continue
        cluster = int(site.clusters[index])
        along = 1 + 98 * float(neuron) / max(site.d_out - 1, 1)
        size = 2.2 + 2.4 * ((norm or 0.0) / largest) ** 0.5
        said = f"<title>{text(describe(site, index))}</title>"
        marks.append(
            f'<svg x="{along:.2f}%" y="{float(rows[cluster]):.1f}" overflow="visible" data-neuron="" data-says="">'
            f"{said}{charts.mark(cluster, size)}</svg>"
        )
    return (
        f'<div class="nr-lane"><span>{site.layer}</span><svg width="100%" height="{ROW:.0f}">'
        f'<rect class="nr-site" y="3" width="100%" height="{ROW - 6:.0f}" rx="3"/>{"".join(marks)}</svg></div>'
    )


def describe(site: SiteView, index: int) -> str:
    """One neuron in words: projection, z, cluster, loading, norm of its row's update."""
    parts = [f"layer {site.layer}, {site.kind}_proj, neuron {int(site.neurons[index])}"]
    parts.append("z –" if site.z is None else f"z {site.z[index]:+.2f}")
    parts.append(f"cluster {int(site.clusters[index])}")
    parts.append("loading 1 (tied)" if site.loadings is None else f"loading {site.loadings[index]:.3f}")
    parts.append("row-update norm –" if site.norms is None else f"row-update norm {site.norms[index]:.4f}")
    return "\n".join(parts)


def activations(found: Activations) -> str:
    """Three heat maps over the tokens of a prompt: base, patched, and what the patch changed."""
    reach = float(max(np.abs(found.base).max(), np.abs(found.patched).max(), 1e-9))
    change = found.patched - found.base
    largest = float(max(np.abs(change).max(), 1e-9))
    what = "mean output of a cluster's neurons" if found.mean else "output of a neuron"
    panels = [
        _heat("Base", found.base, reach, found),
        _heat(f"Patched with {found.label}", found.patched, reach, found),
        _heat("Change by the patch", change, largest, found),
    ]
    scales = scale(reach, f"Base and patched: {what}, before the activation function. It has no unit.")
    scales += scale(largest, "Change: patched minus base. It has a scale of its own.")
    return f'{scales}<div class="nr-heats nr-told">{"".join(panels)}{charts.TELL}</div>'


def scale(reach: float, what: str) -> str:
    """A scale of colors from -reach to +reach, and what it measures."""
    stops = ", ".join(_color(share / 5) for share in range(-5, 6))
    return (
        f'<div class="nr-scale"><span>{-reach:+.2f}</span><i style="background:linear-gradient(to right, {stops})"></i>'
        f"<span>{reach:+.2f}</span><span>{text(what)}</span></div>"
    )


def _heat(heading: str, values: np.ndarray, reach: float, found: Activations) -> str:
    """One map [rows, tokens], the tokens written below it; they scroll by themselves, beginning at the prompt's own."""
    rows, columns = values.shape
    width = CELL * columns
    height = CELL * rows + 16.0 + 8.0 * max(map(len, found.tokens))
    labels = 8.0 + 7.4 * max(map(len, found.rows))
    names = "".join(
        f'<text x="{labels - 6:.0f}" y="{(number + 1) * CELL - 5:.1f}" text-anchor="end">{text(name)}</text>'
        for number, name in enumerate(found.rows)
    )
    marks = [_heat_row(number, values[number], reach, found) for number in range(rows)]
    for column, token in enumerate(found.tokens):
        x, y = column * CELL + CELL / 2, CELL * rows + 8
        own = "" if column >= found.first else ' class="nr-template"'
        place = f'transform="translate({x:.0f},{y:.0f}) rotate(90)" dominant-baseline="middle"'
        marks.append(f"<text {place}{own}>{text(token)}</text>")
    cells = (
        f'<svg width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{text(heading)}: {rows} rows by {columns} tokens">{"".join(marks)}</svg>'
    )
    part = scroll(cells, text(heading), f' data-from="{found.first * CELL:.0f}"')
    return (
        f'<div class="nr-heat"><h3>{text(heading)}</h3><div class="nr-strip">'
        f'<svg width="{labels:.0f}" height="{height:.0f}" aria-hidden="true">{names}</svg>{part}</div></div>'
    )


def _heat_row(number: int, values: np.ndarray, reach: float, found: Activations) -> str:
    name, y, edge = found.rows[number], number * CELL, CELL - 1
    marks = []
    for column, value in enumerate(values.tolist()):
        said = f"{name}, token {column + 1} “{found.tokens[column]}”: {value:+.3f}"
        place = f'x="{column * CELL:.0f}" y="{y:.0f}" width="{edge:.0f}" height="{edge:.0f}"'
        color = f'style="fill:{_color(value / reach)}"'
        marks.append(f'<rect {place} {color} data-says=""><title>{text(said)}</title></rect>')
    return "".join(marks)


def _color(share: float) -> str:
    """From the style sheet's color below zero over the middle one to that above; small values show by a square root."""
    amount = 100 * min(abs(share), 1.0) ** 0.5
    return f"color-mix(in srgb,var(--nr-{'above' if share > 0 else 'below'}) {amount:.0f}%,var(--nr-middle))"


def statistics(view: NeuronView) -> str:
    """How well the clusters of each layer are set apart, and how far from the middle the neurons' z-scores lie."""
    made = []
    if any(site.silhouette is not None for site in view.sites):
        made.append(_silhouettes(view))
    if any(site.z is not None and len(site.z) for site in view.sites):
        made.append(_z_scores(view))
    if not made:
        return '<p class="nr-note">The patch keeps no statistics of its training.</p>'
    return f'{charts.key([f"{kind}_proj" for kind in view.kinds])}<div class="nr-maps">{"".join(made)}</div>'


def _silhouettes(view: NeuronView) -> str:
    sites = [site for site in view.sites if site.silhouette is not None]
    layers = sorted({site.layer for site in sites})
    width = 0.8 / len(view.kinds)
    bars = []
    for site in sites:
        value, number = float(site.silhouette or 0.0), view.kinds.index(site.kind)
        left = site.layer - 0.4 + number * width
        said = f"layer {site.layer}, {site.kind}_proj: silhouette {value:.3f}, {site.n_clusters} clusters"
        bars.append([(left, left + width, max(value, 0.0), number, said)])
    step = max(1, len(layers) // 8)
    ticks = tuple((float(layer), str(layer)) for layer in layers[::step])
    x = charts.Axis("layer", layers[0] - 0.6, layers[-1] + 0.6, ticks)
    top = max(float(site.silhouette or 0.0) for site in sites)
    y = charts.linear("silhouette (1 is far apart)", 0.0, max(top, 0.01))
    return charts.columns("How well the clusters are set apart", bars, x, y)


def _z_scores(view: NeuronView) -> str:
    kept = {kind: [site.z for site in view.of(kind) if site.z is not None] for kind in view.kinds}
    values = {kind: np.concatenate(parts) for kind, parts in kept.items() if parts}
    least = min(float(z.min()) for z in values.values() if len(z))
    most = max(float(z.max()) for z in values.values() if len(z))
    edges = np.linspace(min(least, 0.0), max(most, 0.0), BINS + 1)
    counts = {kind: np.histogram(z, bins=edges)[0] for kind, z in values.items()}
    bars = []
    for number in range(BINS):
        left, right = float(edges[number]), float(edges[number + 1])
        said = f"z-score from {left:+.2f} to {right:+.2f}"
        bars.append(
            [
                (left, right, float(found[number]), view.kinds.index(kind), f"{said}: {found[number]} of {kind}_proj")
                for kind, found in counts.items()
                if found[number]
            ]
        )
    top = max(sum(int(found[number]) for found in counts.values()) for number in range(BINS))
    x = charts.linear("z-score of the probe's weight (standard deviations)", min(least, 0.0), max(most, 0.0))
    return charts.columns("The patched neurons' z-scores", bars, x, charts.linear("neurons", 0, top))


def neuron_tables(view: NeuronView, per_site: int = 40) -> str:
    """The same neurons as tables, for those who cannot hover: the largest updates of each projection."""
    from nest_runtime.demo.html.markup import table

    parts = []
    for site in view.sites:
        if not len(site.neurons):
            continue
        order: Sequence[int] = range(len(site.neurons)) if site.norms is None else np.argsort(-site.norms).tolist()
        rows = []
        for index in list(order)[:per_site]:
            cells = [site.neurons[index], site.clusters[index]]
            figures = [None if v is None else v[index] for v in (site.z, site.loadings, site.norms)]
            rows.append([str(int(cell)) for cell in cells] + ["–" if v is None else f"{v:.3f}" for v in figures])
        columns = ("neuron", "cluster", "z", "loading", "row-update norm")
        shown = f", the {per_site} largest updates" if len(site.neurons) > per_site else ""
        head = f"layer {site.layer}, {site.kind}_proj: {len(site.neurons)} of {site.d_out} neurons{shown}"
        parts.append(f"<details><summary>{text(head)}</summary>{table(columns, rows, numbers=columns)}</details>")
    return "".join(parts)
