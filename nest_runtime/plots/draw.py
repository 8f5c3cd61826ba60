"""Which pictures there are, which of them some sources give, and drawing those into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import UsageError
from nest_runtime.plots import style
from nest_runtime.plots.sources import Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nest_runtime.plots.scan import Scan
    from nest_runtime.plots.view import NeuronView

KINDS = {
    "neurons": "where the neurons are (a patch or sites file)",
    "z": "histogram of z-scores (a patch or sites file)",
    "silhouette": "silhouette per layer (a patch or sites file)",
    "norms": "size of the update per layer (a patch)",
    "silhouette-by-k": "silhouette by number of clusters (a patch or sites file, and prompts)",
    "clusters": "what each cluster answers to (a patch or sites file, and prompts)",
    "families": "attack success per family (evaluations)",
    "tradeoff": "attack success against over-refusal and utility (evaluations, or a comparison)",
    "parameters": "attack success by trainable parameters (a comparison)",
}
_Painter = tuple[str, str, Callable[[], "Figure"]]  # kind, file name without suffix, what paints it


@dataclass(frozen=True)
class Drawn:
    """A picture that was written."""

    kind: str
    path: Path


def draw(
    sources: Sources,
    folder: Path,
    *,
    kinds: Sequence[str] = (),
    formats: Sequence[str] = style.FORMATS,
    scans: Sequence[Scan] = (),
) -> list[Drawn]:
    """Draw what the sources give.

    Args:
        sources: see ``read_sources``.
        folder: where the files go; made if missing.
        kinds: of KINDS; all that can be drawn by default.
        formats: ``png``, ``svg``. A comparison's pictures are PNG always.
        scans: of the views, by their titles, where the prompts were run.

    Raises:
        UsageError: a picture asked for cannot be made of these sources, or none can.
        NestError: matplotlib is not installed.
    """
    style.require_matplotlib()
    _check(kinds)
    there = [item for item in _painters(sources, {scan.title: scan for scan in scans}) if not kinds or item[0] in kinds]
    missing = [kind for kind in kinds if kind not in {item[0] for item in there}]
    compared = [kind for kind in missing if sources.comparisons and kind in ("tradeoff", "parameters", "families")]
    if set(missing) - set(compared) or not (there or sources.comparisons):
        wanted = next((kind for kind in missing if kind not in compared), "")
        need = f"{wanted}: {KINDS[wanted]}" if wanted else "a patch, a sites file, an evaluation or a comparison"
        raise UsageError(f"these sources do not give {wanted or 'any picture'}", f"needed: {need}")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for kind, name, paint in there:
        with style.styled():
            made = paint()
            drawn += [Drawn(kind, style.save(made, folder / f"{name}.{suffix}")) for suffix in formats]
    return drawn + _comparisons(sources, folder, kinds)


def _check(kinds: Sequence[str]) -> None:
    from nest_runtime.hints import closest

    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"there is no picture {kind!r}", f"closest: {', '.join(closest(kind, KINDS))}")


def _painters(sources: Sources, scans: dict[str, Scan]) -> Iterator[_Painter]:
    """What can be painted; files are named after the picture, and after the source if there are several."""
    for view in sources.views:
        yield from _view_painters(view, scans.get(view.title), _suffix(view, sources))
    from nest_runtime.plots import results, tradeoff

    harmful = [result for result in sources.results if results.has_harmful(result)]
    if harmful:
        yield "families", "families", lambda: results.families(harmful)
    both = [result for result in sources.results if results.has_tradeoff(result)]
    if both:
        yield "tradeoff", "tradeoff", lambda: tradeoff.tradeoff(results.tradeoff_points(both), joined=True)


def _view_painters(view: NeuronView, scan: Scan | None, suffix: str) -> Iterator[_Painter]:
    from nest_runtime.plots import neurons, profiles

    yield "neurons", f"neurons{suffix}", lambda: neurons.neuron_map(view)
    if any(site.z is not None and len(site.z) for site in view.sites):
        yield "z", f"z{suffix}", lambda: neurons.z_histograms(view, scan.z if scan else None)
    if any(site.silhouette is not None for site in view.sites):
        yield "silhouette", f"silhouette{suffix}", lambda: neurons.silhouettes(view)
    if any(site.norms is not None and len(site.norms) for site in view.sites):
        yield "norms", f"norms{suffix}", lambda: neurons.update_norms(view)
    if scan is not None:
        yield "silhouette-by-k", f"silhouette-by-k{suffix}", lambda: profiles.silhouette_by_k(scan)
        yield "clusters", f"clusters{suffix}", lambda: profiles.cluster_profiles(scan)


def _suffix(view: NeuronView, sources: Sources) -> str:
    return f"-{view.title.removesuffix('.json').replace('@', '-')}" if len(sources.views) > 1 else ""


def _comparisons(sources: Sources, folder: Path, kinds: Sequence[str]) -> list[Drawn]:
    """A comparison's pictures, by comparison.py; each in a folder of its own if there are several."""
    from nest_runtime.plots import comparison

    drawn = []
    for number, value in enumerate(sources.comparisons, start=1):
        place = folder / f"comparison-{number}" if len(sources.comparisons) > 1 or sources.results else folder
        for path in comparison.draw(value, place):
            if kinds and path.stem not in kinds:
                path.unlink()
            else:
                drawn.append(Drawn(path.stem, path))
    return drawn
