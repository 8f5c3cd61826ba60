"""Located sites as values, and the file that keeps them: ``sites.json`` of ``nest-runtime locate --out``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.io import MAX_RESULT, parse_json, read_text, write_json

FORMAT = 1


@dataclass(frozen=True)
class LocatedSite:
    """The neurons that locating kept in one projection, and their clusters. Empty is legal.

    Attributes:
        site: the projection's name.
        layer, kind, d_in, d_out: of the projection.
        neurons: kept rows, strictly increasing.
        z: each one's z-score of its probe weight (0 for random controls).
        clusters: each one's cluster, from 0; empty until clustered.
        silhouette: of the chosen clustering; None for one cluster or fewer than three neurons.
        probe_accuracy: on held-out prompts; None if none were held out.
        threshold: the z threshold they passed.
    """

    site: str
    layer: int
    kind: str
    d_in: int
    d_out: int
    neurons: tuple[int, ...]
    z: tuple[float, ...]
    clusters: tuple[int, ...] = ()
    silhouette: float | None = None
    probe_accuracy: float | None = None
    threshold: float = 0.0

    @property
    def n_clusters(self) -> int:
        """The number of clusters; 0 before clustering."""
        return max(self.clusters, default=-1) + 1

    def evolve(self, **changes: Any) -> LocatedSite:
        """A copy with other fields."""
        return replace(self, **changes)

    def summary(self) -> dict[str, Any]:
        """Counts and figures without the neurons, as ``locate --json`` prints them."""
        return {
            "site": self.site,
            "neurons": len(self.neurons),
            "clusters": self.n_clusters,
            "silhouette": self.silhouette,
            "probe_accuracy": self.probe_accuracy,
        }


@dataclass(frozen=True)
class SitesFile:
    """Everything locating found, and what it was made from.

    Attributes:
        sites: in the model's order.
        settings: the recipe as JSON.
        data: digests and counts of the prompts.
        base_hash, base_model: the model they were located in.
    """

    sites: tuple[LocatedSite, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    base_hash: str = ""
    base_model: str = ""

    def to_json(self) -> dict[str, Any]:
        """The file's content; ``sites`` is what ``locate --json`` prints, with the neurons besides."""
        sites = []
        for item in self.sites:
            lists = {"neuron_indices": list(item.neurons), "cluster_numbers": list(item.clusters), "z": list(item.z)}
            projection = {key: getattr(item, key) for key in ("layer", "kind", "d_in", "d_out", "threshold")}
            sites.append({**item.summary(), **projection, **lists})
        rest = {key: value for key, value in asdict(self).items() if key != "sites"}
        return {"format": FORMAT, **rest, "sites": sites}

    def save(self, path: str | Path) -> Path:
        """Write sites.json atomically."""
        write_json(Path(path), self.to_json())
        return Path(path)


def read_sites(path: str | Path) -> SitesFile:
    """Read sites.json.

    Raises:
        DataError: no such file, not JSON, another format, or a site that contradicts itself.
    """
    try:
        value = parse_json(read_text(path, MAX_RESULT))
    except FileNotFoundError:
        raise DataError(f"no such sites file: {path}", "make one with `nest-runtime locate`") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not a sites file: {error}", "make one with `nest-runtime locate`") from None
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r}; expected {FORMAT}", "make it anew with `nest-runtime locate`")
    try:
        sites = tuple(_site(item) for item in value["sites"])
        return SitesFile(sites, value["settings"], value["data"], value["base_hash"], value["base_model"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: broken sites file: {type(error).__name__}: {error}", "make it anew with `nest-runtime locate`"
        ) from None


def _site(item: Mapping[str, Any]) -> LocatedSite:
    keys = ("site", "layer", "kind", "d_in", "d_out", "silhouette", "probe_accuracy", "threshold")
    neurons, clusters, z = (_numbers(item, key) for key in ("neuron_indices", "cluster_numbers", "z"))
    if len(z) != len(neurons) or (clusters and len(clusters) != len(neurons)):
        raise ValueError(f"site {item['site']} has {len(neurons)} neurons, {len(clusters)} clusters, {len(z)} z-scores")
    return LocatedSite(neurons=neurons, clusters=clusters, z=z, **{key: item[key] for key in keys})


def _numbers(item: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    values: Sequence[Any] = item[key]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"site {item['site']}: {key} holds something else than numbers")
    return tuple(values)
