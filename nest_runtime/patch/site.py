"""A projection that a patch changes, with its neurons and their update: an immutable, validated value.

See patch.py for the whole patch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import PatchFormatError
from nest_runtime.patch.values import FrozenTensor, freeze_json, thaw_json

if TYPE_CHECKING:
    import torch

DELTA_DTYPES = ("F32", "BF16", "F16")
PARTS = {
    "deltas": None,  # any of DELTA_DTYPES
    "neurons": "I32",
    "clusters": "I32",
    "loadings": "F32",
    "z": "F32",
}
REQUIRED_PARTS = ("deltas", "neurons", "clusters")
MAX_SIZE = 2**31 - 1  # of any dimension: neurons are int32

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,255}")


@dataclass(frozen=True)
class Site:
    """A projection that a patch changes: its neurons, and what is added to their rows.

    Attributes:
        name: the projection's name (``anatomy.Projection.name``).
        d_out: rows of the projection's weight W [d_out, d_in].
        deltas: D [K, d_in], float32, bfloat16 or float16.
        neurons: [n] int32, strictly increasing, each in [0, d_out).
        clusters: [n] int32, each in [0, K).
        loadings: [n] float32 or None (all ones: the paper's tied rows).
        z: [n] float32 or None: the probe's z-score of each neuron, for reading only.
        stats: what training recorded of the site (JSON scalars): silhouette, probe_accuracy, …

    Tensors may be given as torch tensors; they are frozen. Raises PatchFormatError if a rule is broken.
    """

    name: str
    d_out: int
    deltas: FrozenTensor
    neurons: FrozenTensor
    clusters: FrozenTensor
    loadings: FrozenTensor | None = None
    z: FrozenTensor | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in PARTS:
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, FrozenTensor.of(value))
        object.__setattr__(self, "stats", freeze_json(self.stats, f"stats of site {self.name}"))
        _check_site(self)

    @property
    def d_in(self) -> int:
        """The width of the projection's input: the columns of ``deltas``."""
        return self.deltas.shape[1]

    @property
    def n_clusters(self) -> int:
        """The number of clusters K: the rows of ``deltas``."""
        return self.deltas.shape[0]

    @property
    def n_neurons(self) -> int:
        """The number of patched neurons n."""
        return self.neurons.shape[0]

    @property
    def parameters(self) -> int:
        """Trained numbers: K·d_in, and n more if there are loadings."""
        return self.n_clusters * self.d_in + (self.n_neurons if self.loadings is not None else 0)

    @property
    def tensors(self) -> dict[str, FrozenTensor]:
        """Frozen tensors by file key (``<site>.<part>``), shapes and dtypes as in ``Site``; absent parts left out."""
        parts = {key: getattr(self, key) for key in PARTS}
        return {f"{self.name}.{key}": value for key, value in parts.items() if value is not None}

    def row_deltas(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The update of each patched row: [n, d_in] in ``dtype`` (float32 by default), on the CPU."""
        import torch

        dtype = dtype or torch.float32
        rows = self.deltas.tensor().to(dtype)[self.clusters.tensor().long()]  # (n, d_in)
        if self.loadings is not None:
            rows = rows * self.loadings.tensor().to(dtype)[:, None]
        return rows

    def membership(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """M [d_out, K] in ``dtype`` (float32 by default) with ΔW = M·D: 0 and 1, or the loadings."""
        import torch

        dtype = dtype or torch.float32
        matrix = torch.zeros(self.d_out, self.n_clusters, dtype=dtype)
        values = torch.ones(self.n_neurons) if self.loadings is None else self.loadings.tensor()
        matrix[self.neurons.tensor().long(), self.clusters.tensor().long()] = values.to(dtype)
        return matrix

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """ΔW [d_out, d_in] in ``dtype`` (float32 by default), for checks and exports of small models."""
        import torch

        dtype = dtype or torch.float32
        full = torch.zeros(self.d_out, self.d_in, dtype=dtype)
        full[self.neurons.tensor().long()] = self.row_deltas(dtype)
        return full

    def __hash__(self) -> int:
        return hash((self.name, self.d_out, self.deltas, self.neurons, self.clusters))

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        parts = tuple(getattr(self, key) for key in PARTS)
        return Site, (self.name, self.d_out, *parts, thaw_json(self.stats))


def check_parts(where: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Check the dtypes and ranks of a site's parts, before any content is read.

    Args:
        where: how messages name the site.
        shapes: part → dtype name (F32, …) and shape.

    Raises:
        PatchFormatError: one is not what docs/reference/patch-format.md says.
    """
    deltas_dtype, deltas_shape = shapes["deltas"]
    if deltas_dtype not in DELTA_DTYPES or len(deltas_shape) != 2:
        raise PatchFormatError(
            f"{where}: deltas are {deltas_dtype} {list(deltas_shape)}; expected F32, BF16 or F16 [clusters, d_in]",
            "re-export the patch",
        )
    n = shapes["neurons"][1][0] if len(shapes["neurons"][1]) == 1 else -1
    for key, (dtype, shape) in shapes.items():
        wanted = PARTS[key]
        if wanted is not None and (dtype != wanted or shape != (n,)):
            expected = f"{wanted} [{n if n >= 0 else 'neurons'}]"
            raise PatchFormatError(
                f"{where}: {key} is {dtype} {list(shape)}; expected {expected}", "re-export the patch"
            )
        if any(size > MAX_SIZE for size in shape):
            raise PatchFormatError(f"{where}: {key} is {list(shape)}; sizes end at 2^31 - 1", "re-export the patch")


def _check_site(site: Site) -> None:
    where = f"site {site.name}"
    if not isinstance(site.name, str) or not _NAME.fullmatch(site.name):
        raise PatchFormatError(
            f"site name {site.name!r:.80} is not a module path of letters, digits, '_', '.', ':' and '-'",
            "name sites as `find_projections` does",
        )
    if type(site.d_out) is not int or not 0 < site.d_out <= MAX_SIZE:
        raise PatchFormatError(f"{where}: d_out is {site.d_out!r:.80}; expected 1 to 2^31 - 1", "re-export the patch")
    tensors = {key: getattr(site, key) for key in PARTS if getattr(site, key) is not None}
    check_parts(where, {key: (tensor.dtype_name, tensor.shape) for key, tensor in tensors.items()})
    for key in ("deltas", "loadings", "z"):
        if key in tensors and not tensors[key].is_finite():
            raise PatchFormatError(f"{where}: {key} holds NaN or infinity", "train again; a finite patch is expected")
    _check_indices(site, where)


def _check_indices(site: Site, where: str) -> None:
    neurons, clusters = site.neurons.integers(), site.clusters.integers()
    if not len(neurons):
        if site.n_clusters:
            raise PatchFormatError(f"{where}: {site.n_clusters} clusters but no neurons", "drop the clusters")
        return
    if int(neurons.min()) < 0 or int(neurons.max()) >= site.d_out:
        bad = int(neurons.min()) if int(neurons.min()) < 0 else int(neurons.max())
        raise PatchFormatError(f"{where}: neuron {bad} is out of range [0, {site.d_out})", "re-export the patch")
    steps = neurons[1:] - neurons[:-1]
    if bool((steps == 0).any()):
        raise PatchFormatError(
            f"{where}: neuron {int(neurons[1:][steps == 0][0])} is listed twice", "list each neuron once"
        )
    if bool((steps < 0).any()):
        raise PatchFormatError(f"{where}: neurons are not sorted", "list neurons in increasing order")
    if int(clusters.min()) < 0 or int(clusters.max()) >= site.n_clusters:
        bad = int(clusters.min()) if int(clusters.min()) < 0 else int(clusters.max())
        raise PatchFormatError(
            f"{where}: cluster number {bad} is out of range [0, {site.n_clusters})", "re-export the patch"
        )
