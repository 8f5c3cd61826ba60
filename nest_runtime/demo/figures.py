"""The demo's drawings: neurons and activations as SVG with words on every mark, statistics by matplotlib.

Marks differ by shape as well as by color; activations go from blue through white to orange.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nest_runtime.demo.markup import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nest_runtime.demo.probe import Activations
    from nest_runtime.plots.view import SiteView, View

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")  # Okabe and Ito's
MAX_MARKS = 6000  # beyond these the page gets slow: those with the largest updates are drawn
WIDTH, LEFT, ROW = 520.0, 34.0, 34.0
CELL, LABELS = 16.0, 122.0
_BLUE, _WHITE, _ORANGE = (0, 114, 178), (247, 247, 247), (213, 94, 0)


def neuron_maps(view: View) -> str:
    """Where a patch acts: a drawing for each kind of projection, layers down, neurons across."""
    norms = np.concatenate([np.zeros(1), *(site.norms for site in view.sites if site.norms is not None)])
    floor = float(np.sort(norms)[-MAX_MARKS]) if len(norms) > MAX_MARKS else -1.0
    largest = max(float(norms.max()), 1e-12)
    figures = "".join(_map(view, kind, floor, largest) for kind in view.kinds)
    clusters = min(max((site.n_clusters for site in view.sites), default=0), len(COLORS))
    keys = "".join(
        f'<span><svg width="14" height="14" aria-hidden="true">{_mark(number, 7, 7, 5)}</svg> cluster {number}</span>'
        for number in range(clusters)
    )
    return f'<div class="nr-maps">{figures}</div><div class="nr-key">{keys}</div>'


def _map(view: View, kind: str, floor: float, largest: float) -> str:
    sites = view.of(kind)
    height = ROW * len(sites) + 26
    marks, total = [], sum(len(site.neurons) for site in sites)
    for row, site in enumerate(sites):
        top = row * ROW
        marks.append(
            f'<rect class="nr-site" x="{LEFT}" y="{top + 3}" width="{WIDTH - LEFT}" height="{ROW - 6}" rx="3"/>'
            f'<text x="{LEFT - 6}" y="{top + ROW / 2 + 4}" text-anchor="end" font-size="12">{site.layer}</text>'
        )
        marks += _site_marks(site, top, floor, largest)
    widths = max(site.d_out for site in sites)
    axis = (
        f'<text x="{LEFT}" y="{height - 6}" font-size="12">neuron 0</text>'
        f'<text x="{WIDTH}" y="{height - 6}" font-size="12" text-anchor="end">{widths - 1:,}</text>'
    )
    there = [site.layer for site in sites if len(site.neurons)]
    span = f" in layers {min(there)} to {max(there)}" if there else ""
    words = f"{kind}_proj: {total:,} patched neurons{span}"
    return (
        f"<figure><figcaption>{text(words)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH + 4:.0f} {height:.0f}" width="100%" role="img" aria-label="{text(words)}">'
        f"{''.join(marks)}{axis}</svg></figure>"
    )


def _site_marks(site: SiteView, top: float, floor: float, largest: float) -> list[str]:
    lanes = np.linspace(9, ROW - 9, site.n_clusters) if site.n_clusters > 1 else [ROW / 2]
    span = WIDTH - LEFT - 8
    found = []
    for index, neuron in enumerate(site.neurons):
        norm = None if site.norms is None else float(site.norms[index])
        if norm is not None and norm < floor:
            continue
        cluster = int(site.clusters[index])
        x = LEFT + 4 + span * float(neuron) / max(site.d_out - 1, 1)
        size = 2.2 + 2.4 * ((norm or 0.0) / largest) ** 0.5
        found.append(_mark(cluster, x, top + float(lanes[cluster]), size, describe(site, index)))
    return found


def describe(site: SiteView, index: int) -> str:
    """One neuron in words: place, z, cluster, loading, norm of its row's update."""
    parts = [f"layer {site.layer}, {site.kind}_proj, neuron {int(site.neurons[index])}"]
    parts.append("z –" if site.z is None else f"z {site.z[index]:+.2f}")
    parts.append(f"cluster {int(site.clusters[index])}")
    parts.append("loading 1 (tied)" if site.loadings is None else f"loading {site.loadings[index]:.3f}")
    parts.append("row-update norm –" if site.norms is None else f"row-update norm {site.norms[index]:.4f}")
    return "\n".join(parts)


def _mark(cluster: int, x: float, y: float, size: float, words: str = "") -> str:
    """A neuron: a shape and a color for its cluster."""
    color = COLORS[cluster % len(COLORS)]
    inner = f"<title>{text(words)}</title>" if words else ""
    look = f'fill="{color}" fill-opacity="0.85"' + (' data-neuron=""' if words else "")
    shape = cluster % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" {look}>{inner}</circle>'
    if shape == 1:
        edge = 1.8 * size
        place = f'x="{x - edge / 2:.1f}" y="{y - edge / 2:.1f}" width="{edge:.1f}" height="{edge:.1f}"'
        return f"<rect {place} {look}>{inner}</rect>"
    points = [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)] if shape == 2 else [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
    path = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in points)
    return f'<polygon points="{path}" {look}>{inner}</polygon>'


def activations(found: Activations) -> str:
    """Three heat maps over the tokens of a prompt: base, patched, and what the patch changed."""
    reach = float(max(np.abs(found.base).max(), np.abs(found.patched).max(), 1e-9))
    change = found.patched - found.base
    largest = float(max(np.abs(change).max(), 1e-9))
    panels = [
        _heat("Base", found.base, reach, found),
        _heat(f"Patched with {found.label}", found.patched, reach, found),
        _heat("Change by the patch", change, largest, found),
    ]
    scale = f"Blue is negative, orange positive; full color is ±{reach:.2f}, in the change ±{largest:.2f}."
    return f'<p class="nr-note">{text(scale)}</p><div class="nr-heats">{"".join(panels)}</div>'


def _heat(heading: str, values: np.ndarray, reach: float, found: Activations) -> str:
    """One map [rows, tokens], the tokens written below it; it scrolls by itself where the screen is narrow."""
    rows, columns = values.shape
    width, height = LABELS + CELL * columns + 48, CELL * rows + 78.0
    marks = [_heat_row(number, values[number], reach, found) for number in range(rows)]
    for column in range(columns):
        x, y = LABELS + column * CELL + CELL / 2, CELL * rows + 8
        marks.append(
            f'<text transform="translate({x:.0f},{y:.0f}) rotate(55)" font-size="11" dominant-baseline="middle">'
            f"{text(found.tokens[column])}</text>"
        )
    return (
        f'<div class="nr-scroll" tabindex="0" role="region" aria-label="{text(heading)}"><h3>{text(heading)}</h3>'
        f'<svg width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{text(heading)}: {rows} rows by {columns} tokens">{"".join(marks)}</svg></div>'
    )


def _heat_row(number: int, values: np.ndarray, reach: float, found: Activations) -> str:
    name, y, edge = found.rows[number], number * CELL, CELL - 1
    marks = [f'<text x="{LABELS - 6}" y="{y + CELL - 4.5}" text-anchor="end" font-size="11">{text(name)}</text>']
    for column, value in enumerate(values.tolist()):
        words = f"{name}, token {column + 1} “{found.tokens[column]}”: {value:+.3f}"
        place = f'x="{LABELS + column * CELL:.0f}" y="{y:.0f}" width="{edge:.0f}" height="{edge:.0f}"'
        marks.append(f'<rect {place} fill="{_color(value / reach)}"><title>{text(words)}</title></rect>')
    return "".join(marks)


def _color(share: float) -> str:
    end, amount = (_ORANGE if share > 0 else _BLUE), min(abs(share), 1.0) ** 0.5
    return "#" + "".join(f"{round(a + (b - a) * amount):02x}" for a, b in zip(_WHITE, end, strict=True))


def statistics(view: View) -> str:
    """Silhouettes and z-scores of a patch, by plots/; says so where matplotlib is not installed."""
    from nest_runtime.errors import NestError
    from nest_runtime.plots import neurons, style

    made: list[tuple[str, Figure]] = []
    try:
        style.require_matplotlib()
    except NestError as error:
        return f'<p class="nr-note">{text(error.message)}: {text(error.hint)}</p>'
    with style.styled():
        if any(site.silhouette is not None for site in view.sites):
            made.append(("Silhouette of the chosen clustering, by layer", neurons.silhouettes(view)))
        if any(site.z is not None and len(site.z) for site in view.sites):
            made.append(("Histogram of the z-scores of the patched neurons", neurons.z_histograms(view)))
        images = "".join(f"<figure>{picture(_png(figure), words)}</figure>" for words, figure in made)
    return f'<div class="nr-maps">{images}</div>'


def picture(data: bytes, words: str) -> str:
    """A PNG within the page."""
    return f'<img alt="{text(words)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _png(figure: Figure) -> bytes:
    from nest_runtime.plots import style

    with tempfile.TemporaryDirectory() as folder:
        return style.save(figure, Path(folder) / "figure.png").read_bytes()


def neuron_tables(view: View, per_site: int = 40) -> str:
    """The same neurons as tables, for those who cannot hover: the largest updates of each projection."""
    from nest_runtime.demo.markup import table

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
