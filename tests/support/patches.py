"""Helpers that several test files share: random patches that are valid for a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from nest_runtime.model.anatomy import find_projections, unwrap
from nest_runtime.patch.patch import Patch, Site


def random_site(
    name: str,
    d_out: int,
    d_in: int,
    *,
    neurons: int = 5,
    clusters: int = 2,
    loadings: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.1,
    seed: int = 0,
) -> Site:
    """A valid random site; every cluster has a neuron where there are enough. ``neurons=0`` is an empty site."""
    generator = torch.Generator().manual_seed(seed)
    clusters = min(clusters, neurons)
    rows = torch.randperm(d_out, generator=generator)[:neurons].sort().values.int()
    numbers = torch.arange(neurons, dtype=torch.int32) % max(clusters, 1)
    deltas = (torch.randn(clusters, d_in, generator=generator) * scale).to(dtype)
    weights = 0.5 + torch.rand(neurons, generator=generator) if loadings else None
    return Site(name, d_out, deltas, rows, numbers, loadings=weights)  # type: ignore[arg-type]


def make_patch(
    model: torch.nn.Module,
    *,
    name: str = "test",
    version: str = "v1",
    serial: int = 1,
    seed: int = 0,
    neurons: int = 5,
    clusters: int = 2,
    loadings: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.1,
    empty: Collection[str] = (),
    base_hash: str | None = None,
    **fields: Any,
) -> Patch:
    """A random valid Patch for ``model``, with its true hash and rows digest.

    Args:
        model: a model that find_projections knows, unpatched.
        name, version, serial: as in Patch; so are further ``fields`` (parent, method, …).
        seed: another seed, another patch.
        neurons, clusters: of every site.
        loadings: give each neuron a loading in [0.5, 1.5).
        dtype: of the deltas.
        scale: standard deviation of the deltas.
        empty: names of sites left without neurons.
        base_hash: skip hashing the model and use this.
    """
    from nest_runtime.model.base_rows import rows_digest
    from nest_runtime.model.fingerprint import model_hash

    sites = tuple(
        random_site(
            p.name,
            p.d_out,
            p.d_in,
            neurons=0 if p.name in empty else neurons,
            clusters=clusters,
            loadings=loadings,
            dtype=dtype,
            scale=scale,
            seed=seed * 1000 + i,
        )
        for i, p in enumerate(find_projections(model))
    )
    return Patch(
        name=name,
        version=version,
        serial=serial,
        base_hash=base_hash or model_hash(model),
        rows_digest=rows_digest(model, {site.name: site.neurons.tensor() for site in sites}),
        architecture=type(unwrap(model)).__name__,
        sites=sites,
        **fields,
    )


def attached(model: torch.nn.Module) -> list[str]:
    """What stands on a model beside its own modules: ``name: what`` of every hook and every own ``forward``."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *module._backward_hooks.values()]
        forward = module.__dict__.get("forward")
        found += [f"{name}: {type(each).__name__}" for each in [*hooks, *([] if forward is None else [forward])]]
    return found
