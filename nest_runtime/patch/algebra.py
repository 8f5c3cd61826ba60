"""The sum of two patches, a patch at another strength, and the difference between two patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nest_runtime.errors import SiteMismatch, UsageError
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.site import Site
from nest_runtime.patch.values import FrozenTensor, thaw_json

MOST = 100.0  # times a patch


def compose(first: Patch, second: Patch, *, name: str, version: str) -> Patch:
    """One patch with the effect of two: ΔW = ΔW₁ + ΔW₂ (float32), neuron by neuron.

    Neurons whose summed rows are equal share a cluster; loadings are multiplied in.

    Args:
        first, second: patches of one base.
        name, version: of the new patch.

    Returns:
        The patch. Its ``rows_digest`` is that of neither: set it with ``evolve`` from the base.

    Raises:
        SiteMismatch: the two are for different bases or shapes.
    """
    if first.base_hash != second.base_hash:
        raise SiteMismatch(
            f"{first.version} is for base {first.base_hash}, {second.version} for {second.base_hash}",
            "compose patches of one base",
        )
    theirs = {site.name: site for site in second.sites}
    sites = [_compose_site(site, theirs.pop(site.name, None)) for site in first.sites]
    sites += [_compose_site(site, None) for site in theirs.values()]
    return Patch(
        name=name,
        version=version,
        base_hash=first.base_hash,
        rows_digest="",
        architecture=first.architecture,
        base_model=first.base_model,
        sites=tuple(sites),
        serial=max(first.serial, second.serial) + 1,
        method={"composed": [first.digest, second.digest]},
    )


def scale(patch: Patch, factor: float, *, version: str, name: str | None = None) -> Patch:
    """The patch at another strength: ΔW times a factor, rounded to the dtype of its rows.

    Above 1 it refuses more, of both classes; below 1 less.

    Args:
        patch: stays as it is.
        factor: above 0, at most 100.
        version: of the new patch.
        name: of the new patch; the same one by default.

    Returns:
        The patch's child. Its recipe states the strength; figures and claims of the patch do not hold for it, and are
        left out.

    Raises:
        UsageError: the factor is out of range.
        PatchFormatError: a row would no longer be finite.
    """
    if not 0 < factor <= MOST:
        raise UsageError(f"the factor is {factor:g}; expected a number above 0 and at most {MOST:g}", "try 0.9 or 1.1")
    method = thaw_json(patch.method)
    recipe = method.get("recipe")
    if isinstance(recipe, dict):
        recipe["strength"] = float(recipe.get("strength", 1.0)) * factor
    sites = []
    for site in patch.sites:
        rows = site.deltas.tensor()
        sites.append(replace(site, deltas=FrozenTensor.of((rows.float() * factor).to(rows.dtype))))
    return patch.evolve(
        name=name or patch.name,
        version=version,
        serial=patch.serial + 1,
        parent=patch.digest,
        sites=tuple(sites),
        method={**method, "scaled": {"from": patch.digest, "factor": float(factor)}},
        metrics={},
        created="",
    )


def diff(old: Patch, new: Patch) -> dict[str, Any]:
    """What changed from ``old`` to ``new``.

    Returns:
        JSON values. ``sites`` lists only the sites that differ: neurons added, removed and kept. For the kept neurons
        it gives the L2 norm of the change of their row updates, and the cosine between them.
    """
    before, after = {s.name: s for s in old.sites}, {s.name: s for s in new.sites}
    names = list(dict.fromkeys([*before, *after]))
    sites = [row for name in names if (row := _diff_site(name, before.get(name), after.get(name)))]
    old_header, new_header = old.header(), new.header()
    fields = {
        key: {"old": old_header.get(key), "new": new_header.get(key)}
        for key in dict.fromkeys([*old_header, *new_header])
        if key != "sites" and old_header.get(key) != new_header.get(key)
    }
    return {
        "old": old.digest,
        "new": new.digest,
        "same_base": old.base_hash == new.base_hash,
        "is_child": new.parent == old.digest,
        "header": fields,
        "sites": sites,
    }


def _compose_site(mine: Site, other: Site | None) -> Site:
    if other is not None and (mine.d_out, mine.d_in) != (other.d_out, other.d_in):
        raise SiteMismatch(
            f"site {mine.name} is [{mine.d_out}, {mine.d_in}] in one patch, [{other.d_out}, {other.d_in}] in the other",
            "compose patches of one base",
        )
    parts = [mine] if other is None else [mine, other]
    neurons = torch.unique(torch.cat([part.neurons.tensor().long() for part in parts]))  # (n,), sorted
    if not len(neurons):
        return _site(mine, torch.empty(0, mine.d_in), neurons, neurons)
    rows = torch.zeros(len(neurons), mine.d_in)
    for part in parts:
        rows[torch.searchsorted(neurons, part.neurons.tensor().long())] += part.row_deltas()
    deltas, clusters = torch.unique(rows, dim=0, return_inverse=True)
    return _site(mine, deltas, neurons, clusters)


def _site(like: Site, deltas: torch.Tensor, neurons: torch.Tensor, clusters: torch.Tensor) -> Site:
    frozen = (FrozenTensor.of(deltas), FrozenTensor.of(neurons.int()), FrozenTensor.of(clusters.int()))
    return Site(like.name, like.d_out, *frozen)


def _diff_site(name: str, old: Site | None, new: Site | None) -> dict[str, Any] | None:
    if old is not None and new is not None and old.tensors == new.tensors and old.d_out == new.d_out:
        return None
    was, now = _rows_of(old), _rows_of(new)
    if not was and not now:  # listed without neurons, or not listed: the same
        return None
    kept = sorted(was.keys() & now.keys())
    row: dict[str, Any] = {
        "site": name,
        "added": len(now.keys() - was.keys()),
        "removed": len(was.keys() - now.keys()),
        "kept": len(kept),
        "clusters": {"old": old.n_clusters if old else 0, "new": new.n_clusters if new else 0},
    }
    if old is not None and new is not None and kept and old.d_in == new.d_in:
        a = old.row_deltas()[[was[neuron] for neuron in kept]].flatten()
        b = new.row_deltas()[[now[neuron] for neuron in kept]].flatten()
        row["change_norm"] = float((b - a).norm())
        row["cosine"] = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return row


def _rows_of(site: Site | None) -> dict[int, int]:
    """Each neuron's row number in ``row_deltas``."""
    return {neuron: row for row, neuron in enumerate(site.neurons.tensor().tolist())} if site else {}
