"""Activations of a patch's neurons on one prompt, token by token, under the base and under the patch.

Reads the raw outputs of the patched projections, what the patch adds included. Experts are left out: their tokens
go elsewhere from layer to layer, and rows of tokens would not line up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nest_runtime.demo.backend import Message
from nest_runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from nest_runtime.demo.local import LocalBackend
    from nest_runtime.model.projection import Projection
    from nest_runtime.patch.patch import Patch

MAX_TOKENS = 96  # columns drawn; the last ones of a longer prompt
MAX_ROWS = 36
_Raw = dict[str, np.ndarray]  # projection → (tokens, neurons)


@dataclass(frozen=True)
class Activations:
    """What neurons did on a prompt.

    Attributes:
        label: of the patch.
        tokens: as text, in order.
        rows: what each row of the values is about.
        base, patched: float64 (rows, tokens).
        first: where the last message's own tokens begin, behind those of the chat template.
        mean: rows are means over a cluster's neurons; else they are single neurons.
    """

    label: str
    tokens: tuple[str, ...]
    rows: tuple[str, ...]
    base: np.ndarray
    patched: np.ndarray
    first: int = 0
    mean: bool = True


def sites_of(patch: Patch) -> list[str]:
    """The projections with patched neurons."""
    return [site.name for site in patch.sites if site.n_neurons]


def activations(
    backend: LocalBackend, digest: str, label: str, messages: Sequence[Message], site: str | None = None
) -> Activations:
    """Run a conversation twice and read the patched neurons.

    Args:
        backend: the model.
        digest, label: of the patch.
        messages: ending with the user's turn.
        site: one projection, neuron by neuron (those with the largest updates); None: all, by the mean of each cluster.

    Raises:
        UsageError: the model does not read so much, or the patch has no neurons that can be read so.
    """
    from nest_runtime.prompts.examples import encode

    backend.room(messages, begun=True)
    patch = backend.patch(digest)
    ids = encode(backend.loaded.tokenizer, messages)
    wanted = [name for name in sites_of(patch) if site in (None, name)]
    base, patched = _read(backend, None, ids, patch, wanted), _read(backend, digest, ids, patch, wanted)
    if not base:
        raise UsageError(
            f"{label} has no neurons to show here", "neurons of experts are not shown; choose another patch"
        )
    shown = ids[-MAX_TOKENS:]
    tokens = tuple(_token(backend.loaded.tokenizer, token) for token in shown)
    rows = _by_neuron(patch, site) if site is not None else _by_cluster(patch, base)
    names = tuple(name for name, _, _ in rows)
    values = [
        np.stack([raw[name][-len(shown) :, columns].mean(axis=1) for _, name, columns in rows])
        for raw in (base, patched)
    ]
    first = max(_own_tokens(backend.loaded.tokenizer, messages, ids) - (len(ids) - len(shown)), 0)
    return Activations(label, tokens, names, values[0], values[1], first, site is None)


def _own_tokens(tokenizer: Any, messages: Sequence[Message], ids: Sequence[int]) -> int:
    """Where the last message's own tokens begin: up to there, the conversation with another message is the same."""
    from itertools import takewhile

    from nest_runtime.prompts.examples import encode

    first = next(iter(messages[-1]["content"].strip()), "")
    other = encode(tokenizer, [*messages[:-1], {"role": "user", "content": "1" if first != "1" else "2"}])
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, other, strict=False)))


def _by_cluster(patch: Patch, raw: _Raw) -> list[tuple[str, str, np.ndarray]]:
    """The clusters of every projection that was read: label, projection, and the (n,) positions of its neurons."""
    rows = []
    for site in patch.sites:
        if site.name not in raw:
            continue
        clusters = site.clusters.tensor().numpy()
        projection = _layer_and_kind(site.name)
        rows += [
            (f"{projection} c{k} ({int((clusters == k).sum())})", site.name, np.flatnonzero(clusters == k))
            for k in np.unique(clusters)
        ]
    return rows


def _by_neuron(patch: Patch, name: str) -> list[tuple[str, str, np.ndarray]]:
    """Single neurons of a projection, the largest updates first: label, projection, and a (1,) position."""
    site = patch.site(name)
    order = np.argsort(-site.row_deltas().norm(dim=1).numpy(), kind="stable")[:MAX_ROWS]
    neurons, clusters = site.neurons.tensor().tolist(), site.clusters.tensor().tolist()
    return [(f"neuron {neurons[i]} (c{clusters[i]})", name, np.array([i])) for i in order]


def _layer_and_kind(name: str) -> str:
    from nest_runtime.plots.view import layer_and_kind

    layer, kind = layer_and_kind(name)
    return f"layer {layer} {kind}"


def _token(tokenizer: Any, token: int) -> str:
    """A token as text for people: what cannot be seen is shown."""
    words = str(tokenizer.decode([token])).replace("\n", "↵")
    return words.strip() or "␣"


def _read(backend: LocalBackend, digest: str | None, ids: list[int], patch: Patch, wanted: Sequence[str]) -> _Raw:
    """One pass; raw outputs of the patch's neurons."""
    import torch

    from nest_runtime.model.anatomy import find_projections
    from nest_runtime.train.forward import hidden_states

    model = backend.loaded.model
    there = [p for p in find_projections(model) if p.name in set(wanted) and not p.experts]
    neurons = {name: patch.site(name).neurons.tensor() for name in wanted}
    rows = torch.tensor([ids], device=backend.loaded.device)  # (1, tokens)
    raw: _Raw = {}
    # Hooks of our own go behind those of the patch, which are put on when it is first used.
    with backend.using(patch.digest):
        pass
    with backend.using(digest), _reading(model, there, neurons, raw), torch.inference_mode():
        hidden_states(model, rows, torch.ones_like(rows))
    return raw


@contextmanager
def _reading(
    model: Any, projections: Sequence[Projection], neurons: dict[str, torch.Tensor], raw: _Raw
) -> Iterator[None]:
    """Hooks that keep this thread's outputs of some neurons, for one pass.

    Args:
        model: the model.
        projections: to read.
        neurons: [n] int by projection name.
        raw: receives (tokens, n) float64 by projection name.
    """
    from nest_runtime.model.anatomy import module_of

    me = threading.get_ident()

    def keeper(projection: Projection) -> Any:
        """A hook that keeps one projection's outputs, as (tokens, neurons) float64."""
        rows = projection.rows(neurons[projection.name])

        def keep(module: Any, args: Any, output: Any) -> None:
            if threading.get_ident() == me:
                values = output.reshape(-1, output.shape[-1])[:, rows.to(output.device)]  # (tokens, neurons)
                raw[projection.name] = values.float().cpu().numpy().astype(np.float64)

        return keep

    handles = [module_of(model, projection).register_forward_hook(keeper(projection)) for projection in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
