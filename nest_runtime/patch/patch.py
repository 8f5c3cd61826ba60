"""A safety patch as an immutable value.

A :class:`Patch` is a header and a tuple of :class:`Site`. A site holds, for one projection,
the K trained cluster rows D [K, d_in], the n patched neurons (row indices of W [d_out, d_in]),
each neuron's cluster, and optionally one loading per neuron. Its update is

    ΔW[neurons[i], :] = loadings[i] · D[clusters[i], :]        (loadings are 1 where absent)

which is NeST's cluster-shared update (arXiv 2602.16835) and exactly a rank-K LoRA.

Nothing here reads or writes files (file.py, write.py), computes with rows (algebra.py) or touches a model (runtime/).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import PatchFormatError, SiteMismatch, UsageError
from nest_runtime.escape import short
from nest_runtime.patch.claims import Claims
from nest_runtime.patch.site import DELTA_DTYPES, Site
from nest_runtime.patch.values import MAX_INT, FrozenTensor, content_digest, freeze_json, thaw_json
from nest_runtime.patch.write import save_patch

if TYPE_CHECKING:
    from nest_runtime.model.anatomy import Projection

__all__ = [
    "CLAIMS_VERSION",
    "DELTA_DTYPES",
    "FORMAT_VERSION",
    "FORMAT_VERSIONS",
    "Claims",
    "FrozenTensor",
    "Patch",
    "Site",
    "check_sites",
    "content_digest",
    "freeze_json",
    "thaw_json",
]

FORMAT_VERSION = 1
CLAIMS_VERSION = 2  # of patches with claims, and of no others
FORMAT_VERSIONS = (FORMAT_VERSION, CLAIMS_VERSION)

_SHA256 = r"sha256:[0-9a-f]{64}"
_LABEL = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}"
_ONE_LINE = r"[^\x00-\x1f\x7f]{0,255}"
_PATTERNS = {
    "name": (_LABEL, "letters, digits, '.', '_', '+' and '-'"),
    "version": (_LABEL, "letters, digits, '.', '_', '+' and '-'"),
    "base_hash": (_SHA256, "sha256:<64 hex digits>"),
    "rows_digest": (_SHA256 + "|", "sha256:<64 hex digits>"),
    "base_model": (_ONE_LINE, "one line of at most 255 characters"),
    "architecture": (_ONE_LINE, "one line of at most 255 characters"),
    "created": (
        r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|\+00:00))?",
        "ISO 8601 in UTC, e.g. 2026-02-18T12:00:00Z",
    ),
}


@dataclass(frozen=True)
class Patch:
    """A safety patch: header and sites, immutable and validated.

    Attributes:
        name, version: how users call it, e.g. ``reference-safety`` and ``v3``.
        serial: a whole number that only grows from one published version to the next.
        base_hash: ``sha256:<hex>``, the base model's hash (fingerprint.model_hash).
        rows_digest: ``sha256:<hex>``, digest of the base's rows this patch changes (base_rows.rows_digest).
        base_model: the base's name for people and cards (``reference``, ``org/name``).
        architecture: the base's class name, e.g. ``LlamaForCausalLM``.
        sites: the updates, in the model's order; an empty site is legal.
        parent: digest of the patch this one was re-tuned from, or None.
        method, data, metrics: settings, digests of training data, figures: JSON values, read-only.
        created: ISO 8601, UTC.
        claims: what is promised of it (claims.py), or None. They name the digest of the patch without them.
    """

    name: str
    version: str
    base_hash: str
    rows_digest: str
    architecture: str
    sites: tuple[Site, ...]
    serial: int = 1
    base_model: str = ""
    parent: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    claims: Claims | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        for key in ("method", "data", "metrics"):
            object.__setattr__(self, key, freeze_json(getattr(self, key), key))
        if self.claims is not None and not isinstance(self.claims, Claims):
            object.__setattr__(self, "claims", Claims.parse(self.claims))
        _check_fields(self)
        _check_claims(self)

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` over the header (without digest) and every tensor's name, dtype, shape and bytes."""
        return content_digest(self.header(), self.tensors)

    @cached_property
    def bare_digest(self) -> str:
        """The digest of this patch without its claims: what the claims are about."""
        return self.digest if self.claims is None else content_digest(self._header(None), self.tensors)

    @property
    def tensors(self) -> dict[str, FrozenTensor]:
        """All tensors by file key (``<site>.<part>``), frozen; shapes and dtypes as in the patch format."""
        return {key: value for site in self.sites for key, value in site.tensors.items()}

    @property
    def neurons(self) -> int:
        """The number of patched neurons, over all sites."""
        return sum(site.n_neurons for site in self.sites)

    @property
    def clusters(self) -> int:
        """The number of clusters, over all sites."""
        return sum(site.n_clusters for site in self.sites)

    @property
    def parameters(self) -> int:
        """Trained numbers in the whole patch."""
        return sum(site.parameters for site in self.sites)

    def site(self, name: str) -> Site:
        """The site called ``name``.

        Raises:
            SiteMismatch: there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise SiteMismatch(
            f"patch {self.label} has no site {name!r}; it has {len(self.sites)}",
            "list them with `nest-runtime inspect`",
        )

    def header(self) -> dict[str, Any]:
        """The header as plain JSON values, without the digest; with ``claims`` if there are any."""
        return self._header(self.claims)

    def _header(self, claims: Claims | None) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION if claims is None else CLAIMS_VERSION,
            **({} if claims is None else {"claims": claims.to_json()}),
            "name": self.name,
            "version": self.version,
            "serial": self.serial,
            "base_hash": self.base_hash,
            "rows_digest": self.rows_digest,
            "base_model": self.base_model,
            "architecture": self.architecture,
            "parent": self.parent,
            "method": thaw_json(self.method),
            "data": thaw_json(self.data),
            "metrics": thaw_json(self.metrics),
            "created": self.created,
            "sites": [{"name": s.name, "d_out": s.d_out, "stats": thaw_json(s.stats)} for s in self.sites],
        }

    @property
    def label(self) -> str:
        """``name@version``, for people."""
        return f"{self.name}@{self.version}"

    def evolve(self, **changes: Any) -> Patch:
        """A copy with other header fields or sites. The digest follows; claims about this patch are dropped."""
        return replace(self, **({"claims": None, **changes} if changes else {}))

    def save(self, path: str | Path) -> Path:
        """Write this patch as a safetensors file, atomically."""
        return save_patch(self, path)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Patch, tuple(thaw_json(getattr(self, f.name)) if f.name != "sites" else self.sites for f in fields(self))

    def __repr__(self) -> str:
        size = f"{self.neurons} neurons, {self.parameters} parameters"
        return f"<Patch {self.label} {short(self.digest)} {size}>"


def check_sites(patch: Patch, projections: Iterable[Projection]) -> None:
    """Check that every site of a patch fits a model's projections.

    Args:
        patch: the patch.
        projections: of the model, from ``anatomy.find_projections``.

    Raises:
        SiteMismatch: the model lacks a site, or its d_in or d_out differ; the message names the first.
    """
    known = {projection.name: projection for projection in projections}
    for site in patch.sites:
        projection = known.get(site.name)
        if projection is None:
            some = ", ".join(list(known)[:3]) or "none"
            raise SiteMismatch(
                f"patch {patch.label} changes {site.name}, which the model lacks; "
                f"the model has {len(known)} sites ({some}, …)",
                f"use a model of the patch's architecture ({patch.architecture}, base {patch.base_model or 'unnamed'})",
            )
        for key in ("d_in", "d_out"):
            mine, theirs = getattr(site, key), getattr(projection, key)
            if mine != theirs:
                raise SiteMismatch(
                    f"site {site.name} has {key} {mine} in patch {patch.label}, {theirs} in the model",
                    f"use the model the patch was made for ({patch.base_model or patch.base_hash})",
                )


def _check_claims(patch: Patch) -> None:
    if patch.claims is not None and patch.claims.patch != patch.bare_digest:
        raise PatchFormatError(
            f"claims are about {short(patch.claims.patch)}; without them this patch is {short(patch.bare_digest)}",
            "claims belong to one content: measure this patch anew with `nest-runtime claim`",
        )


def check_names(name: str | None, version: str | None) -> None:
    """Refuse a name or version that no patch can have; None is not looked at. Raises UsageError."""
    pattern, expected = _PATTERNS["name"]
    for what, value in (("name", name), ("version", version)):
        if value is not None and not re.fullmatch(pattern, value):
            raise UsageError(f"the {what} is {value!r:.100}; expected {expected}", f"give the patch a valid {what}")
    if version == "base":
        raise UsageError("version 'base' is taken: it means no patch", "name the version v1, v2, …")


def _check_fields(patch: Patch) -> None:
    for key, (pattern, expected) in _PATTERNS.items():
        value = getattr(patch, key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise PatchFormatError(f"{key} is {value!r:.100}; expected {expected}", f"give the patch a valid {key}")
    if patch.version == "base":
        raise PatchFormatError("version 'base' is taken: it means no patch", "name the version v1, v2, …")
    if type(patch.serial) is not int or not 0 <= patch.serial <= MAX_INT:
        raise PatchFormatError(
            f"serial is {patch.serial!r:.80}; expected a whole number from 0", "count versions from 1"
        )
    if patch.parent is not None and not (isinstance(patch.parent, str) and re.fullmatch(_SHA256, patch.parent)):
        raise PatchFormatError(
            f"parent is {patch.parent!r:.100}; expected null or sha256:<64 hex digits>", "give the parent's digest"
        )
    for key in ("method", "data", "metrics"):
        if not isinstance(getattr(patch, key), Mapping):
            raise PatchFormatError(f"{key} is no JSON object", f"give {key} as a mapping of names to JSON values")
    counts = Counter(site.name for site in patch.sites)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise PatchFormatError(f"sites appear twice: {', '.join(twice[:5])}", "give each projection one site")
